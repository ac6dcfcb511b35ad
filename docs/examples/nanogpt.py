"""A byte-level GPT on Python's source code, in nanoGPT's order: the next batch is fetched before this one ends."""

import inspect
import pydoc

import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import sharpkern

text = torch.frombuffer(bytearray(inspect.getsource(pydoc).encode()), dtype=torch.uint8).long()
torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=20)
accumulation_steps = 4
monitor = sharpkern.Monitor(model, optimizer, every=10)


def get_batch():
    starts = torch.randint(len(text) - 65, (4,)).tolist()
    rows = torch.stack([text[start : start + 65] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def loss_of(x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(x).logits
    return F.cross_entropy(logits.float().flatten(0, 1), y.flatten())


x, y = get_batch()
for _ in range(21):
    batches, total = [], 0.0
    for _ in range(accumulation_steps):
        batches.append((x, y))  # kept for the monitor, before the next batch takes its name
        loss = loss_of(x, y) / accumulation_steps
        x, y = get_batch()
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    # After clipping, before step(), on all micro-batches of the step.
    if monitor(lambda: sum(loss_of(*batch) for batch in batches) / len(batches), loss=total):
        print(monitor)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad(set_to_none=True)
monitor.to_csv("nanogpt.csv")
