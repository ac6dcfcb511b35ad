"""Critical sharpness under FSDP2; run by: torchrun --nproc-per-node=2 fsdp2.py."""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import sharpkern

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
distributed.init_process_group()
rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer)
fully_shard(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
monitor = sharpkern.Monitor(model, optimizer, every=10)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32, device=device)[rank::num_ranks] / 16
y = torch.tensor(digits.target, device=device)[rank::num_ranks]
for _ in range(50):
    rows = torch.randint(len(x), (128,), device=device)
    loss_fn = lambda: F.cross_entropy(model(x[rows]), y[rows])
    optimizer.zero_grad()
    loss = loss_fn()
    loss.backward()
    if monitor(loss_fn, loss=loss) and rank == 0:
        print(monitor)
    optimizer.step()
distributed.destroy_process_group()
