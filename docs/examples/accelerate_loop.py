"""Critical sharpness in a loop of Accelerate, with accumulation and clipping."""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from sharpkern.integrations.accelerate import SharpnessMonitor

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
pixels, labels = load_digits(return_X_y=True)
data = TensorDataset(torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels))
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=128))

monitor = SharpnessMonitor(accelerator, model, optimizer, every=3)
accelerator.register_for_checkpointing(monitor)


def compute_loss(batch):
    x, y = batch
    return F.cross_entropy(model(x), y)


for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(compute_loss(batch))
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        monitor(compute_loss, batch)  # in every micro-batch, after clipping
        optimizer.step()
        optimizer.zero_grad()
print(monitor)
