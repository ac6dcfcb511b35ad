"""Deferred logits where something else could have gone wrong: each guard, and what goes wrong without its cure."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern.engines.virtual import lm_head as tail
from sharpkern.engines.virtual.deferred_logits import Deferred, Head, _has_whole_rows
from sharpkern.engines.virtual.engine import VirtualEngine
from sharpkern.engines.virtual.lm_head import LMHead
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy
from tests.engines.test_tail import copied_before_the_write, smoothed, written_through_a_view
from tests.helpers import tails
from tests.helpers.models import GPT
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, engine_on, random_direction
from tests.helpers.tails import NEVER, PASSES, STEP_SIZES, Loss, Taken, closure_of, losses_of, undeferred_losses, wrong

taken = tails.taken

HEAD = nn.Linear(16, 200, bias=False)
STATES, LABELS = torch.randn(9, 16), torch.arange(9)

# -- guards, each with its cure taken away ----------------------------------------------------------------------------


def test_views_share_memory_and_copies_do_not(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    through_view, copies = (undeferred_losses(model, f) for f in (written_through_a_view, copied_before_the_write))

    with monkeypatch.context() as patch:
        patch.setattr(Deferred, "made", lambda self: self.make())
        assert wrong(losses_of(model, written_through_a_view), through_view), "the trap no longer springs"
    with monkeypatch.context() as patch:
        patch.setattr(LMHead, "_make", lambda *_: None)
        assert wrong(losses_of(model, copied_before_the_write), copies), "the trap no longer springs"


def test_what_was_made_is_used_from_then_on(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    chunked = LMHead._cross_entropy

    def forgetful(self: LMHead, input: Tensor, *args: Any, **options: Any) -> Any:
        if (logits := self._get(input)) is not None:
            logits.real = None
        return chunked(self, input, *args, **options)

    def scaled(z: Tensor, y: Tensor) -> Tensor:
        rows = z.flatten(0, 1)
        z.mul_(3)
        return F.cross_entropy(rows, y.flatten())

    right = undeferred_losses(model, scaled)
    assert losses_of(model, scaled) == right
    monkeypatch.setattr(LMHead, "_cross_entropy", forgetful)
    assert wrong(losses_of(model, scaled), right), "the trap no longer springs"


def scripted_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, labels)


@tails.BOTH
@pytest.mark.filterwarnings("ignore:.torch.jit.\\w+. is deprecated")
def test_reads_that_no_mode_sees_never_get_a_number(engine: str, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    scripted = torch.jit.script(scripted_cross_entropy)
    loss = lambda z, y: scripted(z.flatten(0, 1), y.flatten())
    right = undeferred_losses(model, loss, engine=engine)
    assert losses_of(model, loss, engine=engine) == right

    with monkeypatch.context() as patch:
        patch.setattr(LMHead, "enabled", property(lambda self: True, lambda self, value: None), raising=False)
        patch.setattr(VirtualEngine, "_deferral_works", property(lambda self: True, lambda *_: None), raising=False)
        assert all(value != value for value in losses_of(model, loss, engine=engine))
    with monkeypatch.context() as patch:
        # Without the NaN: zeros, and a loss like any other.
        patch.setattr(torch, "full", lambda shape, value, **options: torch.zeros(shape, **options))
        assert wrong(losses_of(model, loss, engine=engine), right), "the trap no longer springs"


def test_a_step_size_that_diverges_does_not_pass_for_a_placeholder(taken: Taken) -> None:
    model = GPT(dropout=0.0)
    loss_fn = closure_of(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))(model)
    calls: list[None] = []
    counted = lambda: (calls.append(None), loss_fn())[1]
    with engine_on("batched", model, counted, random_direction(model)) as (engine, _):
        *finite, diverged = engine.losses([0.01 * k for k in range(7)] + [1e30])
        assert math.isnan(diverged)
        assert all(map(math.isfinite, finite))
        assert engine._mode.tail.enabled
    assert len(calls) == len(taken) == 1


def test_placeholders_of_an_earlier_pass_are_no_numbers(taken: Taken) -> None:
    model = GPT()
    # Attributes of Python modules are not put back.
    kept = ModuleType("kept")

    def loss(z: Tensor, y: Tensor) -> Tensor:
        kept.first = getattr(kept, "first", z)
        return F.cross_entropy(kept.first.flatten(0, 1), y.flatten())

    first, *later = losses_of(model, loss)
    assert first == first
    assert all(value != value for value in later)


@tails.BOTH
def test_hidden_states_written_after_the_head(
    engine: str, taken: Taken, monkeypatch: pytest.MonkeyPatch, no_swapping: None
) -> None:
    """Writes that the mode sees make the logits first; others are noticed, and the measurement goes on in place."""

    class Careless(GPT):
        write: Any

        def forward(self, tokens_BT: Tensor) -> Tensor:
            self.norm.register_forward_hook(lambda module, args, out: hidden.append(out))
            hidden: list[Tensor] = []
            logits = super().forward(tokens_BT)
            self.write(hidden[0])
            return logits

    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    model = Careless(dropout=0.0)
    if engine == "virtual":
        # Under torch.func.vmap torch refuses this.
        model.write = lambda h: torch.mul(h, 2, out=h)
        assert losses_of(model, loss) == undeferred_losses(model, loss)
    model.write = lambda h: h[..., 0].zero_()
    seen = losses_of(model, loss, engine=engine)
    assert seen == undeferred_losses(model, loss, engine=engine)
    with monkeypatch.context() as patch:
        patch.setattr(LMHead, "before_write", lambda *_: None)
        with pytest.raises(sharpkern.EngineUnsupportedError, match="writes the hidden states after the language-model"):
            losses_of(model, loss, engine=engine)
        patch.setattr(Head, "check", lambda self: None)
        assert wrong(losses_of(model, loss, engine=engine), seen), "the trap no longer springs"

    model.write = lambda h: F.relu(h, inplace=True)
    for any_loss in (loss, smoothed):
        with pytest.raises(sharpkern.EngineUnsupportedError, match="writes the hidden states after the language-model"):
            losses_of(model, any_loss, engine=engine)
    with monkeypatch.context() as patch:
        patch.setattr(Head, "check", lambda self: None)
        right = undeferred_losses(model, loss, engine=engine)
        assert wrong(losses_of(model, loss, engine=engine), right), "the trap no longer springs"
    with pytest.warns(sharpkern.EngineFallbackWarning, match="writes the hidden states"):
        measured = sharpkern.critical_sharpness(model, closure_of(loss)(model), random_direction(model))
    assert measured.engine == "inplace"


# -- bookkeeping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True], ids=["recognised", "by name"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@tails.BOTH
def test_the_engine_knows_what_was_read_and_rounded(
    engine: str, by_name: bool, dtype: torch.dtype, taken: Taken
) -> None:
    model = nn.Linear(16, 200, bias=False, dtype=dtype)
    hidden, labels = torch.randn(9, 16, dtype=dtype), torch.arange(9).where(torch.arange(9) > 1, -100)

    def loss_fn() -> Tensor:
        if by_name:
            return linear_cross_entropy(hidden, model.weight, labels)
        return F.cross_entropy(model(hidden), labels)

    with engine_on(engine, model, loss_fn, random_direction(model)) as (opened, closure):
        opened.losses(STEP_SIZES)
        assert opened._mode.read == opened.rounded == {0}
        assert closure.precision.num_targets == 7
        assert closure.precision.unit_roundoff == (2.0**-8 if dtype == torch.bfloat16 else None)
        assert closure.precision.loss_dtype == torch.float32
    assert len(taken) == PASSES[engine]


class Prompt(nn.Module):
    """Its hidden states are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.states, self.head = nn.Parameter(torch.randn(9, 16)), nn.Linear(16, 200, bias=False)

    def forward(self, by_name: bool) -> Tensor:
        labels = torch.arange(9)
        if by_name:
            return linear_cross_entropy(self.states, self.head.weight, labels)
        return F.cross_entropy(self.head(self.states), labels)


# torch.func.vmap refuses linear_cross_entropy itself.
@pytest.mark.parametrize(("engine", "by_name"), [("virtual", False), ("virtual", True), ("batched", False)])
def test_hidden_states_that_move_themselves(engine: str, by_name: bool, taken: Taken) -> None:
    model, closure = Prompt(), lambda model: lambda: model(by_name)
    direction = random_direction(model)
    expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, closure(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert taken == []


@pytest.mark.parametrize("by_name", [False, True], ids=["recognised", "by name"])
@tails.BOTH
def test_autocast_rounds_both_factors_and_nothing_else(engine: str, by_name: bool, taken: Taken) -> None:
    direction = random_direction(HEAD)
    moved = (HEAD.weight - 0.1 * direction.tensors[0]).detach()
    exact = F.cross_entropy(STATES.bfloat16().double() @ moved.bfloat16().double().T, LABELS).item()

    def loss_fn() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            if by_name:
                return linear_cross_entropy(STATES, HEAD.weight, LABELS)
            logits = HEAD(STATES)
        return F.cross_entropy(logits, LABELS)

    assert engine_losses(engine, HEAD, loss_fn, direction, [0.1]) == pytest.approx([exact], rel=1e-6)
    assert taken


@tails.BOTH
def test_masters_are_what_rows_are_formed_from(engine: str, taken: Taken) -> None:
    """Steps that bf16 weights would swallow."""
    model = nn.Linear(16, 200, bias=False)
    masters = {model.weight: model.weight.detach().clone()}
    model.bfloat16()
    hidden, labels = torch.randn(64, 16, dtype=torch.bfloat16), torch.randint(200, (64,))
    loss_fn = lambda: F.cross_entropy(model(hidden), labels)
    loss_fn().backward()
    direction = sharpkern.Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=1.0), masters=masters)
    delta = model.weight.grad.float()
    moved = (masters[model.weight] - 0.5 * delta).bfloat16()
    exact = F.cross_entropy((hidden.double() @ moved.double().T), labels).item()
    (loss,) = engine_losses(engine, model, loss_fn, direction, [0.5])
    assert loss == pytest.approx(exact, rel=1e-6)
    assert taken


# -- what is left alone ------------------------------------------------------------------------------------------------


def failing(model: nn.Module, loss: Loss) -> str:
    with pytest.raises((ValueError, RuntimeError, IndexError)) as caught:
        losses_of(model, loss)
    return f"{caught.type} {caught.value}"


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten().int()),
        lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()[1:]),
        lambda z, y: F.cross_entropy(z, y[:, 0]),
        lambda z, y: F.cross_entropy(z.view(-1, 100), y.flatten()),
        lambda z, y: F.cross_entropy(z[:, 30], y[:, 0]),
        lambda z, y: F.cross_entropy(z[:, 1:].view(-1, 128), y[:, 1:].flatten()),
    ],
    ids=["int32", "too few", "two dimensions", "width", "index", "view"],
)
def test_mistakes_get_the_errors_that_they_got(loss: Loss, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    deferred = failing(model, loss)
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", NEVER)
    assert deferred == failing(model, loss)
    assert taken == []


class Labelled(Tensor):
    """A subclass of the kind that libraries make."""


@torch.inference_mode()
def in_inference_mode() -> Tensor:
    return F.cross_entropy(HEAD(STATES * 1), LABELS).clone()


def vmapped() -> Tensor:
    return torch.func.vmap(lambda states: HEAD(states.unsqueeze(0)).logsumexp(-1).mean())(STATES).mean()


def sparse() -> Tensor:
    return F.cross_entropy(HEAD(STATES.relu().to_sparse()), LABELS)


def of_a_subclass() -> Tensor:
    logits = HEAD(STATES.as_subclass(Labelled))
    assert type(logits) is Labelled
    return F.cross_entropy(logits, LABELS).as_subclass(Tensor)


def differentiated_by_its_inputs() -> Tensor:
    with torch.enable_grad():
        x = STATES.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(HEAD(x), LABELS), x)
    return slope.square().sum()


@pytest.mark.parametrize(
    "loss_fn",
    [in_inference_mode, vmapped, sparse, of_a_subclass, differentiated_by_its_inputs],
    ids=lambda f: f.__name__,
)
def test_tensors_that_are_not_plain_are_left_alone(
    loss_fn: LossFn, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = lambda: engine_losses("virtual", HEAD, loss_fn, random_direction(HEAD), STEP_SIZES)
    got = losses()
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", NEVER)
    assert got == losses()
    assert len(set(got)) == len(STEP_SIZES)
    assert taken == []


@pytest.mark.parametrize(
    "states", [STATES[:, :7], STATES.double(), STATES.to("meta"), STATES[0, 0]], ids=["width", "dtype", "device", "0-d"]
)
def test_mistaken_states_get_the_errors_that_they_got(
    states: Tensor, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error() -> str:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            engine_losses("virtual", HEAD, lambda: F.cross_entropy(HEAD(states), LABELS), random_direction(HEAD), [0.1])
        return str(caught.value)

    deferred = error()
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", NEVER)
    assert deferred == error()


def test_a_single_token(taken: Taken) -> None:
    direction = random_direction(HEAD)
    flat = lambda: F.cross_entropy(HEAD(STATES[3]).unsqueeze(0), LABELS[3:4])
    usual = lambda: F.cross_entropy(HEAD(STATES[3:4]), LABELS[3:4])
    losses = [engine_losses("virtual", HEAD, loss_fn, direction, STEP_SIZES) for loss_fn in (flat, usual)]
    assert losses[0] == losses[1]
    assert len(taken) == 2 * len(STEP_SIZES)


def test_dimensions_of_the_vocabulary_s_size() -> None:
    """Whole rows are told by strides, not by sizes."""
    layout = torch.empty(4, 4, 4, device="meta")
    whole = [layout, layout[1:], layout.transpose(0, 1), layout[:, 2], layout.view(16, 4)[::3], layout.unsqueeze(1)]
    others = [layout[..., 0], layout.mT, layout.diagonal(dim1=1, dim2=2), layout.view(-1)[2:6], layout[..., 1:]]
    assert all(_has_whole_rows(view, 4) for view in whole)
    assert not any(_has_whole_rows(view, 4) for view in others)
