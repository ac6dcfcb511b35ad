"""Critical sharpness in the Trainer of Transformers."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from sharpkern.integrations.transformers import SharpnessCallback

torch.manual_seed(0)
sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (64, 16))]
args = TrainingArguments(
    "output", max_steps=6, gradient_accumulation_steps=2, save_strategy="no", report_to="none", use_cpu=True
)

callback = SharpnessCallback(every=3)
trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
trainer.train()
print(callback.monitor)
