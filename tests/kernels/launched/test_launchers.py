"""Every launcher of every operation through Triton's own specialisation, compiler and launch."""

import pytest
import torch
import triton
from sharpkern.kernels._launch import STREAMING

from sharpkern import ops
from sharpkern.engines.tracked import formed
from sharpkern.ops.update import LazyUpdate
from tests.helpers.launch_counts import forget_kernels

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ADAM = (0.1, 1.0, 1.0, 0.1, 0.999, 0.001, 10.0, 0.0316, 1e-8)
SIZES = (0, 1, 2, 3, 63, 1000, 4097)
# Where operands begin, in elements: at a multiple of 16 bytes, and between.
LAYOUTS = [(BF16, 0), (BF16, 1), (BF16, 8), (FP16, 0), (FP32, 0), (FP32, 3)]


@pytest.fixture(params=LAYOUTS, ids=lambda one: f"{str(one[0]).removeprefix('torch.')}+{one[1]}")
def vector(request):
    """What makes operands of a dtype that begin at an offset into their memory."""
    dtype, offset = request.param

    def make(*shape, dtype=dtype):
        num = torch.Size(shape).numel()
        return torch.rand(offset + num).add_(0.1).to(dtype)[offset:].view(shape)

    return make


def alpha(num_steps=1):
    return torch.linspace(-0.1, -0.2, num_steps)


def row(vector, size):
    """θ, g and AdamW's state of a tensor."""
    return vector(size), vector(size), (vector(size, dtype=FP32), vector(size, dtype=FP32), None)


def rows(vector):
    thetas, grads, states = zip(*(row(vector, size) for size in SIZES), strict=True)
    return list(thetas), list(grads), [tensor for state in states for tensor in state]


def lists(vector):
    return [[vector(size) for size in SIZES] for _ in range(3)]


def step(vector, size, num_steps):
    theta, grad, state = row(vector, size)
    return ops.form_step("adam", theta, grad, state, alpha(num_steps), ADAM, decoupled=True)


def statistics(num_tokens):
    return torch.full((num_tokens,), -torch.inf), torch.zeros(num_tokens), torch.zeros(num_tokens)


EACH_SIZE = {
    "form": (lambda vector, n: ops.form(vector(n), vector(n), alpha()), "_form_kernel"),
    "form K=8": (lambda vector, n: ops.form(vector(n), vector(n), alpha(8)), "_form_kernel"),
    "form_step": (lambda vector, n: step(vector, n, 1), "_form_step_kernel"),
    "form_step K=8": (lambda vector, n: step(vector, n, 8), "_form_step_kernel"),
    "step_sums": (lambda vector, n: ops.step_sums("adam", *row(vector, n), ADAM, decoupled=True), "_step_sums_kernel"),
    "embedding": (
        lambda vector, n: ops.embedding(torch.zeros(n, dtype=torch.int64), vector(5, 7), vector(5, 7), alpha(2)),
        "_embedding_kernel",
    ),
    "rms_norm": (
        lambda vector, n: ops.rms_norm(vector(1, n, 33), vector(33), vector(33), alpha(), eps=1e-6),
        "_norm_kernel",
    ),
    "layer_norm": (
        lambda vector, n: ops.layer_norm(vector(1, n, 33), *[vector(33)] * 4, alpha(), eps=1e-6),
        "_norm_kernel",
    ),
    "online_cross_entropy_": (
        lambda vector, n: ops.online_cross_entropy_(
            *statistics(n), vector(n, 33, dtype=FP32), torch.zeros(n, dtype=torch.int64), 0
        ),
        "_online_cross_entropy_kernel",
    ),
}
AT_ONCE = {
    "axpy_": (lambda vector: ops.axpy_(*lists(vector), alpha()), "_axpy_kernel"),
    "reduce": (lambda vector: ops.reduce(*lists(vector)), "_chunk_sums_kernel"),
    "form_steps_": (
        lambda vector: ops.form_steps_(
            "adam", [vector(size) for size in SIZES], *rows(vector), alpha(), ADAM, decoupled=True
        ),
        "_form_steps_kernel",
    ),
    "sum_steps": (lambda vector: ops.sum_steps("adam", *rows(vector), ADAM, decoupled=True), "_step_sums_kernel"),
    "linear, few tokens": (
        lambda vector: ops.linear(vector(2, 3, 65), vector(33, 65), vector(33, 65), alpha(2)),
        "_few_tokens_kernel",
    ),
    "linear, many tokens": (
        lambda vector: ops.linear(vector(1, 65, 65), vector(33, 65), vector(33, 65), alpha(2)),
        "_many_tokens_kernel",
    ),
}


@pytest.mark.parametrize("name", EACH_SIZE)
def test_every_size_is_launched_once(name, vector, gpu):
    call, kernel = EACH_SIZE[name]
    with gpu.counted() as counts:
        for size in SIZES:
            call(vector, size)
    assert counts.launches[kernel] == sum(size > 0 for size in SIZES)
    assert counts.refused == {}
    # Sizes do not make another kernel: two blocks, and 1 as what Triton takes for a constant.
    assert counts.loaded[kernel] <= 3


@pytest.mark.parametrize("name", AT_ONCE)
def test_tensors_of_every_size_are_launched_together(name, vector, gpu):
    call, kernel = AT_ONCE[name]
    with gpu.counted() as counts:
        call(vector)
    assert counts.launches[kernel] == 1
    assert counts.refused == {}


@pytest.mark.parametrize("name", ["form", "form_step", "axpy_", "reduce", "form_steps_", "sum_steps"])
def test_sizes_beyond_32_bits(name, gpu, monkeypatch):
    """Nothing is touched, and so nothing mapped: whether the launch is as it should be is all that is seen."""
    monkeypatch.setattr(gpu, "fills", False)
    n = 2**31 + 1000
    huge = lambda dtype=BF16: torch.empty(n, dtype=dtype)
    state = (huge(FP32), huge(FP32), None)
    calls = {
        "form": lambda: ops.form(huge(), huge(), alpha()),
        "form_step": lambda: ops.form_step("adam", huge(), huge(), state, alpha(), ADAM),
        "axpy_": lambda: ops.axpy_([huge()], [huge()], [huge()], alpha()),
        "reduce": lambda: ops.reduce([huge()], [huge()], [huge()]),
        "form_steps_": lambda: ops.form_steps_("adam", [huge()], [huge()], [huge()], state, alpha(), ADAM),
        "sum_steps": lambda: ops.sum_steps("adam", [huge()], [huge()], state, ADAM),
    }
    chunks = {"axpy_": 32, "reduce": 32, "form_steps_": 8, "sum_steps": 8}
    before = gpu.programs()
    calls[name]()
    launched = gpu.programs() - before
    block = STREAMING[-1].config.block
    assert max(launched.values()) == triton.cdiv(n, block * chunks.get(name, 1))


def test_what_is_launched_again_reads_the_new_step_and_writes_the_new_output(gpu):
    from sharpkern.ops import registry

    theta, grad, state = torch.randn(1000), torch.randn(1000), (torch.randn(1000), torch.rand(1000), None)
    launch = registry.prepared("form_step", "adam", theta, grad, state, alpha(), ADAM, decoupled=True)
    for k, offset in ((2, 0), (3, 0), (4, 1)):
        out, steps = torch.empty(1001)[offset : offset + 1000], k * alpha()
        launch(alpha=steps, out=out)
        assert torch.equal(
            out, ops.form_step("adam", theta, grad, state, steps, ADAM, decoupled=True, backend="torch")[0]
        )


def test_a_launch_into_given_memory_is_not_taken_for_one_into_new_memory(gpu):
    """There results are further apart, at multiples of 16 elements: to Triton that makes another kernel."""
    forget_kernels()
    move = LazyUpdate("adam", torch.randn(1001), torch.randn(1001), (torch.randn(1001), torch.rand(1001), None), ADAM)
    steps, out = alpha(8), torch.empty(8, 1001)
    with gpu.counted() as counts:
        for _ in range(2):
            new = formed(move, steps, FP32)
            assert formed(move, steps, FP32, out) is out
    assert torch.equal(out, new)
    assert torch.equal(out, move.form(steps, dtype=FP32))
    assert counts.loaded == {"_form_step_kernel": 2}
    assert counts.launches == {"_form_step_kernel": 4}


def test_refusals_are_counted_and_told_once(gpu):
    import sharpkern
    from sharpkern.ops import registry

    registry._told.discard("form")
    W = torch.randn(8, 8)[:, ::2]
    with gpu.counted() as counts:
        with pytest.warns(sharpkern.KernelWarning, match="form is computed by plain torch on cpu"):
            ops.form(W, W, alpha())
        ops.form(W, W, alpha())
    assert counts.refused == {"form": 2}
    registry._told.discard("form")
    # Nobody expects a kernel for them.
    ops.form(torch.randn(4).double(), torch.randn(4).double(), alpha().double())
    assert "form" not in registry._told
