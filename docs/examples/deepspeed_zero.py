"""Critical sharpness under DeepSpeed's ZeRO-2, with accumulation and clipping; run by: deepspeed deepspeed_zero.py.

Without a GPU: DS_ACCELERATOR=cpu torchrun --nproc-per-node=2 deepspeed_zero.py.
"""

import deepspeed
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import sharpkern

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
config = {
    "train_micro_batch_size_per_gpu": 64,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
engine, optimizer, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
monitor = sharpkern.Monitor(engine, optimizer, every=10)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32, device=engine.device)[rank::num_ranks] / 16
y = torch.tensor(digits.target, device=engine.device)[rank::num_ranks]
for _ in range(50):
    rows = torch.randint(len(x), (2, 64), device=engine.device)
    parts = [lambda k=k: F.cross_entropy(engine(x[rows[k]]), y[rows[k]]) for k in range(2)]
    for part in parts:
        engine.backward(part())
        if engine.is_gradient_accumulation_boundary() and monitor(lambda: (parts[0]() + parts[1]()) / 2) and rank == 0:
            print(monitor)
        engine.step()
torch.distributed.destroy_process_group()
