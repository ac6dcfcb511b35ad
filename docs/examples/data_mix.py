"""How much old text to keep: a small GPT has learned Python's reference manual and shall now learn its source code."""

import inspect
import pydoc
from pydoc_data.topics import topics

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sharpkern


def rows_of(text, num_rows=96, width=65):
    return torch.frombuffer(bytearray(text.encode()[: num_rows * width]), dtype=torch.uint8).long().view(-1, width)


torch.manual_seed(0)
manual, source = rows_of("\n".join(topics.values())), rows_of(inspect.getsource(pydoc))
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=256, n_positions=64, n_embd=48, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None,
        attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


def loss_of(rows):
    return model(rows[:, :-1], labels=rows[:, :-1]).loss


for _ in range(60):
    optimizer.zero_grad()
    loss_of(manual[torch.randint(64, (8,))]).backward()
    optimizer.step()

sweep = sharpkern.mixture_sweep(
    model,
    tasks={"manual": manual[64:], "source": source[64:]},  # held out
    mix={"manual": manual[:64], "source": source[:64]},
    ratios=[0.0, 0.25, 0.5, 0.75, 1.0],  # shares of the manual
    repeats=2,
    batch_loss=loss_of,
    batch_size=16,
    path="sweep.jsonl",
)
print(sweep.sweet_spot)
sweep.plot("sweep.png")
