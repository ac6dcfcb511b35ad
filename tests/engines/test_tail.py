"""The tail of a causal language model: the calls that leave logits deferred, and those that make them."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern.engines.batched.engine import NUM_PARALLEL
from sharpkern.engines.evaluation.precision import LossPrecision
from sharpkern.engines.virtual import lm_head as tail
from sharpkern.engines.virtual.deferred_logits import Head
from sharpkern.engines.virtual.lm_head import LMHead
from sharpkern.memory.counter import peak_bytes
from tests.helpers import tails
from tests.helpers.cases import TORCH_CASES, TRANSFORMERS_CASES, tokens
from tests.helpers.models import GPT
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, random_direction
from tests.helpers.tails import (
    NEVER,
    PASSES,
    STEP_SIZES,
    Loss,
    Taken,
    closure_of,
    exact_losses,
    losses_of,
    undeferred_losses,
)

taken = tails.taken


# -- what people run --------------------------------------------------------------------------------------------------

CAUSAL = {case.name: case for case in TORCH_CASES + TRANSFORMERS_CASES}


@tails.BOTH
@pytest.mark.parametrize("name", ["gpt", "llama", "olmo2", "qwen3", "gpt2", "gemma2"])
def test_losses_equal_those_of_deep_copies(name: str, engine: str, taken: Taken) -> None:
    case = CAUSAL[name]
    model = case.build()
    direction = random_direction(model)
    expected = deep_copy_losses(model, case.closure, direction, STEP_SIZES)
    assert engine_losses(engine, model, case.closure(model), direction, STEP_SIZES) == pytest.approx(
        expected, rel=1e-6, abs=0
    )
    softcap = 2.0 if name == "gemma2" else None
    assert [call["softcap"] for call in taken] == [softcap] * PASSES[engine], "the base pass goes the same way"


@pytest.mark.parametrize("name", ["gpt", "llama"])
def test_small_heads_go_the_usual_way_bit_for_bit(name: str, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert tail.HEAD_THRESHOLD == 2**28
    case = CAUSAL[name]
    model = case.build()
    losses = [
        engine_losses("virtual", model, case.closure(model), random_direction(model), STEP_SIZES) for _ in range(2)
    ]
    monkeypatch.setattr(LMHead, "defer", lambda *_: None)
    assert losses == [
        engine_losses("virtual", model, case.closure(model), random_direction(model), STEP_SIZES) for _ in range(2)
    ]
    assert taken == []


@pytest.mark.parametrize(("engine", "at_once"), [("virtual", 1), ("batched", NUM_PARALLEL)])
def test_the_threshold_counts_float32_logits_and_the_formed_head(
    engine: str, at_once: int, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many step sizes as the engine takes at a time, if not in this pass."""
    model = GPT().bfloat16()
    size = at_once * (4 * 24 * 128 * 4 + 128 * 32 * 2)
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", size)
    losses_of(model, loss, engine=engine)
    assert taken == []
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", size - 1)
    losses_of(model, loss, engine=engine)
    assert len(taken) == PASSES[engine]


@tails.BOTH
def test_a_direction_that_is_worked_out_of_the_optimizer_s_state(engine: str, taken: Taken) -> None:
    model = GPT(dropout=0.0)
    loss_fn = closure_of(shifted)(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        loss_fn().backward()
    resident, worked_out = (
        sharpkern.Direction.from_optimizer(optimizer, resident=resident) for resident in (True, False)
    )
    expected = deep_copy_losses(model, closure_of(shifted), resident, STEP_SIZES)
    assert engine_losses(engine, model, loss_fn, worked_out, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert len(taken) == PASSES[engine]


@pytest.mark.parametrize(
    ("rows", "width", "deferred"), [(30_000, 8192, True), (29_568, 8192, False), (4096, 512, True), (4095, 512, False)]
)
def test_wide_layers_of_an_mlp_are_not_taken_for_heads(
    rows: int, width: int, deferred: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", 0)
    # Their memory is not touched.
    hidden, weight = torch.empty(1, 2, width), torch.empty(rows, width)
    with torch.no_grad():
        logits = LMHead(LossPrecision()).defer(hidden, weight, lambda dtype: None, lambda: None)
    assert (logits is not None) == deferred


@tails.BOTH
def test_a_whole_measurement(engine: str, taken: Taken) -> None:
    model = GPT(dropout=0.0)
    loss_fn = closure_of(lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()))(model)
    loss_fn().backward()
    direction = sharpkern.Direction.from_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3))
    measured = sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine)
    assert (measured.engine, measured.status) == (engine, "converged")
    assert len(taken) >= 3
    written = sharpkern.critical_sharpness(model, loss_fn, direction, engine="inplace")
    assert measured.critical_lr == pytest.approx(written.critical_lr, rel=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@tails.BOTH
def test_on_a_gpu(engine: str, dtype: torch.dtype, taken: Taken) -> None:
    loss = lambda z, y: F.cross_entropy(z.float().flatten(0, 1), y.flatten())
    model = GPT(dropout=0.0).to("cuda", dtype)
    expected = exact_losses(model, loss)
    losses = losses_of(model, loss, engine=engine)
    assert losses == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 3e-3)
    assert len(taken) == PASSES[engine]


# -- calls that leave logits deferred ---------------------------------------------------------------------------------

shifted: Loss = lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, z.size(-1)), y[:, 1:].reshape(-1))


def hugging_face_gpt2(z: Tensor, y: Tensor) -> Tensor:
    shift = z[..., :-1, :].contiguous()
    return nn.CrossEntropyLoss()(shift.view(-1, shift.size(-1)), y[..., 1:].contiguous().view(-1))


def summed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.float().view(-1, z.shape[-1]), y.view(-1), reduction="sum") / 96


def ignoring(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.where(y % 3 > 0, -1).flatten(), ignore_index=-1)


def capped(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((2 * torch.tanh(z / 2)).flatten(0, 1), y.flatten())


def capped_later(z: Tensor, y: Tensor) -> Tensor:
    z = z[:, 1:].reshape(-1, 128).div(2.0).float().tanh().mul(2.0)
    return F.cross_entropy(z, y[:, 1:].flatten())


def by_keyword(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(target=y.flatten(), input=z.flatten(end_dim=1))


def every_other_token(z: Tensor, y: Tensor) -> Tensor:
    """A copy of rows that lie apart."""
    return F.cross_entropy(z.view(-1, 128)[::2].clone(), y.flatten()[::2])


def one_sequence(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[2, 3:].unsqueeze(0).squeeze(0).to(torch.float32), y[2, 3:])


def turned(z: Tensor, y: Tensor) -> Tensor:
    assert z.transpose(0, 1).stride() == (128, 24 * 128, 1)
    assert not z.transpose(0, 1).is_contiguous()
    return F.cross_entropy(z.transpose(0, 1).reshape(96, -1), y.t().flatten())


def refolded(z: Tensor, y: Tensor) -> Tensor:
    z = z.view(2, 48, -1).unflatten(1, (6, 8)).detach()
    assert (z.shape, z.dtype, z.ndim, z.numel(), len(z)) == ((2, 6, 8, 128), torch.float32, 4, 96 * 128, 2)
    return F.cross_entropy(z.reshape(-1, 128), y.flatten())


LEFT_DEFERRED = [
    shifted,
    hugging_face_gpt2,
    summed,
    ignoring,
    capped,
    capped_later,
    by_keyword,
    every_other_token,
    one_sequence,
    turned,
    refolded,
]


@tails.BOTH
@pytest.mark.parametrize("loss", LEFT_DEFERRED, ids=lambda f: f.__name__)
def test_logits_stay_deferred(loss: Loss, engine: str, taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT()
    expected = exact_losses(model, loss)
    monkeypatch.setattr(Head, "logits", None)
    assert losses_of(model, loss, engine=engine) == pytest.approx(expected, rel=1e-6, abs=0)
    assert len(taken) == PASSES[engine]


@tails.BOTH
def test_bfloat16_and_autocast(engine: str, taken: Taken) -> None:
    """Logits are not rounded to 16 bits on the way, as they are usually."""
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    for dtype, context in ((torch.float32, torch.autocast("cpu", torch.bfloat16)), (torch.bfloat16, nullcontext())):
        model = GPT(dropout=0.0).to(dtype)
        with context:
            usual, chunked = undeferred_losses(model, loss, engine=engine), losses_of(model, loss, engine=engine)
        assert chunked == pytest.approx(usual, rel=2e-3, abs=0)
        assert chunked != usual
    assert len(taken) == 2 * PASSES[engine]


# -- calls that make them ---------------------------------------------------------------------------------------------


def smoothed(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), label_smoothing=0.1)


def weighted(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=torch.linspace(0, 1, 128))


def each_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").mean()


def old_arguments(z: Tensor, y: Tensor) -> Tensor:
    with pytest.warns(UserWarning, match="size_average and reduce"):
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduce=False).sum()


def vocabulary_second(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.transpose(1, 2), y)


def probabilities(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), F.one_hot(y.flatten(), 128).float())


def by_hand(z: Tensor, y: Tensor) -> Tensor:
    return F.nll_loss(z.float().log_softmax(-1).flatten(0, 1), y.flatten())


def accuracy_first(z: Tensor, y: Tensor) -> Tensor:
    right = (z.argmax(-1) == y).float().mean()
    return F.cross_entropy(z.flatten(0, 1), y.flatten()) + right


def z_loss_first(z: Tensor, y: Tensor) -> Tensor:
    return z.logsumexp(-1).square().mean() + F.cross_entropy(z.flatten(0, 1), y.flatten())


def temperature(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((z / 2).flatten(0, 1), y.flatten())


def half_a_cap(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((torch.tanh(z / 2) * 3).flatten(0, 1), y.flatten())


def part_of_the_vocabulary(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[..., :100].flatten(0, 1), y.flatten() % 100)


def negative_cap(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy((-2 * torch.tanh(z / -2)).flatten(0, 1), y.flatten())


def floored(z: Tensor, y: Tensor) -> Tensor:
    z = 2 * torch.div(z, 2, rounding_mode="floor").tanh()
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


def turned_copy(z: Tensor, y: Tensor) -> Tensor:
    """The copy lies in memory as it did, and its rows not in the order of its tokens."""
    copy = z.transpose(0, 1).clone()
    assert not copy.is_contiguous()
    return F.cross_entropy(copy.reshape(96, -1), y.t().flatten())


def channels_last(z: Tensor, y: Tensor) -> Tensor:
    z = z.view(2, 2, 24, 128).to(memory_format=torch.channels_last)
    return F.cross_entropy(z.reshape(96, -1), y.flatten())


def integers(z: Tensor, y: Tensor) -> Tensor:
    return z.to(torch.int32).float().std()


def masked(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[y > 5], y[y > 5])


def picked(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z[[2, 0]].flatten(0, 1), y[[2, 0]].flatten()) + z[[True, False] * 2].mean()


def other_bits(z: Tensor, y: Tensor) -> Tensor:
    return z.view(torch.int32).double().abs().mean() * 1e-9


def in_float64(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.double().flatten(0, 1), y.flatten())


def written(z: Tensor, y: Tensor) -> Tensor:
    """Padding entries of the vocabulary are masked in place."""
    z[..., 120:] = -torch.inf
    return F.cross_entropy(z.flatten(0, 1), (y % 120).flatten())


def written_through_a_view(z: Tensor, y: Tensor) -> Tensor:
    before = z.view(-1, 128)
    z.view(4, -1)[:, :64].mul_(3)
    return F.cross_entropy(before, y.flatten()) + F.cross_entropy(z.flatten(0, 1), y.flatten())


def copied_before_the_write(z: Tensor, y: Tensor) -> Tensor:
    copies = z.clone().flatten(0, 1), z.bfloat16(), z / 2
    z.zero_()
    return F.cross_entropy(copies[0], y.flatten()) + copies[1].float().std() + copies[2].std()


def looked_at(z: Tensor, y: Tensor) -> Tensor:
    return torch.stack(list(z[0, :, 1])).sum() + sum(float(row) for row in z[1, 2])


MADE = [
    smoothed,
    weighted,
    each_token,
    old_arguments,
    vocabulary_second,
    probabilities,
    by_hand,
    accuracy_first,
    z_loss_first,
    temperature,
    half_a_cap,
    negative_cap,
    floored,
    turned_copy,
    channels_last,
    integers,
    part_of_the_vocabulary,
    masked,
    picked,
    other_bits,
    in_float64,
    written,
    written_through_a_view,
    copied_before_the_write,
    looked_at,
]


# Python numbers of each step size's own; a memory format for tensors of four dimensions.
NOT_BATCHED = (looked_at, channels_last)


@pytest.mark.parametrize(
    ("engine", "loss"),
    [(engine, loss) for engine in PASSES for loss in MADE if engine == "virtual" or loss not in NOT_BATCHED],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_anything_else_gives_the_bits_that_it_gave(engine: str, loss: Loss, taken: Taken) -> None:
    model = GPT()
    usual = undeferred_losses(model, loss, engine=engine)
    assert losses_of(model, loss, engine=engine) == usual
    assert usual == pytest.approx(exact_losses(model, loss), rel=1e-5, abs=0)
    assert taken == []


@tails.BOTH
def test_a_head_with_a_bias_is_left_alone(engine: str, taken: Taken) -> None:
    model = GPT()
    model.head.bias = nn.Parameter(torch.randn(128))
    loss = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten())
    assert losses_of(model, loss, engine=engine) == undeferred_losses(model, loss, engine=engine)
    assert taken == []


@tails.BOTH
def test_logits_used_again_after_the_loss(engine: str, taken: Taken) -> None:
    model = GPT()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        first = F.cross_entropy(z.flatten(0, 1), y.flatten())
        assert z.to("meta").device.type == "meta"
        return first + z.logsumexp(-1).mean()

    expected = undeferred_losses(model, loss, engine=engine)
    assert losses_of(model, loss, engine=engine) == pytest.approx(expected, rel=1e-6)
    assert len(taken) == PASSES[engine]


def test_logits_are_made_in_the_surroundings_of_the_head(taken: Taken, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its autocast, and without a graph."""
    model = GPT()

    def closure(model: nn.Module) -> LossFn:
        x = tokens()

        def loss_fn() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(x)
            with torch.enable_grad():
                assert not logits.exp().requires_grad
                assert logits.exp().dtype == torch.bfloat16
            return logits.float().square().mean()

        return loss_fn

    losses = lambda: engine_losses("virtual", model, closure(model), random_direction(model), STEP_SIZES)
    made = losses()
    monkeypatch.setattr(tail, "_autocast_now", lambda device: nullcontext)
    with pytest.raises(AssertionError):
        losses()
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", NEVER)
    assert made == losses()


# -- memory -----------------------------------------------------------------------------------------------------------


def peak(vocabulary: int, loss: Loss, threshold: int, monkeypatch: pytest.MonkeyPatch, num_steps: int = 1) -> int:
    """Bytes of one pass at some step sizes, of a GPT with 256 tokens."""
    monkeypatch.setattr(tail, "HEAD_THRESHOLD", threshold)
    model = GPT(vocabulary=vocabulary, width=64, layers=1, context=64, dropout=0.0)
    x = torch.randint(vocabulary, (4, 64))
    direction = random_direction(model)
    engine = "virtual" if num_steps == 1 else "batched"
    step_sizes = [0.1 * step for step in range(1, num_steps + 1)]
    return peak_bytes(lambda: engine_losses(engine, model, lambda: loss(model(x), x), direction, step_sizes))


def test_neither_logits_nor_the_formed_head_ever_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = lambda z, y: F.cross_entropy(z.view(-1, z.size(-1)), y.view(-1))
    # A chunk of logits, a chunk of the head; its other 4096 rows take turns in the same memory.
    chunks = 4096 * (256 + 64) * 4
    peaks = {vocabulary: peak(vocabulary, loss, 0, monkeypatch) for vocabulary in (8192, 30_000)}
    assert chunks <= peaks[8192] < 1.2 * chunks
    assert peaks[30_000] == peaks[8192]
    assert peak(30_000, loss, NEVER, monkeypatch) > 30_000 * (256 * 2 + 64) * 4


def test_eight_step_sizes_share_the_memory_of_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = lambda z, y: F.cross_entropy(z.view(-1, z.size(-1)), y.view(-1))
    deferred = {vocabulary: peak(vocabulary, loss, 0, monkeypatch, num_steps=8) for vocabulary in (8192, 30_000)}
    logits = 8 * 30_000 * 256 * 4
    assert deferred[30_000] == deferred[8192] < logits / 8
    assert peak(30_000, loss, NEVER, monkeypatch, num_steps=8) > logits


@pytest.mark.parametrize("loss", [smoothed, by_hand], ids=lambda f: f.__name__)
def test_logits_that_are_made_take_no_more_than_ever(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = 256 * 64 * 4
    assert peak(8192, loss, 0, monkeypatch) <= peak(8192, loss, NEVER, monkeypatch) + 2 * hidden
