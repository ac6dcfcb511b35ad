"""Torch functions that vmap does not batch well: for all step sizes at once as for one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sharpkern.engines.batched import attention as attention_module
from sharpkern.engines.batched.attention import attention
from sharpkern.engines.batched.batch_norms import batch_norm, instance_norm
from sharpkern.engines.batched.random_draws import dropout
from sharpkern.engines.batched.rules import REPLACEMENTS, _calling_ours
from sharpkern.tensors.random_state import torch_states

K, B, H, T, S, E = 3, 2, 4, 5, 7, 8
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]
ATTENTION = F.scaled_dot_product_attention
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def _without_gradient() -> Any:
    with torch.no_grad():
        yield


class InPlaceOfTorch(TorchFunctionMode):
    """What the engine does: calls our functions where torch's are called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return REPLACEMENTS.get(func, func)(*args, **(kwargs or {}))


@dataclass
class Calls:
    """The arguments of every call of torch's attention, which is called as usual."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, dropout_p: float, is_causal: bool, **rest: Any
    ) -> Tensor:
        self.seen.append({"tensors": [query, key, value, attn_mask], "is_causal": is_causal})
        return ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, **rest)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    spy = Calls()
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return spy


def at_once(function: Callable[..., Tensor], *tensors: Tensor | None, several: Sequence[bool] | None = None) -> Tensor:
    dims = tuple(0 if own else None for own in several or [True] * len(tensors))
    return torch.func.vmap(function, in_dims=dims, randomness="same")(*tensors)


def one_by_one(
    function: Callable[..., Tensor], *tensors: Tensor | None, several: Sequence[bool] | None = None
) -> Tensor:
    """K calls from the same random state."""
    results = []
    for k in range(K):
        torch.manual_seed(0)
        slices = [t[k] if own else t for t, own in zip(tensors, several or [True] * len(tensors), strict=True)]
        results.append(function(*slices))
    return torch.stack(results)


def assert_same_draws(
    ours: Callable[..., Tensor], stock: Callable[..., Tensor], *tensors: Tensor, several: Sequence[bool] | None = None
) -> None:
    """Fail unless results are equal bit for bit and the random streams end where one stock call leaves them."""
    devices = {tensor.device for tensor in tensors}
    expected = one_by_one(stock, *tensors, several=several)
    streams = torch_states(devices)
    torch.manual_seed(0)
    result = at_once(ours, *tensors, several=several)
    assert result.dtype == expected.dtype
    assert torch.equal(result, expected)
    assert all(torch.equal(now, then) for now, then in zip(torch_states(devices), streams, strict=True))


# -- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """Shapes of one step size's tensors, which of them each step size has its own of, and options."""

    query: tuple[int, ...] = (B, H, T, E)
    key: tuple[int, ...] = (B, H, S, E)
    mask: tuple[int, ...] | None = None
    several: str = "qkv"
    additive: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> list[bool]:
        return [letter in self.several for letter in "qkvm"]

    def tensors(self, device: str, dtype: torch.dtype = torch.float32) -> list[Tensor | None]:
        """Random numbers; the values are narrower than the keys."""
        generator = torch.Generator().manual_seed(1)
        shapes = [self.query, self.key, (*self.key[:-1], E - 2), self.mask]
        made: list[Tensor | None] = []
        for shape, own in zip(shapes, self.own, strict=True):
            numbers = None if shape is None else torch.randn((K, *shape) if own else shape, generator=generator)
            made.append(None if numbers is None else numbers.to(device, dtype))
        if made[3] is not None and not self.additive:
            made[3] = made[3] > 0
            # A row without any position would be NaN.
            made[3][..., 0] = True
        return made


GROUPED = {"options": {"enable_gqa": True}, "key": (B, H // 2, S, E)}
CAUSAL = {"options": {"is_causal": True}}
FORMS = {
    "plain": Form(),
    "scale": Form(options={"scale": 0.3}),
    "causal": Form(query=(B, H, S, E), **CAUSAL),
    "causal, fewer queries": Form(**CAUSAL),
    "one sample": Form(query=(1, H, T, E), key=(1, H, S, E)),
    "bool [T, S]": Form(mask=(T, S)),
    "bool [1, 1, T, S]": Form(mask=(1, 1, T, S)),
    "bool [B, 1, T, S]": Form(mask=(B, 1, T, S)),
    "bool [B, 1, 1, S]": Form(mask=(B, 1, 1, S)),
    "bool [B, H, T, S]": Form(mask=(B, H, T, S)),
    "additive [T, S]": Form(mask=(T, S), additive=True),
    "additive [H, T, S]": Form(mask=(H, T, S), additive=True),
    "additive [1, 1, T, S]": Form(mask=(1, 1, T, S), additive=True),
    "additive [B, 1, T, S]": Form(mask=(B, 1, T, S), additive=True),
    "additive [B, H, T, S]": Form(mask=(B, H, T, S), additive=True),
    "own bias [T, S]": Form(mask=(T, S), additive=True, several="qkvm"),
    "own bias [1, H, T, S]": Form(mask=(1, H, T, S), additive=True, several="qkvm"),
    "own bias [B, H, T, S]": Form(mask=(B, H, T, S), additive=True, several="qkvm"),
    "own mask [B, 1, T, S]": Form(mask=(B, 1, T, S), several="qkvm"),
    "only the bias": Form(mask=(1, H, T, S), additive=True, several="m"),
    "only the queries": Form(several="q"),
    "only the queries, masked": Form(several="q", mask=(B, 1, T, S)),
    "only keys and values": Form(several="kv"),
    "only the values": Form(several="v", mask=(T, S)),
    "grouped": Form(**GROUPED),
    "grouped, masked": Form(**GROUPED, mask=(B, 1, T, S)),
    "grouped, causal": Form(key=(B, 2, S, E), options={"enable_gqa": True, "is_causal": True}),
    "one key for the batch": Form(key=(1, H, S, E)),
    "three dimensions": Form(query=(B * H, T, E), key=(B * H, S, E)),
    "three dimensions, causal": Form(query=(B * H, S, E), key=(B * H, S, E), **CAUSAL),
    "three dimensions, [T, S]": Form(query=(B * H, T, E), key=(B * H, S, E), mask=(T, S)),
    "three dimensions, [B·H, T, S]": Form(query=(B * H, T, E), key=(B * H, S, E), mask=(B * H, T, S)),
    "three dimensions, own bias": Form(
        query=(B * H, T, E), key=(B * H, S, E), mask=(B * H, T, S), additive=True, several="qkvm"
    ),
    "three dimensions, only the queries": Form(query=(B * H, T, E), key=(B * H, S, E), several="q"),
    "three dimensions, grouped": Form(query=(H, T, E), key=(H // 2, S, E), options={"enable_gqa": True}),
    "two dimensions": Form(query=(T, E), key=(S, E)),
    "two dimensions, masked": Form(query=(T, E), key=(S, E), mask=(T, S)),
    "five dimensions": Form(query=(2, B, H, T, E), key=(2, B, H, S, E)),
    "five dimensions, masked": Form(query=(2, B, H, T, E), key=(2, B, H, S, E), mask=(B, 1, T, S)),
    "five dimensions, only the queries": Form(query=(2, B, H, T, E), key=(2, B, H, S, E), several="q"),
}
ALL_FORMS = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def attended(form: Form, tensors: list[Tensor | None]) -> Tensor:
    return at_once(lambda *slices: attention(*slices, **form.options), *tensors, several=form.own)


def attended_one_by_one(form: Form, tensors: list[Tensor | None]) -> Tensor:
    return one_by_one(lambda *slices: ATTENTION(*slices, **form.options), *tensors, several=form.own)


@ALL_FORMS
def test_one_call_attends_for_all_step_sizes(form: Form, calls: Calls, device: str) -> None:
    tensors = form.tensors(device)
    result, expected = attended(form, tensors), attended_one_by_one(form, tensors)
    assert result.shape == expected.shape
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 if device == "cpu" else 1e-5)
    assert len(calls.seen) == 1


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if len(form.query) == 4])
def test_attention_in_sixteen_bits_is_within_a_rounding(name: str, device: str) -> None:
    form = FORMS[name]
    tensors = form.tensors(device, torch.bfloat16)
    result, expected = attended(form, tensors), attended_one_by_one(form, tensors)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-10)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=str)
def test_autocast_attends_in_its_own_precision(options: dict[str, Any], device: str) -> None:
    tensors = Form(query=(B, H, S, E)).tensors(device)[:3]
    with torch.autocast(device, torch.bfloat16):
        expected = one_by_one(lambda *qkv: F.scaled_dot_product_attention(*qkv, **options), *tensors)
        result = at_once(lambda *qkv: attention(*qkv, **options), *tensors)
    assert result.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=2**-7, atol=2**-10)


def assert_one_causal_call(calls: Calls) -> None:
    assert [(call["is_causal"], call["tensors"][3]) for call in calls.seen] == [(True, None)]


def test_a_causal_call_stays_one(calls: Calls, device: str) -> None:
    attended(FORMS["causal"], FORMS["causal"].tensors(device))
    assert_one_causal_call(calls)


@pytest.mark.parametrize("name", ["plain", "bool [1, 1, T, S]", "one sample", "three dimensions, only the queries"])
def test_attention_copies_nothing(name: str, calls: Calls, device: str) -> None:
    tensors = FORMS[name].tensors(device)
    attended(FORMS[name], tensors)
    given = [None if tensor is None else tensor.data_ptr() for tensor in calls.seen[0]["tensors"]]
    assert given == [None if tensor is None else tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("name", ["plain", "bool [B, 1, T, S]", "only the queries", "two dimensions"])
def test_dropped_attention_is_that_of_one_pass(name: str, device: str) -> None:
    form = FORMS[name]
    tensors = form.tensors(device)

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *slices: function(*slices, *[None] * (4 - len(slices)), 0.4)

    given = [tensor for tensor in tensors if tensor is not None]
    assert_same_draws(call(attention), call(F.scaled_dot_product_attention), *given, several=form.own[: len(given)])


SAMPLES = {"plain": B, "causal": B, "own mask [B, 1, T, S]": B, "only the queries, masked": B, "five dimensions": 2 * B}


@pytest.mark.parametrize("name", SAMPLES)
def test_more_samples_than_a_kernel_takes_are_attended_to_in_turn(
    name: str, calls: Calls, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    form, most = FORMS[name], attention_module._MOST_STEPS * SAMPLES[name]
    tensors = form.tensors(device)
    for samples, num_calls in ((most, 1), (most - 1, K)):
        monkeypatch.setattr(attention_module, "_MOST_SAMPLES", samples)
        calls.seen.clear()
        result = attended(form, tensors)
        assert len(calls.seen) == num_calls
    # Now they are the calls that each step size would have made.
    assert torch.equal(result, attended_one_by_one(form, tensors))


def test_a_wrong_mask_is_refused_as_torch_does(device: str) -> None:
    query, key, value, _ = Form().tensors(device)
    with pytest.raises(RuntimeError, match=r"shape|size|dim"):
        at_once(lambda q, k, v: attention(q, k, v, torch.zeros(1, 1, 1, T, S, device=device)), query, key, value)


# -- random numbers ---------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2),
    "channels last": lambda x: x.permute(0, 1, 4, 2, 3),
    "step sizes last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "strided": lambda x: x[..., ::2],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_dropout_is_that_of_one_pass(
    layout: Callable[[Tensor], Tensor], dtype: torch.dtype, p: float, inplace: bool, device: str
) -> None:
    x = layout(torch.randn(K, 6, 5, 8, 10)).to(device, dtype)

    def call(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x.clone() if inplace else x, p, inplace=inplace)

    assert_same_draws(call(dropout), call(F.dropout), x)


def test_dropout_in_place_writes_its_input(device: str) -> None:
    x = torch.randn(K, 50, device=device)

    def written(x: Tensor) -> Tensor:
        x = x.clone()
        assert dropout(x, 0.4, inplace=True) is x
        return x

    assert_same_draws(written, lambda x: F.dropout(x.clone(), 0.4, inplace=True), x)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_of_what_all_step_sizes_share(inplace: bool, device: str) -> None:
    x, shared = torch.randn(K, 50, device=device), torch.randn(50, device=device)

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, shared: x * function(shared.clone(), 0.4, inplace=inplace)

    assert_same_draws(call(dropout), call(F.dropout), x, shared, several=(True, False))


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.4, False)])
def test_dropout_that_drops_nothing_draws_and_copies_nothing(p: float, training: bool, device: str) -> None:
    x = torch.randn(K, 50, device=device)
    streams = torch_states([x.device])
    result = at_once(lambda x: dropout(x, p, training), x)
    assert torch.equal(result, x)
    assert result.data_ptr() == x.data_ptr()
    assert all(torch.equal(now, then) for now, then in zip(torch_states([x.device]), streams, strict=True))


def test_dropout_refuses_what_torch_refuses(device: str) -> None:
    with pytest.raises(ValueError, match="dropout probability"):
        at_once(lambda x: dropout(x, 1.5), torch.randn(K, 4, device=device))


SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": lambda p: F.dropout(p, 0.3),
    "torch.dropout": lambda p: torch.dropout(p.transpose(-1, -2), 0.3, True),
    "bernoulli": torch.bernoulli,
    "bernoulli with p": lambda p: torch.bernoulli(p, 0.3),
    "bernoulli of a tensor": lambda p: p.bernoulli(),
    "multinomial": lambda p: torch.multinomial(p.flatten(1), 3),
    "multinomial of a tensor": lambda p: p.flatten(1).multinomial(60, replacement=True),
    "normal with mean": lambda p: torch.normal(p, 0.5),
    "normal with std": lambda p: torch.normal(mean=0.0, std=p),
    "normal with both": lambda p: torch.normal(p.neg(), std=p),
    "gumbel": F.gumbel_softmax,
    "like": lambda p: p + torch.randn_like(p.transpose(0, 1)).transpose(0, 1),
    "feature dropout": lambda p: F.dropout2d(p, 0.3),
    "in place": lambda p: torch.empty_like(p).exponential_() + p,
}


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_samples_are_those_of_one_pass(sample: Callable[[Tensor], Tensor], device: str) -> None:
    x = torch.rand(K, 4, 5, 6, 6, device=device)

    def ours(x: Tensor) -> Tensor:
        with InPlaceOfTorch():
            return sample(x)

    assert_same_draws(ours, sample, x)


def test_samples_from_a_generator(device: str) -> None:
    x = torch.rand(K, 50, device=device)
    generator = torch.Generator(device)

    def sampled(x: Tensor) -> Tensor:
        first = torch.bernoulli(x, generator=generator)
        return first + torch.bernoulli(x, generator=generator)

    expected = torch.stack([(generator.manual_seed(3), sampled(slice_))[1] for slice_ in x])
    generator.manual_seed(3)
    with InPlaceOfTorch():
        assert torch.equal(at_once(sampled, x), expected)


# -- norms over the batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("several", ["x", "xw", "wb", "w"])
@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_norms_over_the_batch(name: str, several: str, training: bool, shape: tuple[int, ...], device: str) -> None:
    if name == "instance_norm" and len(shape) == 2:
        shape = (*shape, 7)
    ours = {"batch_norm": batch_norm, "instance_norm": instance_norm}[name]
    own = [letter in several for letter in "xwb"]
    tensors = [
        torch.randn((K, *size) if moves else size, device=device)
        for size, moves in zip([shape, (5,), (5,)], own, strict=True)
    ]
    mean, var = torch.randn(5, device=device), torch.rand(5, device=device) + 0.5

    def call(function: Callable[..., Tensor], mean: Tensor, var: Tensor) -> Callable[..., Tensor]:
        return lambda x, weight, bias: function(x, mean, var, weight, bias, training, 0.2, 1e-3)

    stock = getattr(F, name)
    # Each call with statistics of its own, which it may update.
    expected = one_by_one(lambda *slices: call(stock, mean.clone(), var.clone())(*slices), *tensors, several=own)
    kept = mean.clone(), var.clone()
    result = at_once(call(ours, mean, var), *tensors, several=own)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6 if device == "cpu" else 1e-5)
    assert torch.equal(mean, kept[0])
    assert torch.equal(var, kept[1])


@pytest.mark.parametrize("name", ["batch_norm", "instance_norm"])
def test_norms_of_what_all_step_sizes_share_update_their_statistics(name: str, device: str) -> None:
    ours = {"batch_norm": batch_norm, "instance_norm": instance_norm}[name]
    x, shared = torch.randn(K, 1, 1, 1, device=device), torch.randn(6, 5, 4, device=device)
    stock, mine = ([torch.zeros(5, device=device), torch.ones(5, device=device)] for _ in range(2))
    expected = getattr(F, name)(shared, *stock, None, None, True)
    result = at_once(lambda x: x + ours(shared, *mine, None, None, True), x)
    torch.testing.assert_close(result, x + expected)
    assert not torch.equal(mine[0], torch.zeros_like(mine[0]))
    torch.testing.assert_close(mine, stock)


# -- in modules -------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """nn.MultiheadAttention, of which only the output counts."""

    def __init__(self, mask: str = "", **options: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(E, 2, dropout=0.3, batch_first=True)
        self.options = options
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        masks: dict[str, Any] = {}
        if self.mask == "causal":
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
            masks = {"attn_mask": mask, "is_causal": True}
        elif self.mask == "padding":
            masks = {"key_padding_mask": torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) > 3}
        return self.inner(x, x, x, **masks, **self.options)[0]


def images(inner: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (T, 1)), inner)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: Attending(need_weights=False),
    "attention, with weights": Attending,
    "attention, causal": lambda: Attending("causal", need_weights=False),
    "attention, padded": lambda: Attending("padding", need_weights=False),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(E, 2, 16, 0.3, batch_first=True), 2),
    "dropout": lambda: nn.Dropout(0.3),
    "dropout in place": lambda: nn.Sequential(nn.Linear(E, E), nn.Dropout(0.3, inplace=True)),
    "batch norm": lambda: images(nn.BatchNorm2d(T)),
    "instance norm": lambda: images(nn.InstanceNorm2d(T, affine=True, track_running_stats=True)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("build", MODULES.values(), ids=MODULES)
def test_modules_as_in_one_pass(build: Callable[[], nn.Module], training: bool, device: str) -> None:
    model = build().to(device).train(training)
    # A copy of its statistics for every pass.
    statistics = {name: value.clone() for name, value in model.named_buffers()}
    x = torch.randn(K, B, T, E, device=device)

    def passed(x: Tensor) -> Tensor:
        model.load_state_dict(statistics, strict=False)
        return model(x)

    expected = one_by_one(passed, x)
    torch.manual_seed(0)
    with InPlaceOfTorch():
        result = at_once(passed, x)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6 if device == "cpu" else 1e-5)


def test_attention_inside_of_modules_is_one_call(calls: Calls, device: str) -> None:
    model = Attending("causal", need_weights=False).to(device).eval()
    # The default device is a function mode as well.
    with torch.device(device), InPlaceOfTorch():
        at_once(model, torch.randn(K, B, T, E, device=device))
    assert_one_causal_call(calls)


@pytest.mark.parametrize("function", [torch.relu, len], ids=["of torch", "of Python"])
def test_what_is_no_python_function_is_called_as_it_is(function: Callable[..., Any], device: str) -> None:
    assert _calling_ours(function) is function
