"""Cross-entropy of a head that never holds its logits, against torch's own."""

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sharpkern.engines.virtual import torch_calls as calls
from sharpkern.memory.counter import bytes_of, peak_bytes
from sharpkern.ops import linear_cross_entropy as head
from sharpkern.ops.linear_cross_entropy import cross_entropy_of_rows, linear_cross_entropy
from tests.helpers import tails
from tests.helpers.oracle import LossFn, deep_copy_losses, engine_losses, engine_on, random_direction
from tests.helpers.tails import STEP_SIZES, Taken

taken = tails.taken

CHUNK = 16


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 rows, so that small vocabularies have several, the last of them ragged."""
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", CHUNK)


small_chunks = pytest.mark.usefixtures("_small_chunks")


def operands(
    vocabulary: int = 50, shape: tuple[int, ...] = (3, 7), width: int = 12, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(*shape, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    return hidden, weight, torch.randint(vocabulary, shape)


def stock(hidden: Tensor, weight: Tensor, labels: Tensor, *, softcap: float | None = None, **options: Any) -> Tensor:
    """What people write: logits in the product's dtype, the loss in float32."""
    logits = F.linear(hidden, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten().long(), **options)


on_a_gpu = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device")],
)

OPTIONS = [{}, {"reduction": "sum"}, {"softcap": 2.0}, {"ignore_index": 3, "reduction": "sum", "softcap": 30.0}]


@small_chunks
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocabulary", [1, 4, CHUNK - 1, CHUNK, CHUNK + 1, 50])
def test_loss_and_gradients_in_float64(vocabulary: int, options: dict[str, Any]) -> None:
    hidden, weight, labels = operands(vocabulary, dtype=torch.float64)
    labels[0, :3] = options.get("ignore_index", -100)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss, expected = (f(hidden, weight, labels, **options) for f in (linear_cross_entropy, stock))
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    for got, wanted in zip(
        torch.autograd.grad(3 * loss, (hidden, weight)),
        torch.autograd.grad(3 * expected, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)


@small_chunks
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_those_of_finite_differences(softcap: float | None) -> None:
    hidden, weight, labels = operands(35, (5,), 4, torch.float64)
    labels[2] = -100
    loss = lambda h, w: linear_cross_entropy(h, w, labels, softcap=softcap)
    assert torch.autograd.gradcheck(loss, (hidden.requires_grad_(), weight.requires_grad_()))


@small_chunks
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", on_a_gpu])
def test_errors_are_within_those_of_stock_operations(device: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    tensors = [tensor.to(device) for tensor in operands(150, dtype=dtype)]
    labels = tensors[2]

    def result(function: Any, to: torch.dtype) -> list[Tensor]:
        hidden, weight = (tensor.to(to).requires_grad_() for tensor in tensors[:2])
        loss = function(hidden, weight, labels, **options)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        assert [gradient.dtype for gradient in gradients] == [to, to]
        return [loss.detach().double(), *(gradient.double() for gradient in gradients)]

    exact, usual, got = result(stock, torch.float64), result(stock, dtype), result(linear_cross_entropy, dtype)
    for true, usual_one, got_one in zip(exact, usual, got, strict=True):
        # Sums of float32 logits and of their exponentials, in another order.
        slack = 4 * torch.finfo(torch.float32).eps * true.abs().max()
        if true.dim():
            # Gradients are rounded to the factors' dtype, the derivative by the logits before that.
            slack += 2 * torch.finfo(dtype).eps * true.abs().max()
        assert (got_one - true).abs().max() <= (usual_one - true).abs().max() + slack


@small_chunks
@pytest.mark.parametrize("seed", range(40))
def test_any_size(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary, tokens, width = rng.randint(1, 70), rng.randint(1, 9), rng.randint(1, 9)
    hidden, weight, labels = operands(vocabulary, (tokens,), width, torch.float64)
    labels[: rng.randint(0, 3)] = -100
    scale, options = rng.choice([0.1, 1.0, 30.0]), {"reduction": rng.choice(["mean", "sum"])}
    torch.testing.assert_close(
        linear_cross_entropy(scale * hidden, weight, labels, **options),
        stock(scale * hidden, weight, labels, **options),
        rtol=1e-12,
        atol=1e-12,
        equal_nan=True,
    )


@small_chunks
def test_any_layout() -> None:
    hidden, weight, labels = operands()
    expected = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden.mT.contiguous().mT, weight, labels.int()), expected)
    wide = weight.t().contiguous().t()
    torch.testing.assert_close(linear_cross_entropy(hidden, wide, labels.t().contiguous().t()), expected)
    assert torch.equal(
        linear_cross_entropy(hidden[0, 0], weight, labels[0, 0]), stock(*(hidden[:1, 0], weight), labels[:1, 0])
    )


@small_chunks
def test_no_token_counts() -> None:
    hidden, weight, labels = operands()
    hidden.requires_grad_()
    labels[:] = -100
    assert linear_cross_entropy(hidden, weight, labels).isnan()
    total = linear_cross_entropy(hidden, weight, labels, reduction="sum")
    assert total == 0
    (gradient,) = torch.autograd.grad(total, hidden)
    assert torch.equal(gradient, torch.zeros_like(hidden))
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="sum") == 0


@small_chunks
def test_logits_of_thousands_and_of_minus_infinity() -> None:
    hidden, weight, labels = operands()
    torch.testing.assert_close(
        linear_cross_entropy(1000 * hidden, weight, labels), stock(1000 * hidden, weight, labels), rtol=1e-6, atol=0
    )
    hidden, weight = hidden.abs(), weight.abs()
    weight[:CHUNK] = -math.inf
    labels[:] = 40
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), stock(hidden, weight, labels))
    weight[3] = math.nan
    assert linear_cross_entropy(hidden, weight, labels).isnan()


@small_chunks
@pytest.mark.parametrize("inside", [True, False])
def test_autocast_rounds_the_factors_of_the_product(inside: bool) -> None:
    """The backward pass belongs outside of autocast, and people run it inside."""
    hidden, weight, labels = operands(150)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels)
        gradients = torch.autograd.grad(loss, (hidden, weight)) if inside else ()
    gradients = gradients or torch.autograd.grad(loss, (hidden, weight))
    rounded = stock(hidden.bfloat16().float(), weight.bfloat16().float(), labels)
    torch.testing.assert_close(loss, rounded, rtol=1e-6, atol=0)
    assert abs(loss - stock(hidden, weight, labels)) > 1e-5, "autocast made no difference"
    for got, wanted in zip(gradients, torch.autograd.grad(rounded, (hidden, weight)), strict=True):
        assert got.dtype == torch.float32
        assert (got - wanted).abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()


def test_autocast_leaves_float64_alone() -> None:
    tensors = operands(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear_cross_entropy(*tensors), stock(*tensors), rtol=1e-13, atol=0)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_gradient_alone(wanted: int) -> None:
    hidden, weight, labels = operands()
    (hidden, weight)[wanted].requires_grad_()
    gradients = [
        torch.autograd.grad(f(hidden, weight, labels), (hidden, weight)[wanted])[0]
        for f in (linear_cross_entropy, stock)
    ]
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused() -> None:
    """Next to a term that has one, the missing part of it would not be noticed."""
    hidden, weight, labels = operands()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, labels) + weight.square().sum()
    with pytest.raises(RuntimeError, match="differentiated once only, got create_graph=True; for second derivatives"):
        torch.autograd.grad(loss, weight, create_graph=True)


@small_chunks
def test_runs_twice_to_the_same_bits_and_reads_no_memory_it_did_not_write() -> None:
    hidden, weight, labels = operands()
    hidden.requires_grad_()
    weight.requires_grad_()

    def run() -> list[Tensor]:
        loss = linear_cross_entropy(hidden, weight, labels, softcap=5.0)
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    once = run()
    torch.use_deterministic_algorithms(True)
    try:
        # Memory that torch leaves uninitialised is NaN now.
        assert torch.utils.deterministic.fill_uninitialized_memory
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


@small_chunks
def test_rows_may_take_turns_in_one_buffer() -> None:
    hidden, weight, labels = operands(shape=(9,))
    buffer, asked = torch.empty(CHUNK, 12), []

    def rows(chosen: slice) -> Tensor:
        asked.append(chosen)
        return buffer[: chosen.stop - chosen.start].copy_(weight[chosen])

    loss = cross_entropy_of_rows(hidden, 50, rows, labels, softcap=3.0, reduction="sum")
    assert torch.equal(loss, linear_cross_entropy(hidden, weight, labels, softcap=3.0, reduction="sum"))
    assert asked == [slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 50)]


@pytest.mark.parametrize("device", [on_a_gpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_never_exist_on_a_gpu(device: str, dtype: torch.dtype) -> None:
    hidden, weight, labels = (tensor.to(device) for tensor in operands(60_000, (2000,), 64, dtype))
    hidden.requires_grad_()
    weight.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels).backward()
    chunk = 2000 * head.VOCABULARY_CHUNK * 4
    # Backward: the chunk, its copy in 16 bits, masks and small parts.
    assert torch.cuda.max_memory_allocated() - before < 2 * chunk + 2 * bytes_of([weight])


def test_logits_never_exist() -> None:
    """Neither forth nor back: one chunk of them, and gradients of the factors' sizes."""
    tokens, vocabulary, width = 200, 30_000, 16
    hidden, weight, labels = operands(vocabulary, (tokens,), width)
    chunk = tokens * head.VOCABULARY_CHUNK * 4
    assert chunk <= peak_bytes(lambda: linear_cross_entropy(hidden, weight, labels)) < 1.1 * chunk
    hidden.requires_grad_()
    weight.requires_grad_()
    # The chunk, and here and there a mask of one bit of it; stock operations hold all logits twice.
    back = peak_bytes(lambda: linear_cross_entropy(hidden, weight, labels).backward())
    assert back < 1.3 * chunk + bytes_of([weight])
    assert peak_bytes(lambda: stock(hidden, weight, labels).backward()) > 10 * chunk


def test_modes_and_subclasses_see_the_call_by_name() -> None:
    class Names(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append((calls.name_of(func), func, kwargs))
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    hidden, weight, labels = operands()
    expected = linear_cross_entropy(hidden, weight, labels, softcap=3.0)
    with Names():
        loss = linear_cross_entropy(hidden, nn.Parameter(weight), labels, softcap=3.0)
    assert torch.equal(loss, expected)
    options = {"ignore_index": -100, "reduction": "mean", "softcap": 3.0, "backend": "auto"}
    assert seen == [("linear_cross_entropy", linear_cross_entropy, options)]


H, W, Y = torch.zeros(2, 5, 8), torch.zeros(20, 8), torch.zeros(2, 5, dtype=torch.int64)

BAD = [
    ((H.numpy(), W, Y), {}, TypeError, "hidden must be a tensor, got ndarray; pass a torch.Tensor"),
    ((H.long(), W, Y), {}, TypeError, "hidden must be float32, float16, bfloat16 or float64, got torch.int64; convert"),
    ((H, W.cfloat(), Y), {}, TypeError, "weight must be float32, .* got torch.complex64; convert it with .to"),
    (
        (H, W[0], Y),
        {},
        ValueError,
        r"weight must be a matrix \[vocabulary, hidden size\], got shape \[8\]; pass lm_head",
    ),
    ((H, W[:0], Y), {}, ValueError, r"weight must be a matrix .* got shape \[0, 8\]"),
    (
        (H[..., :3], W, Y),
        {},
        ValueError,
        r"hidden must have shape \[..., 8\], the width of weight, got \[2, 5, 3\]; pass",
    ),
    (
        (H, W, Y[:, 1:]),
        {},
        ValueError,
        r"labels must have shape \[2, 5\], one per token of hidden, got \[2, 4\]; shift",
    ),
    ((H, W, Y.float()), {}, TypeError, "labels must be int64 or int32, got torch.float32; class probabilities are not"),
    ((H, W.to("meta"), Y), {}, ValueError, "weight must be on cpu, as hidden is, got meta; move it there"),
    ((H, W, Y.to("meta")), {}, ValueError, "labels must be on cpu, as hidden is, got meta; move it there"),
    ((H, W.double(), Y), {}, TypeError, "weight must be torch.float32, as hidden is, got torch.float64; .* autocast"),
    ((H, W, Y), {"reduction": "none"}, ValueError, "reduction must be 'mean' or 'sum', got 'none'; leave it out"),
    ((H, W, Y), {"softcap": 0.0}, ValueError, "softcap must be positive, got 0.0; leave it out for none"),
    ((H, W, Y), {"softcap": math.nan}, ValueError, "softcap must be positive, got nan"),
    ((H, W, Y), {"backend": "cuda"}, ValueError, "backend must be one of auto, triton, torch, got 'cuda'"),
    ((H, W, Y + 20), {}, ValueError, r"labels must be in \[0, 20\) or ignore_index -100, got 20; set those"),
    ((H, W, Y - 1), {}, ValueError, r"labels must be in \[0, 20\) or ignore_index -100, got -1"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "message"), BAD, ids=[case[3][:40] for case in BAD])
def test_bad_input(arguments: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(*arguments, **options)


# -- in a closure that is measured ------------------------------------------------------------------------------------


class Headless(nn.Module):
    """A model that returns hidden states; the closure knows the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 200, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).tanh()


def named(model: Headless) -> LossFn:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 9, 16, generator=generator), torch.randint(200, (2, 9), generator=generator)
    return lambda: linear_cross_entropy(model(x), model.head.weight, y, softcap=3.0)


@pytest.mark.parametrize("engine", ["virtual", "inplace"])
def test_closures_that_call_the_head_by_name(engine: str, taken: Taken) -> None:
    model = Headless()
    direction = random_direction(model)
    expected = deep_copy_losses(model, named, direction, STEP_SIZES)
    assert engine_losses(engine, model, named(model), direction, STEP_SIZES) == pytest.approx(expected, rel=1e-6)
    assert len(taken) == (len(STEP_SIZES) if engine == "virtual" else 0), "at any size, where weights are formed"
    with engine_on("virtual", model, named(model), direction) as (virtual, _):
        assert virtual.oracle_loss(0.1) == pytest.approx(expected[-1], rel=1e-6)


def test_by_name_with_a_frozen_head_and_with_gradients(taken: Taken) -> None:
    def differentiating(model: Headless) -> LossFn:
        def loss_fn() -> Tensor:
            with torch.enable_grad():
                x = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()
                y = torch.tensor([3, 199])
                (slope,) = torch.autograd.grad(linear_cross_entropy(model(x), model.head.weight, y), x)
            return slope.square().sum()

        return loss_fn

    model = Headless()
    for closure in (differentiating, named):
        direction = random_direction(model)
        expected = deep_copy_losses(model, closure, direction, STEP_SIZES)
        assert engine_losses("virtual", model, closure(model), direction, STEP_SIZES) == pytest.approx(
            expected, rel=1e-6
        )
        assert len(set(expected)) == len(STEP_SIZES)
        model.head.requires_grad_(False)
        taken.clear()
    assert taken == []


def test_bad_input_by_name_is_refused_as_ever() -> None:
    model = Headless()
    closure = lambda: linear_cross_entropy(model(torch.ones(3, 16)), model.head.weight, torch.zeros(3))
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.float32"):
        engine_losses("virtual", model, closure, random_direction(model), STEP_SIZES)


def test_by_name_the_formed_head_never_exists() -> None:
    model = nn.Linear(64, 30_000, bias=False)
    hidden, labels = torch.randn(32, 64), torch.randint(30_000, (32,))
    loss_fn = lambda: linear_cross_entropy(hidden, model.weight, labels)
    direction = random_direction(model)
    taken = peak_bytes(lambda: engine_losses("virtual", model, loss_fn, direction, [0.1]))
    assert taken < 1.2 * 4096 * (32 + 64) * 4 < bytes_of([model.weight])
