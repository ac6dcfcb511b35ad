"""Text as rows of tokens for a language model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from sharpkern.cli.checkpoint import Checkpoint

Encode = Callable[[str], list[int]]


def read_text(paths: Sequence[Path]) -> str:
    """Read files, and all files of text below folders in the order of their names, hidden ones left out."""
    texts = list(_texts(paths))
    if not any(text.strip() for text in texts):
        raise ValueError(f"text must not be empty, got nothing in {', '.join(map(str, paths))}; name files with text")
    return "\n\n".join(texts)


def encoder(checkpoint: Checkpoint, as_bytes: bool) -> Encode:
    """Return how text becomes tokens."""
    vocabulary = checkpoint.config().get_text_config().vocab_size
    tokenizer = None if as_bytes else checkpoint.tokenizer()

    def encode(text: str) -> list[int]:
        if tokenizer is None:
            ids = list(text.encode("utf-8"))
        else:
            # Longer than the model's context: it is cut into rows afterwards.
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        largest = max(ids, default=0)
        if largest >= vocabulary:
            raise ValueError(
                f"the model's vocabulary must hold every token, got token {largest} for {vocabulary} of them; "
                f"{'leave out --bytes' if as_bytes else 'save the tokenizer that belongs to the model'}"
            )
        return ids

    return encode


def rows_of(paths: Sequence[Path], encode: Encode, length: int, *, at_least: int, option: str) -> Tensor:
    """Read text and cut it into rows."""
    tokens = torch.tensor(encode(read_text(paths)), dtype=torch.int64)
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < at_least:
        raise ValueError(
            f"{option} must hold at least {at_least} rows of {length} tokens, got {len(tokens)} tokens, which are "
            f"{len(rows)}; name more text, or ask for fewer or smaller batches"
        )
    return rows


def spread(num_rows: int, count: int) -> Tensor:
    """Return places all over a text."""
    return torch.arange(count) * num_rows // count


def check_context(checkpoint: Checkpoint, length: int) -> None:
    """Refuse rows that are longer than the model's context."""
    longest = getattr(checkpoint.config().get_text_config(), "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ValueError(f"--tokens must be at most the model's context of {longest}, got {length}; lower it")


def row_loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean loss of the next token over rows."""
    rows = rows.to(next(model.parameters()).device)
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


def _texts(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                # Images, archives, version control and the like beside the text.
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                content = file.read_bytes() if file.is_file() and not hidden else b"\0"
                if b"\0" not in content:
                    with suppress(UnicodeDecodeError):
                        yield content.decode("utf-8")
        elif path.is_file():
            try:
                yield path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise ValueError(f"{path} must be UTF-8 text, got other bytes; convert it") from None
        else:
            raise ValueError(f"{path} must be a file or a folder of text, got nothing there; check the path")
