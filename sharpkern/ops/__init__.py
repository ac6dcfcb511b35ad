"""Every operation as torch sees it: one schema, a fake for compilers and memory plans, a Triton and a torch backend.

``backend="auto"`` takes the Triton kernel on CUDA and HIP devices where it takes the operands, and plain torch
everywhere else. ``"triton"`` and ``"torch"`` are used or raise. Triton is imported inside the first call that needs it.

Step sizes come as a tensor ``alpha`` [K] of signed steps (−η along an update): float32, or float64 with operands of
float64. Results have K in front. No operation is differentiable, none reads a tensor back to the host on a GPU, and
none is timed or tuned while it runs.

Both backends refuse, before anything is written, operands that are not dense and floating on one device, shapes that do
not belong together, and outputs that overlap themselves or other operands. The kernels have limits of their own, beyond
which "auto" goes to torch: 1 to 16 step sizes, rows of norms up to 16384, chunks of logits up to 4096 columns, float32,
float16 and bfloat16, operands of one parameter with equal strides and no gaps, no output in the place of an operand.

Triton's interpreter (``TRITON_INTERPRET=1``) runs the kernels on CPU tensors, for their logic: it truncates what it
stores to bfloat16, where a GPU rounds to nearest.
"""

# A file of rules/ that is imported here is in RULES.
from sharpkern.ops.form import axpy_ as axpy_
from sharpkern.ops.form import form as form
from sharpkern.ops.layers import embedding as embedding
from sharpkern.ops.layers import layer_norm as layer_norm
from sharpkern.ops.layers import linear as linear
from sharpkern.ops.layers import rms_norm as rms_norm
from sharpkern.ops.online_cross_entropy import online_cross_entropy_ as online_cross_entropy_
from sharpkern.ops.optimizer_steps import form_step as form_step
from sharpkern.ops.optimizer_steps import form_steps_ as form_steps_
from sharpkern.ops.optimizer_steps import step_sums as step_sums
from sharpkern.ops.optimizer_steps import sum_steps as sum_steps
from sharpkern.ops.reductions import reduce as reduce
from sharpkern.ops.registry import Backend as Backend
from sharpkern.ops.registry import has_kernels as has_kernels
from sharpkern.ops.rules import lion as lion
from sharpkern.ops.rules import rmsprop as rmsprop
from sharpkern.ops.rules.adam import adam_sums as adam_sums
from sharpkern.ops.rules.adam import form_adam as form_adam
from sharpkern.ops.rules.sgd import form_sgd as form_sgd
from sharpkern.ops.rules.sgd import sgd_sums as sgd_sums
