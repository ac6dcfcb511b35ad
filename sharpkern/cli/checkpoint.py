"""Causal language models of transformers, from a folder or by name, one revision at a time.

The revisions of a hub's model are its own. Those of a folder are folders in it, as training runs leave them.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpkern._extras import missing

_WEIGHTS = ("*.safetensors", "*.bin")
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
            ValueError: there is none, it cannot be reached, or it is of no causal language model.
        """
        transformers = _transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(self.source, revision=self.revision)
        except (OSError, ValueError) as error:
            at = f" at revision {self.revision!r}" if self.revision else ""
            raise ValueError(
                f"--model must be a folder with a saved model or the name of one on the hub, got {self.source!r}{at}: "
                f"{_first_line(error)}"
            ) from None
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"the checkpoint {self.label!r} must be of a causal language model, got {type(config).__name__}; name "
                "another model"
            )
        return config

    def mark(self) -> str:
        """Tell this state of the checkpoint from others: by its files' sizes and times, or the hub's commit.

        Raises:
            ValueError: there are no weights in the folder.
        """
        folder = Path(self.source)
        if not folder.is_dir():
            return str(getattr(self.config(), "_commit_hash", None))
        weights = sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))
        if not weights:
            raise ValueError(f"{self.source} must hold the model's weights, got none; save the model there again")
        return str(zlib.crc32(repr([(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in weights]).encode()))

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
            model, found = _transformers().AutoModelForCausalLM.from_pretrained(
                self.source, revision=self.revision, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {self.label!r} must hold a causal language model: {_first_line(error)}"
            ) from None
        lacking = sorted([*found["missing_keys"], *found["mismatched_keys"]], key=str)
        if lacking:
            raise ValueError(
                f"the checkpoint {self.label!r} must hold all weights of its model, got none that fit for {lacking[0]}"
                f"{f' and {len(lacking) - 1} more' if len(lacking) > 1 else ''}; save it again"
            )
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
    if len(set(revisions)) < len(revisions):
        raise ValueError(f"--revisions must name each revision once, got {', '.join(revisions)}; leave out the others")
    if not revisions:
        found = [Checkpoint(folder.resolve().name if folder.is_dir() else name, name, None)]
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
        checkpoint.mark()
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
