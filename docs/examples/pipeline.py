"""Critical sharpness of a pipeline of two stages; run by: torchrun --nproc-per-node=2 pipeline.py."""

import os

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import distributed, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

import sharpkern

device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
distributed.init_process_group()
rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
is_first, is_last = rank == 0, rank == num_ranks - 1
torch.manual_seed(rank)
layers = [nn.Linear(64 if is_first else 256, 256), nn.ReLU()]
model = nn.Sequential(*layers, *([nn.Linear(256, 10)] if is_last else [])).to(device)
schedule = Schedule1F1B(PipelineStage(model, rank, num_ranks, device), n_microbatches=4, loss_fn=F.cross_entropy)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
# Every rank holds another part of the model: its own stage, and the optimizer of that.
ranks = sharpkern.Ranks(split=distributed.group.WORLD)
monitor = sharpkern.Monitor(model, optimizer, every=10, ranks=ranks)

digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16
y = torch.tensor(digits.target, device=device)


def run(passes, rows):
    """Send the micro-batches through the stages; the mean loss on the last one, None on the others."""
    losses = []
    passes(*([x[rows]] if is_first else []), **({"target": y[rows], "losses": losses} if is_last else {}))
    return torch.stack(losses).mean() if losses else None


generator = torch.Generator().manual_seed(0)
for _ in range(50):
    rows = torch.randint(len(x), (128,), generator=generator).to(device)
    optimizer.zero_grad()
    loss = run(schedule.step, rows)
    # Forward passes alone.
    if monitor(lambda rows=rows: run(schedule.eval, rows), loss=loss) and rank == 0:
        print(monitor)
    optimizer.step()
distributed.destroy_process_group()
