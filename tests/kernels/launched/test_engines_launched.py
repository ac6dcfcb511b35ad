"""The engines on a GPU that computes nothing but what plain torch fills in: losses are those of plain torch."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern import Direction
from sharpkern.directions import from_optimizer, residence
from sharpkern.engines.tracked import Scratch
from sharpkern.engines.virtual import lm_head
from tests.helpers.cases import CASES, tokens
from tests.helpers.llama import TrainedLlama
from tests.helpers.models import GPT
from tests.helpers.oracle import engine_losses, engine_on, random_direction

STEP_SIZES = (0.0, 0.02, 0.05, 0.01)
BY_NAME = {case.name: case for case in CASES}


def stepped(model, loss_fn, kind):
    """An optimizer of a model between backward and step."""
    optimizer = kind(model.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss_fn().backward()
        optimizer.step()
    return optimizer


def both(model, loss_fn, make_direction, engine, step_sizes, gpu, monkeypatch):
    with gpu.counted() as counts:
        losses = engine_losses(engine, model, loss_fn, make_direction(), step_sizes)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    return losses, engine_losses(engine, model, loss_fn, make_direction(), step_sizes), counts


@pytest.mark.parametrize(
    ("name", "engine"),
    [(name, engine) for name in ("gpt", "resnet") for engine in ("virtual", "inplace", "batched")]
    # Recurrent layers have no rule for several step sizes at once.
    + [("lstm", "virtual"), ("lstm", "inplace")],
)
def test_losses_of_a_direction_in_memory(name, engine, gpu, monkeypatch, no_swapping):
    model = BY_NAME[name].build()
    direction = random_direction(model)
    losses, expected, counts = both(
        model, BY_NAME[name].closure(model), lambda: direction, engine, STEP_SIZES, gpu, monkeypatch
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert counts.launches.total() > 0
    assert counts.refused == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_losses_of_a_direction_from_state(kind, engine, dtype, gpu, monkeypatch, no_swapping):
    model = GPT(width=16, layers=2).eval().to(dtype)
    x = tokens(batch=2, length=16)
    loss_fn = lambda: torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    optimizer = stepped(model, loss_fn, kind)
    losses, expected, counts = both(
        model,
        loss_fn,
        lambda: Direction.from_optimizer(optimizer, resident=False),
        engine,
        STEP_SIZES,
        gpu,
        monkeypatch,
    )
    # Sixteen-bit norms are formed in fp32 here and there.
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 2e-3)
    assert counts.launches.total() > 0
    assert counts.refused == {}


def under_autocast():
    model = GPT(width=16, layers=2).eval()
    x = tokens(batch=2, length=16)

    def loss_fn():
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    return model, loss_fn, stepped(model, loss_fn, torch.optim.AdamW)


def test_vectors_of_norms_are_formed_together_under_autocast(gpu):
    model, loss_fn, optimizer = under_autocast()
    direction = Direction.from_optimizer(optimizer, resident=False)
    with engine_on("virtual", model, loss_fn, direction) as (opened, _):
        opened.losses([0.01])
        with gpu.counted() as counts:
            opened.losses([0.02])
    # The embedding is the head as well.
    matrices = sum(p.dim() > 1 for p in model.parameters()) + 1
    assert counts.launches == {"_form_step_kernel": matrices, "_form_steps_kernel": 1}


class Called(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.name().removeprefix("aten::").split(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def test_norms_that_are_written_out_move_no_activation_once_more(gpu, monkeypatch):
    pytest.importorskip("transformers", reason="the model is of transformers")
    monkeypatch.setattr(lm_head, "HEAD_THRESHOLD", 2**16)
    llama = TrainedLlama(2)
    direction = Direction.from_optimizer(llama.optimizer, resident=False)
    with engine_on("virtual", llama.model, llama.loss, direction) as (opened, _):
        opened.losses([0.0, 1e-3])
        # What plain torch fills in is no part of a pass.
        monkeypatch.setattr(gpu, "leaves_out_forms", True)
        with Called() as still:
            opened.losses([0.0])
        with Called() as moved:
            opened.losses([2e-3])
    for name in ("mul", "_to_copy", "copy_", "add", "rsqrt", "mean", "pow"):
        assert moved.counts[name] == still.counts[name], name
    assert still.counts["mul"] > 2 * 5


@pytest.mark.parametrize("resident", [False, True], ids=["from state", "in memory"])
def test_kernels_form_weights_in_autocasts_dtype(resident, gpu, monkeypatch, no_swapping):
    model, loss_fn, optimizer = under_autocast()
    formed = []
    take = Scratch.take
    monkeypatch.setattr(Scratch, "take", lambda self, like, dtype: formed.append(dtype) or take(self, like, dtype))
    losses, expected, counts = both(
        model,
        loss_fn,
        lambda: Direction.from_optimizer(optimizer, resident=resident),
        "virtual",
        STEP_SIZES,
        gpu,
        monkeypatch,
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(formed) == {torch.bfloat16}
    assert counts.refused == {}


@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
def test_a_direction_is_kept_in_bf16_where_there_is_room(engine, gpu, monkeypatch):
    pytest.importorskip("transformers", reason="the model is of transformers")
    llama = TrainedLlama(2)
    num_bytes = sum(p.nbytes for p in llama.model.parameters())
    make = lambda: Direction.from_optimizer(llama.optimizer)
    monkeypatch.setattr(residence, "free_bytes", lambda device: 3 * num_bytes - 1)
    assert make().nbytes == 0
    monkeypatch.setattr(residence, "free_bytes", lambda device: 3 * num_bytes)
    with gpu.counted() as counts:
        kept = make()
    assert kept.nbytes == num_bytes
    assert {tensor.dtype for tensor in kept.tensors} == {torch.bfloat16}
    # One launch makes Δθ, and two its sums.
    assert counts.launches.total() == 3
    assert counts.refused == {}
    exact = Direction.from_optimizer(llama.optimizer, resident=True)
    assert {tensor.dtype for tensor in exact.tensors} == {torch.float32}
    assert kept.slope == pytest.approx(exact.slope, rel=1e-3)
    for mine, theirs in zip(kept.tensors, exact.tensors, strict=True):
        assert torch.equal(mine, theirs.bfloat16())
    losses, expected, counts = both(llama.model, llama.loss, make, engine, (0.0, 1e-3, 2e-3), gpu, monkeypatch)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert counts.refused == {}


def test_where_memory_lies_in_pieces_no_direction_is_kept(gpu, monkeypatch):
    llama = TrainedLlama(1)
    monkeypatch.setattr(residence, "free_bytes", lambda device: 2**40)

    def no_room(*_):
        raise torch.OutOfMemoryError("in pieces")

    monkeypatch.setattr(from_optimizer, "updates_of", no_room)
    assert Direction.from_optimizer(llama.optimizer).nbytes == 0
    with pytest.raises(torch.OutOfMemoryError):
        Direction.from_optimizer(llama.optimizer, resident=True)


def test_no_rank_keeps_a_direction_of_its_own(gpu, monkeypatch):
    monkeypatch.setattr(residence, "free_bytes", lambda device: 2**40)
    assert residence.may_keep(1, torch.device("cuda"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not residence.may_keep(1, torch.device("cuda"))


@pytest.mark.parametrize("engine", ["virtual", "inplace", "batched"])
def test_losses_of_a_language_model_whose_logits_are_deferred(engine, gpu, monkeypatch):
    pytest.importorskip("transformers", reason="the model is of transformers")
    monkeypatch.setattr(lm_head, "HEAD_THRESHOLD", 2**16)
    llama = TrainedLlama(2)
    losses, expected, counts = both(
        llama.model,
        llama.loss,
        lambda: Direction.from_optimizer(llama.optimizer, resident=False),
        engine,
        (0.0, 1e-3, 2e-3, 1e-3),
        gpu,
        monkeypatch,
    )
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[1] == losses[3]
    assert counts.refused == {}


def test_a_slope_and_a_norm_from_state(gpu, monkeypatch):
    llama = TrainedLlama(2)
    found = Direction.from_optimizer(llama.optimizer, resident=False)
    monkeypatch.setenv("SHARPKERN_BACKEND", "torch")
    expected = Direction.from_optimizer(llama.optimizer, resident=False)
    assert found.slope == pytest.approx(expected.slope, rel=1e-9)
    assert found.norm_sq == pytest.approx(expected.norm_sq, rel=1e-9)
