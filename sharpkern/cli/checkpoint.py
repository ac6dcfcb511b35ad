"""Causal language models of transformers, from a folder or by name, one revision at a time.

The revisions of a hub's model are its own. Those of a folder are folders in it, as training runs leave them.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sharpkern._support.optional import missing
from sharpkern.mixtures.fingerprint import fingerprint_of, fingerprint_of_file

# transformers takes the first that is there, or its shards.
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# Names of models on the hub, with their owner or without.
_ON_THE_HUB = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
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
        """Read its configuration, which shows that there is such a checkpoint."""
        transformers = _transformers()
        at = f" at revision {self.revision!r}" if self.revision else ""
        rule = f"--model must be a folder with a saved model or the name of one on the hub, got {self.source!r}{at}"
        with _told(rule):
            config = transformers.AutoConfig.from_pretrained(
                self.source, revision=self.revision, trust_remote_code=False
            )
        if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(
                f"the checkpoint {self.label!r} must be of a causal language model, got {type(config).__name__}; name "
                "another model"
            )
        return config

    def mark(self) -> str:
        """Tell this state of the checkpoint from others: by the bytes of its files, or the hub's commit."""
        folder = Path(self.source)
        if not folder.is_dir():
            return str(getattr(self.config(), "_commit_hash", None))
        return str(
            fingerprint_of(
                [(path.name, fingerprint_of_file(path)) for path in (folder / "config.json", *_weights(folder))]
            )
        )

    def check_weights(self) -> None:
        """Refuse a folder without weights, and files of weights that were not written or copied to their end."""
        folder = Path(self.source)
        if not folder.is_dir():
            return
        with _told(f"{self.source} must hold an index of its weights that can be read"):
            weights = _weights(folder)
        if not weights:
            raise ValueError(f"{self.source} must hold the model's weights, got none; save the model there again")
        for path in weights:
            with _told(f"{self.source} must hold whole files of weights, got {path.name}, which cannot be read"):
                _read_ends(path)

    def tokenizer(self) -> Any:
        """Load its tokenizer."""
        remedy = "save it there with tokenizer.save_pretrained, or pass --bytes for a model of bytes"
        found = None
        try:
            tokenizer = _transformers().AutoTokenizer.from_pretrained(
                self.source, revision=self.revision, trust_remote_code=False
            )
            # For some architectures a tokenizer without a vocabulary comes where none was saved.
            found = tokenizer(_ANY_TEXT, add_special_tokens=False)["input_ids"]
        except ImportError:
            raise
        except Exception as error:
            if any(Path(self.source).glob("tokenizer*")):
                raise ValueError(
                    f"the checkpoint {self.source!r} must have a tokenizer that can be read, got one that cannot "
                    f"({_first_line(error)}); {remedy}"
                ) from None
        if not found:
            raise ValueError(f"the checkpoint {self.source!r} must have a tokenizer, got none; {remedy}")
        return tokenizer

    def load(self, device: torch.device, dtype: str) -> nn.Module:
        """Load the model for measuring: in evaluation mode, without a cache of keys and values."""
        with _told(f"the checkpoint {self.label!r} must hold a causal language model"):
            model, found = _transformers().AutoModelForCausalLM.from_pretrained(
                self.source, revision=self.revision, dtype=dtype, output_loading_info=True, trust_remote_code=False
            )
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
    """Find the checkpoints of a model, and make sure that all of them are there."""
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
    # A folder that was misspelt would be looked for on the hub, which takes its time to say no.
    beside = "/" in name and folder.parent.is_dir()
    if not folder.is_dir() and (beside or not _ON_THE_HUB.fullmatch(name)):
        raise ValueError(
            f"--model must be a folder with a saved model or the name of one on the hub, got {name!r}, where there is "
            "no folder; check the path"
        )
    if folder.is_dir() and not revisions and not (folder / "config.json").is_file():
        there = sorted(path.parent.name for path in folder.glob("*/config.json"))
        remedy = f"name them with --revisions: {', '.join(there)}" if there else "check the path"
        raise ValueError(
            f"--model must be a folder with a saved model or the name of one on the hub, got {name!r}, a folder "
            f"without config.json; {remedy}"
        )
    for checkpoint in found:
        checkpoint.config()
        checkpoint.check_weights()
    return found


def _weights(folder: Path) -> list[Path]:
    """Return the files of a folder that its weights are in, those that an index names and that may be missing too."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return sorted({folder / shard for shard in shards})
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _read_ends(path: Path) -> None:
    """Read what a file of weights says of itself at its beginning or end, which one that was cut off contradicts."""
    with path.open("rb") as file:
        beginning = file.read(2)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt"):
            return
    # What torch saved before it saved archives has no end to look at.
    if beginning != b"\x80\x02":
        zipfile.ZipFile(path).close()


@contextmanager
def _told(rule: str) -> Iterator[None]:
    """Tell in one line what a library cannot read; a file that is cut off has it raise anything."""
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{rule.split(' must ')[0]} must be of an architecture of transformers, got one with code of its own, "
                "which sharpkern does not run; measure it in Python by sharpkern.critical_sharpness"
            ) from None
        raise ValueError(f"{rule}: {_first_line(error)}") from None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise missing("transformers", "transformers", "reading checkpoints") from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
