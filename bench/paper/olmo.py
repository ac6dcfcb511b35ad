"""A small Olmo 2 with a tokenizer of its own, trained in two stages as the large ones are, its revisions saved."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from corpora import code, english
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedTokenizerFast
from transformers.utils import logging

import sharpkern

LENGTH = 64
BATCH = 16
LR = 3e-3
WARMUP = 50


@dataclass(frozen=True)
class Stages:
    """How long to train, and which revisions to save."""

    pretraining: int  # steps on English, the learning rate falling to a tenth by a cosine
    every: int  # steps between two revisions of pre-training
    midtraining: int  # steps on English and code, one half each, the learning rate falling to zero
    every_then: int  # steps between two revisions of mid-training

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step, counted through both stages."""
        if step >= self.pretraining:
            return 0.1 * LR * (1 - (step - self.pretraining) / self.midtraining)
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / self.pretraining)
        return LR * min(1, (step + 1) / WARMUP) * cosine

    def revision(self, step: int) -> str | None:
        """Return the name under which the weights before a step are saved, if they are."""
        if step < self.pretraining:
            return None if step % self.every else f"stage1-step{step}"
        return None if (step - self.pretraining) % self.every_then else f"stage2-step{step}"


def train(stages: Stages, folder: Path) -> list[dict[str, Any]]:
    """Train, save the revisions as folders, and measure λ_c along the optimizer's own update at each of them.

    It is measured of the training batch's loss, and of another batch's: eight times as many rows of the English that
    is trained on.
    """
    logging.disable_progress_bar()
    texts = {"English": english(), "code": code()}
    tokenizer = _tokenizer(list(texts.values()))
    rows = {name: _rows(words, tokenizer) for name, words in texts.items()}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(len(tokenizer)))
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), LR, betas=(0.9, 0.95), weight_decay=0.1)
    monitor = sharpkern.Monitor(model, optimizer, every=lambda step: stages.revision(step) is not None)
    other = _draw(rows["English"], 8 * BATCH)
    saved = []
    for step in range(stages.pretraining + stages.midtraining):
        for group in optimizer.param_groups:
            group["lr"] = stages.lr_at(step)
        names = ["English"] if step < stages.pretraining else ["English", "code"]
        batch = torch.cat([_draw(rows[name], BATCH // len(names)) for name in names])

        optimizer.zero_grad()
        _loss(model, batch).backward()
        monitor(partial(_loss, model, batch), heldout=partial(_loss, model, other))
        revision = stages.revision(step)
        if revision is not None:
            model.save_pretrained(folder / revision)
            tokenizer.save_pretrained(folder / revision)
            row = monitor.history[-1].row()
            measured = {f"in_training_{name}": row[name] for name in ("lambda_c", "status")}
            heldout = {name: row[name] for name in ("heldout_lambda_c", "heldout_status")}
            saved.append({"revision": revision, "lr": row["lr"], **measured, **heldout})
        optimizer.step()
    return saved


def _loss(model: torch.nn.Module, rows: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def _tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Learn byte pairs of the texts."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    pairs.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token=end)


def _config(vocabulary: int) -> Olmo2Config:
    return Olmo2Config(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=0,
    )


def _rows(words: str, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    tokens = torch.tensor(tokenizer(words, verbose=False)["input_ids"])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def _draw(rows: Tensor, num: int) -> Tensor:
    return rows[torch.randint(len(rows), (num,))]
