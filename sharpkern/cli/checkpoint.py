"""Causal language models of transformers, from a folder or by name, one revision at a time.

The revisions of a hub's model are its own. Those of a folder are folders in it, as training runs leave them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpkern._extras import missing

_ANY_TEXT = "def f(x): return x  # The quick brown fox."


@dataclass(frozen=True)
class Checkpoint:
    """Where one revision of a model is.

    Attributes:
        label: the revision's name, or the model's.
        source: folder, or name on the hub.
        revision: on the hub, or None.
    """

    label: str
    source: str
    revision: str | None

    def config(self) -> Any:
        """Read its configuration, which shows that there is such a checkpoint.

        Raises:
            ValueError: there is none, or it cannot be reached.
        """
        try:
            return _transformers().AutoConfig.from_pretrained(self.source, revision=self.revision)
        except (OSError, ValueError) as error:
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise ValueError(
                f"--model must be a folder with a saved model or the name of one on the hub, got {self.source!r}{at}: "
                f"{_first_line(error)}"
            ) from None

    def tokenizer(self) -> Any:
        """Load its tokenizer.

        Raises:
            ValueError: it has none.
        """
        try:
            tokenizer = _transformers().AutoTokenizer.from_pretrained(self.source, revision=self.revision)
            # For some architectures a tokenizer without a vocabulary comes where none was saved.
            found = bool(tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"])
        except (OSError, ValueError):
            found = False
        if not found:
            raise ValueError(
                f"the checkpoint {self.source!r} must have a tokenizer, got none; save it there with "
                "tokenizer.save_pretrained, or pass --bytes for a model of bytes"
            )
        return tokenizer

    def load(self, device: torch.device, dtype: str) -> nn.Module:
        """Load the model for measuring: in evaluation mode, without a cache of keys and values.

        Args:
            device: where to.
            dtype: of the weights, "auto" for that they were saved in.

        Returns:
            The model, on the device.

        Raises:
            ValueError: it is no causal language model, or not complete.
        """
        try:
            model = _transformers().AutoModelForCausalLM.from_pretrained(
                self.source, revision=self.revision, dtype=dtype
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {self.label!r} must hold a causal language model: {_first_line(error)}"
            ) from None
        model.config.use_cache = False
        placed: nn.Module = model.to(device)
        return placed.eval()


def checkpoints(name: str, revisions: Sequence[str]) -> list[Checkpoint]:
    """Find the checkpoints of a model, and make sure that all of them are there.

    Args:
        name: folder, or name on the hub.
        revisions: names of folders in that folder, or of the hub's revisions; none for the model itself.

    Returns:
        One checkpoint for each revision, or the one of the model itself.

    Raises:
        ImportError: transformers is not installed.
        ValueError: one of them is not there.
    """
    folder = Path(name)
    if not revisions:
        found = [Checkpoint(folder.name if folder.is_dir() else name, name, None)]
    elif folder.is_dir():
        for revision in revisions:
            if not (folder / revision / "config.json").is_file():
                there = sorted(path.parent.name for path in folder.glob("*/config.json"))
                raise ValueError(
                    f"revision {revision!r} must be a folder with a saved model in {name}, got no such folder; there "
                    f"are: {', '.join(there) or 'none'}"
                )
        found = [Checkpoint(revision, str(folder / revision), None) for revision in revisions]
    else:
        found = [Checkpoint(revision, name, revision) for revision in revisions]
    for checkpoint in found:
        checkpoint.config()
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "transformers", "reading checkpoints") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
