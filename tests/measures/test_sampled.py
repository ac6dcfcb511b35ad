"""λ_c of a step of many micro-batches from a sample of them: the whole batch's, at less cost, and without a trace."""

import math
import random
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern
from sharpkern import Direction, MicroBatch, SampleWarning, critical_sharpness
from sharpkern.tensors.random_state import stream_states

NUM = 24


class Loop:
    """A classifier in training by momentum, a step being made of many micro-batches."""

    def __init__(
        self, *, dropout: float = 0.0, norm: bool = False, num: int = NUM, rows: int = 16, max_norm: float | None = None
    ):
        torch.manual_seed(0)
        middle = nn.BatchNorm1d(24) if norm else nn.Identity()
        self.model = nn.Sequential(nn.Linear(12, 24), middle, nn.GELU(), nn.Dropout(dropout), nn.Linear(24, 5))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.num, self.rows, self.max_norm = num, rows, max_norm
        self.generator = torch.Generator().manual_seed(1)
        self.norm_before: Tensor | None = None

    def loss(self, x: Tensor, y: Tensor, k: int) -> Tensor:
        return F.cross_entropy(self.model(x[k]), y[k])

    def step(self, weights: list[float] | None = None) -> list[MicroBatch]:
        """Everything of a step but the optimizer's own."""
        self.optimizer.zero_grad()
        parts = []
        x = torch.randn(self.num, self.rows, 12, generator=self.generator)
        y = (2 * x[..., 0] + x[..., 1] + 0.3 * torch.randn(self.num, self.rows, generator=self.generator)).long() % 5
        for k in range(self.num):
            parts.append(MicroBatch(partial(self.loss, x, y, k)))
            share = 1 / self.num if weights is None else weights[k] / sum(weights)
            (parts[-1]() * share).backward()
        if self.max_norm is not None:
            self.norm_before = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        return parts

    def train(self, num_steps: int) -> list[MicroBatch]:
        """Train, up to a step that is yet to be taken."""
        for _ in range(num_steps):
            self.step()
            self.optimizer.step()
        return self.step()

    @property
    def direction(self) -> Direction:
        return Direction.from_optimizer(self.optimizer)

    def whole(self, parts: list[Any], **options: Any) -> sharpkern.Measurement:
        return critical_sharpness(self.model, parts, self.direction, rtol=1e-3, **options)


def off(m: sharpkern.Measurement, truth: sharpkern.Measurement) -> float:
    return abs(math.log(m.critical_lr / truth.critical_lr))


def test_several_closures_are_their_mean() -> None:
    loop = Loop(num=6)
    weights = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    parts = loop.step(weights)
    mean = lambda: sum(w * part.loss_fn() for w, part in zip(weights, parts, strict=True)) / sum(weights)
    expected = critical_sharpness(loop.model, mean, loop.direction)
    for several, given in (
        (parts, weights),
        ([part.loss_fn for part in parts], weights),
        (list(zip(parts, weights, strict=True)), None),
    ):
        m = critical_sharpness(loop.model, several, loop.direction, weights=given)
        assert m.critical_lr == pytest.approx(expected.critical_lr, rel=1e-4)
        assert m.base_loss == pytest.approx(expected.base_loss, rel=1e-6)
        assert (m.sample_size, m.beta, m.forwards) == (None, None, pytest.approx(expected.forwards, abs=1))


@pytest.mark.parametrize("engine", ["auto", "virtual", "inplace", "batched"])
def test_a_sample_gives_the_whole_batch_s_answer_on_every_engine(engine: str) -> None:
    loop = Loop()
    parts = loop.train(30)
    truth = loop.whole(parts)
    m = critical_sharpness(loop.model, parts, loop.direction, sample="auto", engine=engine)
    assert m.status == "converged"
    assert off(m, truth) <= m.error <= 0.05
    assert m.engine == {"auto": "virtual"}.get(engine, engine)
    assert m.num_micro_batches == NUM
    assert m.base_loss == pytest.approx(truth.base_loss, rel=1e-6)
    assert m.forwards < truth.forwards
    few = critical_sharpness(loop.model, parts, loop.direction, sample=8, engine=engine)
    assert (few.sample_size, off(few, truth) <= few.error) == (8, True)
    assert few.beta is not None


def test_a_monitor_with_losses_known_takes_few_forwards_and_its_errors_hold() -> None:
    loop = Loop()
    monitor = sharpkern.Monitor(loop.model, loop.optimizer, sample="auto")
    trend = sharpkern.Monitor(loop.model, loop.optimizer, sample=8, rtol=0.2)
    found = []
    for step in range(16):
        parts = loop.step()
        if step % 2 == 0:
            truth = loop.whole(parts, initial_lr=found[-1][0].critical_lr if found else None)
            monitor.step = trend.step = step
            found.append((monitor(parts), trend(parts), truth))
        loop.optimizer.step()
    late = found[3:]
    assert sum(m.forwards for m, _, _ in late) / len(late) < 1.8
    assert sum(m.forwards for _, m, _ in late) / len(late) < 1.5
    assert sum(off(m, truth) <= m.error for m, _, truth in found) >= len(found) - 1
    assert sum(off(m, truth) <= m.error for _, m, truth in found) >= len(found) - 1
    # Each measurement draws anew, and a loop that is taken up draws what it would have drawn.
    again = sharpkern.Monitor(loop.model, loop.optimizer, sample=8)
    sharp = []
    for step in (3, 4, 3):
        again.load_state_dict(trend.state_dict() | {"step": step})
        sharp.append(again(parts := parts).sharpness)
    assert sharp[0] == sharp[2] != sharp[1]


def test_losses_of_training_are_used_or_not_needed() -> None:
    loop = Loop()
    parts = loop.train(30)
    closures = [part.loss_fn for part in parts]
    losses = [float(part.loss) for part in parts]
    kinds = {"tensors": [part.loss for part in parts], "floats": losses, "one tensor": torch.tensor(losses)}
    found = {
        name: critical_sharpness(loop.model, closures, loop.direction, sample=8, base_loss=given)
        for name, given in kinds.items()
    }
    found["none"] = critical_sharpness(loop.model, closures, loop.direction, sample=8)
    truth = loop.whole(parts)
    assert all(off(m, truth) <= 1.2 * m.error for m in found.values())
    assert found["floats"].base_loss == pytest.approx(truth.base_loss, rel=1e-6)
    # Of a sample alone.
    assert found["none"].base_loss == pytest.approx(truth.base_loss, rel=0.2)


def test_losses_of_another_scale_are_told() -> None:
    loop = Loop()
    monitor = sharpkern.Monitor(loop.model, loop.optimizer, sample=8)

    def measured_step() -> None:
        parts = loop.step()
        m = monitor([part.loss_fn for part in parts], loss=[part.loss / NUM for part in parts])
        assert m.base_loss == pytest.approx(float(torch.stack([p.loss for p in parts]).mean()), rel=0.3)
        loop.optimizer.step()

    measured_step()
    measured_step()
    with pytest.warns(sharpkern.SlopeMismatchWarning, match="1/24 of what loss_fn returns"):
        measured_step()


def test_weights_are_those_of_the_gradient() -> None:
    loop = Loop()
    loop.train(20)
    weights = [1.0 + 3 * (k % 4) for k in range(NUM)]
    parts = loop.step(weights)
    truth = loop.whole(parts, weights=weights)
    m = critical_sharpness(loop.model, parts, loop.direction, sample="auto", weights=weights)
    assert off(m, truth) <= m.error


def test_masks_are_those_of_training() -> None:
    loop = Loop(dropout=0.3)
    parts = loop.train(20)
    truth = loop.whole(parts)
    # Without other masks the loss that was trained is the one that is measured.
    assert truth.base_loss == pytest.approx(float(torch.stack([part.loss for part in parts]).mean()), rel=1e-6)
    m = critical_sharpness(loop.model, parts, loop.direction, sample="auto")
    assert (m.sample_size is not None, off(m, truth) <= m.error) == (True, True)
    with pytest.warns(SampleWarning, match=r"wrap each closure in sharpkern\.MicroBatch"):
        m = critical_sharpness(loop.model, [part.loss_fn for part in parts], loop.direction, sample="auto")
    assert m.sample_size is None


def test_clipping_is_divided_out_or_seen() -> None:
    loop = Loop(max_norm=0.05)
    parts = loop.train(20)
    truth = loop.whole(parts)
    coefficient = 0.05 / (float(loop.norm_before) + 1e-6)
    assert coefficient < 0.5
    for clip in (coefficient, (loop.norm_before, 0.05), torch.tensor(coefficient)):
        m = critical_sharpness(loop.model, parts, loop.direction, sample="auto", clip=clip)
        assert m.sample_size is not None
        assert off(m, truth) <= m.error
        assert m.slope == pytest.approx(loop.direction.slope / coefficient, rel=1e-5)
    with pytest.warns(SampleWarning, match=r"norm is a round number, .* pass clip="):
        m = critical_sharpness(loop.model, parts, loop.direction, sample="auto")
    assert (m.sample_size, off(m, truth) < 0.05) == (None, True)


def test_clipping_that_leaves_no_norm_is_seen_by_the_slopes() -> None:
    loop = Loop(rows=128)
    parts = loop.step()
    for parameter in loop.model.parameters():
        parameter.grad.mul_(0.3)
    direction = Direction.from_gradients(loop.model)
    truth = critical_sharpness(loop.model, parts, direction, rtol=1e-3)
    with pytest.warns(SampleWarning, match="standard errors below that of the sample"):
        m = critical_sharpness(loop.model, parts, direction, sample=12)
    assert (m.sample_size, off(m, truth) <= m.error) == (None, True)


def test_batch_norm_is_sampled_where_micro_batches_were_trained_one_by_one() -> None:
    loop = Loop(norm=True)
    parts = loop.train(10)
    m = critical_sharpness(loop.model, parts, loop.direction, sample="auto")
    assert (m.sample_size is not None, off(m, loop.whole(parts)) <= m.error) == (True, True)
    with pytest.warns(SampleWarning, match="BatchNorm in train mode"):
        m = critical_sharpness(loop.model, [part.loss_fn for part in parts], loop.direction, sample="auto")
    assert m.sample_size is None


def test_few_micro_batches_are_all_measured() -> None:
    loop = Loop(num=8)
    parts = loop.step()
    m = critical_sharpness(loop.model, parts, loop.direction, sample="auto")
    assert (m.sample_size, m.status) == (None, "converged")


def state_of(loop: Loop) -> list[Any]:
    tensors = [*loop.model.state_dict().values(), *(p.grad for p in loop.model.parameters())]
    tensors += [value["momentum_buffer"] for value in loop.optimizer.state.values()]
    return [[t.clone() for t in tensors], stream_states([torch.device("cpu")])]


def same(a: list[Any], b: list[Any]) -> bool:
    return all(map(torch.equal, a[0], b[0])) and a[1] == b[1]


@pytest.mark.parametrize("engine", ["auto", "virtual", "inplace"])
@pytest.mark.parametrize("stop_at", [None, 0, 5, 40])
def test_nothing_of_the_run_changes(engine: str, stop_at: int | None) -> None:
    loop = Loop(dropout=0.2, norm=True)
    parts = loop.train(3)
    calls = 0

    def interrupted(part: Callable[[], Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls - 1 == stop_at:
            raise KeyboardInterrupt
        return part()

    for part in parts:
        part.loss_fn = partial(interrupted, part.loss_fn)
    before, weights = state_of(loop), [p.data_ptr() for p in loop.model.parameters()]
    measure = partial(critical_sharpness, loop.model, parts, loop.direction, sample="auto", engine=engine)
    if stop_at is None:
        assert measure().sample_size is not None
    else:
        with pytest.raises(KeyboardInterrupt):
            measure()
    assert same(before, state_of(loop))
    assert weights == [p.data_ptr() for p in loop.model.parameters()]


def test_weights_are_formed_once_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    from sharpkern.engines.tracked import Step

    loop = Loop()
    parts = loop.train(5)
    formed, form = [], Step.form
    monkeypatch.setattr(Step, "form", lambda self, *args, **kwargs: formed.append(self) or form(self, *args, **kwargs))
    m = critical_sharpness(loop.model, parts, loop.direction, sample=8)
    step_sizes = {eta for eta, _ in m.probes}
    # Two more for the slopes, and none for each member.
    assert len(formed) <= (len(step_sizes) + 3) * len(list(loop.model.parameters()))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"sample": "some"}, "sample must be 'auto', a share or a number"),
        ({}, {"sample": True}, "sample must be 'auto', a share or a number"),
        ({}, {"sample": 2}, "at least 4 micro-batches, got 2"),
        ({}, {"sample": 1.5}, r"a share in \(0, 1\], got 1.5"),
        ({}, {"sample": "auto", "certify": True}, "sample cannot be combined with certify="),
        ({}, {"sample": "auto", "method": "bisection"}, "sample cannot be combined with method="),
        ({}, {"sample": "auto", "reduce": lambda loss: loss}, "sample cannot be combined with reduce="),
        ({}, {"weights": [1.0]}, "weights must be 24 positive finite numbers"),
        ({}, {"weights": [0.0] * NUM}, "weights must be 24 positive finite numbers"),
        ({}, {"weights": "a" * NUM}, "weights must be 24 positive finite numbers"),
        ({}, {"weights": (1 for _ in range(NUM))}, "weights must be 24 positive finite numbers"),
        ({}, {"base_loss": [1.0]}, r"base_loss must be one number, or one for each of 24 closures, got \[1.0\]"),
        ({}, {"base_loss": [None] * NUM}, r"base_loss must be one number, or one for each of 24 closures, got \[None"),
        ({}, {"clip": 1.5}, r"what the gradient was multiplied by, in \(0, 1\], got 1.5"),
        ({}, {"clip": "norm"}, r"clip must be a number or the pair \(norm before clipping, max_norm\)"),
        ({"loss_fn": []}, {}, "loss_fn must be a closure, or a sequence of closures"),
        ({"loss_fn": [1, 2]}, {}, r"loss_fn must be a closure, or a sequence .* got \['int', 'int'\]"),
        ({"loss_fn": lambda: None}, {"sample": "auto"}, r"sharpkern\.split\(batch, 16\)"),
        ({"slope": None}, {"sample": "auto"}, "direction must know its slope for a sample"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    from dataclasses import replace

    loop = Loop()
    loss_fn = change.get("loss_fn", loop.step())
    loop.step()
    direction = replace(loop.direction, slope=None) if "slope" in change else loop.direction
    with pytest.raises((TypeError, ValueError), match=message):
        critical_sharpness(loop.model, loss_fn, direction, **options)


def test_tasks_have_no_slope_to_sample_by() -> None:
    loop = Loop(num=2)
    parts = loop.step()
    tasks = {"one": parts[0], "two": parts[1]}
    with pytest.raises(ValueError, match="sample needs the slope"):
        sharpkern.relative_critical_sharpness(loop.model, tasks, loop.direction, sample="auto")


def test_a_micro_batch_repeats_what_training_drew() -> None:
    model = nn.Linear(1, 1)
    square = lambda: model.weight.square().sum() + model.bias.square().sum()
    square().backward()
    mask = lambda: F.dropout(torch.ones(50), 0.5).sum() + random.random()
    part = MicroBatch(mask)
    assert part.loss is None
    loss = part()
    after = stream_states([torch.device("cpu")])
    direction = Direction.from_gradients(model)
    seen = []
    watched = lambda: seen.append(float(part())) or square()
    critical_sharpness(model, watched, direction)
    assert set(seen) == {float(loss)} == {float(part.loss)}
    assert stream_states([torch.device("cpu")]) == after
    assert float(part()) != float(loss)
    with pytest.raises(TypeError, match="loss_fn must be callable"):
        MicroBatch(torch.ones(1))


Pair = namedtuple("Pair", "x y")


def test_split() -> None:
    transformers = pytest.importorskip("transformers")
    x, y = torch.arange(12).reshape(6, 2), torch.arange(6)
    encoding = transformers.BatchEncoding({"input_ids": x, "labels": y})
    for batch, tensors in (
        (x, lambda part: [part]),
        ((x, y), list),
        ([x, y], list),
        (Pair(x, y), list),
        ({"x": x, "nested": {"y": y}, "scale": torch.tensor(2.0), "name": "a"}, lambda p: [p["x"], p["nested"]["y"]]),
        (OrderedDict(x=x, names=list("abcdef")), lambda part: [part["x"]]),
        (encoding, lambda part: [part["input_ids"], part["labels"]]),
    ):
        parts = sharpkern.split(batch, 3)
        assert [type(part) for part in parts] == [type(batch)] * 3
        whole = [torch.cat(one) for one in zip(*map(tensors, parts), strict=True)]
        assert all(map(torch.equal, whole, [x, y]))
    assert sharpkern.split({"x": x, "names": list("abcdef")}, 3)[1]["names"] == ["c", "d"]
    assert sharpkern.split({"x": x, "scale": 2.0}, 2)[1]["scale"] == 2.0
    with pytest.raises(ValueError, match=r"must divide the 6 rows of batch, got 4; take one of \[1, 2, 3, 6\]"):
        sharpkern.split(x, 4)
    with pytest.raises(ValueError, match="the same number of rows, got"):
        sharpkern.split((x, y[:3]), 3)
    with pytest.raises(TypeError, match="must hold a tensor with rows, got str"):
        sharpkern.split("text", 3)
    with pytest.raises(TypeError, match="parts must be an int"):
        sharpkern.split(x, 2.0)


@pytest.mark.parametrize("divided", [True, False], ids=["closures divided too", "neither divided"])
@pytest.mark.filterwarnings("ignore::sharpkern.SlopeMismatchWarning")
def test_a_gradient_of_another_scale_than_the_closures_is_seen(divided: bool) -> None:
    loop = Loop()
    loop.train(2)
    loop.optimizer.zero_grad()
    parts = loop.step()
    loop.optimizer.zero_grad()
    # The gradient is the sum of the closures' where their mean is measured.
    summed = [MicroBatch(lambda part=part: part.loss_fn() / (NUM if divided else 1)) for part in parts]
    for part in summed:
        part().backward()
    with pytest.warns(SampleWarning, match=r"standard errors above that of a sample, as where the gradient is the sum"):
        m = critical_sharpness(loop.model, summed, loop.direction, sample=8, clip=1.0)
    assert off(m, loop.whole(summed)) < 0.05


def test_a_direction_that_moves_one_layer_alone_is_sampled() -> None:
    loop = Loop()
    parts = loop.train(4)
    m = critical_sharpness(loop.model, parts, loop.direction.only("0.*"), sample=8, clip=1.0)
    assert m.sample_size == 8


def test_arrays_and_odd_dictionaries_are_split() -> None:
    batch = defaultdict(list, x=torch.arange(4), labels=np.arange(4))
    first, second = sharpkern.split(batch, 2)
    assert isinstance(first, defaultdict)
    assert [part["labels"].tolist() for part in (first, second)] == [[0, 1], [2, 3]]
    assert [part["x"].tolist() for part in (first, second)] == [[0, 1], [2, 3]]
    assert [part.tolist() for part in sharpkern.split(np.arange(4), 2)] == [[0, 1], [2, 3]]


def test_without_gradients_at_hand_a_direction_with_a_slope_is_enough() -> None:
    loop = Loop()
    parts = loop.train(20)
    direction, truth = loop.direction, loop.whole(parts)
    loop.optimizer.zero_grad()
    sampled = critical_sharpness(loop.model, parts, direction, sample=8)
    assert (sampled.sample_size, sampled.num_micro_batches) == (8, NUM)
    assert off(sampled, truth) < sampled.error


def test_blocks_are_sampled_by_their_own_slopes() -> None:
    loop, held, forwards = Loop(num=48), [], []
    for step in range(24):
        parts = loop.step()
        if step % 3 == 2:
            measure = partial(sharpkern.blockwise_critical_sharpness, loop.model, parts, loop.direction)
            few, found, truth = measure(sample=8, clip=1.0), measure(sample="auto", clip=1.0), measure(rtol=1e-3)
            assert list(few) == list(found) == list(truth) == ["0", "4"]
            for name, m in truth.items():
                assert few[name].sample_size is not None
                assert (found[name].num_micro_batches, m.sample_size) == (48, None)
                assert found[name].slope == pytest.approx(m.slope)
                held.append(off(found[name], m) <= found[name].error)
                forwards.append((few[name].forwards, m.forwards))
        loop.optimizer.step()
    assert sum(held) >= 0.9 * len(held)
    sampled, whole = map(sum, zip(*forwards, strict=True))
    assert sampled < whole / 2


def test_blocks_draw_the_same_micro_batches() -> None:
    loop = Loop()
    parts = loop.train(8)
    called: list[float] = []

    def noted(k: int) -> Tensor:
        called.append(float(k))
        return parts[k].loss_fn()

    closures = [partial(noted, k) for k in range(NUM)]
    measure = partial(sharpkern.blockwise_critical_sharpness, loop.model, closures, loop.direction)
    for _ in range(2):
        measure(sample=8, clip=1.0)
    del called[:]
    # The third checks nothing more. The first is looked at in any case.
    found = measure(sample=8, clip=1.0)
    assert [m.sample_size for m in found.values()] == [8, 8]
    assert len(set(called) - {0.0}) in (7, 8)


def test_clipped_blocks_and_a_monitors_blocks_are_sampled() -> None:
    loop = Loop(max_norm=0.05)
    monitor = sharpkern.Monitor(loop.model, loop.optimizer, blocks=True, sample="auto")
    held = []
    for step in range(12):
        parts = loop.step()
        if step > 5:
            monitor(parts, clip=(loop.norm_before, 0.05))
            truth = sharpkern.blockwise_critical_sharpness(loop.model, parts, loop.direction, rtol=1e-3)
            blocks = monitor.history[-1].blocks
            assert list(blocks) == ["0", "4"]
            for name, m in blocks.items():
                assert m.sample_size is not None
                held.append(off(m, truth[name]) <= m.error)
        loop.optimizer.step()
    assert sum(held) >= 0.85 * len(held)
    with pytest.warns(SampleWarning, match=r"norm is a round number, .* pass clip="):
        found = sharpkern.blockwise_critical_sharpness(loop.model, loop.step(), loop.direction, sample="auto")
    assert [m.sample_size for m in found.values()] == [None, None]


def test_blocks_cannot_be_sampled_of_one_closure() -> None:
    loop = Loop(num=2)
    parts = loop.step()
    with pytest.raises(TypeError, match=r"loss_fn must be a sequence of closures with sample= or weights="):
        sharpkern.blockwise_critical_sharpness(loop.model, parts[0], loop.direction, sample="auto")
