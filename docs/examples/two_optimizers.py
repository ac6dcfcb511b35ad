"""Two optimizers in one step: Muon moves the hidden matrices, AdamW everything else. Needs torch 2.9 or newer."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import sharpkern

torch.manual_seed(0)
digits = load_digits()
inputs, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
first, hidden, last = torch.nn.Linear(64, 128), torch.nn.Linear(128, 128), torch.nn.Linear(128, 10)
model = torch.nn.Sequential(first, torch.nn.ReLU(), hidden, torch.nn.ReLU(), last)
others = [p for p in model.parameters() if p is not hidden.weight]
optimizers = [torch.optim.Muon([hidden.weight], lr=0.02), torch.optim.AdamW(others, lr=3e-3)]

# Both move in the same step: λ_c is of their common update, and η_c in units of the first one's learning rate.
monitor = sharpkern.Monitor(model, optimizers, every=20)
for _ in range(101):
    rows = torch.randint(len(inputs), (256,))
    loss_fn = lambda: F.cross_entropy(model(inputs[rows]), labels[rows])
    model.zero_grad()
    loss = loss_fn()
    loss.backward()
    if monitor(loss_fn, loss=loss):
        print(monitor)
    for optimizer in optimizers:
        optimizer.step()
