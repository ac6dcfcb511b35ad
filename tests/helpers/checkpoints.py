"""Revisions of a small Olmo 2 of a real short training, for the commands that read checkpoints."""

import importlib
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest

ROOT = Path(__file__).parents[2]
REVISIONS = ["stage1-step0", "stage1-step8", "stage2-step16"]
ENGLISH = "\n".join(f"The {noun} of the {other} is {noun}." for noun in ("cat", "sun", "sea") for other in "abcdef") * 9


@cache
def olmo() -> Path:
    """Train once, and return the folder of the revisions, each with its tokenizer."""
    folder = Path(mkdtemp(prefix="olmo-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "bench" / "paper")
        trainer = importlib.import_module("olmo")
        trainer.train(trainer.Stages(pretraining=16, every=8, midtraining=8, every_then=8), folder)
    return folder


def words(output: str) -> str:
    """What was printed, without frames and the line breaks of the terminal's width."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", output)
