"""The linear layer whose weight moves, every way, against float64."""

import pytest
import torch
from torch import Tensor

from sharpkern import ops
from sharpkern.engines.virtual import linear
from sharpkern.engines.virtual.linear import choose, moving_linear
from sharpkern.ops.matmul import product_dtype
from sharpkern.ops.update import LazyUpdate, ParamUpdate, StoredUpdate
from sharpkern.tensors.fake import pretend_device
from tests.kernels.budget import assert_within_budget, randn

ALPHA = (0.0, -1e-3, -0.1, -2.0)
WAYS = ("products", "formed", "fused")


def weights(num_rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(num_rows, width, dtype=dtype, scale=width**-0.5), randn(
        num_rows, width, dtype=dtype, seed=1, scale=0.1
    )


def exact(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
    formed = W.double() + alpha.double()[:, None, None] * D.double()
    return torch.einsum("k...c,knc->k...n", x.double().expand(len(alpha), *x.shape[1:]), formed)


def in_torch(x: Tensor, W: Tensor, D: Tensor, alpha: Tensor) -> Tensor:
    """Each step size by itself: form, round, multiply."""
    inputs = x.expand(len(alpha), *x.shape[1:])
    formed = [ops.form(W, D, alpha[k : k + 1])[0] for k in range(len(alpha))]
    return torch.stack([torch.nn.functional.linear(inputs[k], formed[k]) for k in range(len(alpha))])


@pytest.mark.parametrize("shape", [(4, 7, 24), (1, 7, 24), (4, 2, 3, 24), (4, 0, 24), (4, 24)], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_as_exact_as_forming_each_weight(way: str, shape: tuple[int, ...]) -> None:
    (W, D), x, alpha = weights(37, 24, torch.float32), randn(*shape, seed=2), torch.tensor(ALPHA)
    y = moving_linear(x, W, StoredUpdate(W, D), alpha, dtype=torch.float32, way=way)
    assert y.shape == (4, *shape[1:-1], 37)
    # The order of additions is another.
    assert_within_budget(y, exact(x, W, D, alpha), in_torch(x, W, D, alpha), roundings=8, floor=1e-6)


@pytest.mark.parametrize("way", ["formed", "fused"])
def test_16_bit_factors_are_rounded_once(way: str) -> None:
    (W, D), x, alpha = weights(37, 24, torch.bfloat16), randn(4, 7, 24, dtype=torch.bfloat16), torch.tensor(ALPHA)
    y = moving_linear(x, W, StoredUpdate(W, D), alpha, dtype=torch.bfloat16, way=way)
    assert y.dtype == torch.bfloat16
    assert_within_budget(y, exact(x, W, D, alpha), in_torch(x, W, D, alpha), roundings=1, floor=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_is_added_before_the_result_is_rounded(dtype: torch.dtype) -> None:
    (W, D), x, alpha = weights(37, 24, dtype), randn(4, 7, 24, dtype=dtype, seed=2), torch.tensor(ALPHA)
    bias = randn(4, 37, dtype=dtype, seed=3, scale=10.0)
    y = moving_linear(x, W, StoredUpdate(W, D), alpha, dtype=dtype, way="formed", bias=bias)
    formed = ops.form(W, D, alpha)
    stock = torch.stack([torch.nn.functional.linear(x[k], formed[k], bias[k]) for k in range(4)])
    right = torch.einsum("kmc,knc->kmn", x.double(), formed.double()) + bias.double()[:, None]
    assert_within_budget(y, right, stock, roundings=0.5, floor=1e-5)


@pytest.mark.parametrize("num_bytes", [1, 24 * 4 * 5, 24 * 4 * 37 * 3, 2**20], ids=str)
def test_blocks_of_rows_and_step_sizes_cover_everything(num_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (W, D), x, alpha = weights(37, 24, torch.float32), randn(4, 7, 24, seed=2), torch.tensor(ALPHA)
    monkeypatch.setattr(linear, "CACHE_BYTES", num_bytes)
    y = moving_linear(x, W, StoredUpdate(W, D), alpha, dtype=torch.float32, way="formed")
    assert_within_budget(y, exact(x, W, D, alpha), in_torch(x, W, D, alpha), roundings=8, floor=1e-6)


def test_blocks_of_a_gpu_hold_all_step_sizes_in_bounded_memory() -> None:
    x = torch.empty(8, 4096, 4096, dtype=torch.bfloat16, device="meta")
    at_once, height = linear._block(x, 11008, 4096, 8)
    assert at_once == 8
    assert 8 * height * 4096 * 2 <= linear.SCRATCH_BYTES < 16 * height * 4096 * 2


def test_a_plan_counts_as_many_formed_rows_as_any_gpu_holds() -> None:
    x = torch.empty(8, 4096, 8192, dtype=torch.bfloat16, device="meta")
    with pretend_device("cuda"):
        at_once, height = linear._block(x, 16384, 8192, 8)
    assert at_once * height * 8192 * 2 == 2**30


@pytest.mark.parametrize(
    ("tokens", "width", "rows"), [(512, 1024, 4096), (513, 1024, None), (8, 2**15, None)], ids=["few", "many", "wide"]
)
def test_few_tokens_take_as_many_rows_of_a_head_as_one_step_size(tokens: int, width: int, rows: int | None) -> None:
    hidden = torch.empty(8, tokens, width, dtype=torch.bfloat16, device="meta")
    with pretend_device("cuda"):
        assert linear.rows_of_head(hidden) == rows
    assert linear.rows_of_head(hidden) is None


@pytest.mark.parametrize("way", WAYS)
def test_directions_from_an_optimizers_state(way: str) -> None:
    (W, D), x, alpha = weights(37, 24, torch.float32), randn(4, 7, 24, seed=2), torch.tensor(ALPHA)
    move: ParamUpdate = LazyUpdate("sgd", W, D, (None,), (0.1, 1.0, 1.0, 0.0, 1.0))
    y = moving_linear(x, W, move, alpha, dtype=torch.float32, way=way)
    update = D + 0.1 * W
    assert_within_budget(y, exact(x, W, update, alpha), in_torch(x, W, update, alpha), roundings=8, floor=1e-6)


def test_weights_of_a_full_precision_master() -> None:
    (master, D), x, alpha = weights(37, 24, torch.float32), randn(4, 7, 24, seed=2).bfloat16(), torch.tensor(ALPHA)
    W = master.bfloat16()
    for way in ("formed", "fused"):
        y = moving_linear(x, W, StoredUpdate(master, D), alpha, dtype=torch.bfloat16, way=way)
        assert torch.allclose(y.double(), exact(x, master, D, alpha), rtol=0.02, atol=0.02)


def test_products_of_16_bit_factors_are_left_to_devices_that_do_not_round_them() -> None:
    assert choose(torch.device("cpu"), torch.float32, 8) == "products"
    assert choose(torch.device("cpu"), torch.bfloat16, 8) == "formed"
    assert choose(torch.device("cpu"), torch.float32, 4096) == "formed"
    assert choose(torch.device("cuda"), torch.float32, 64) == "products"
    assert choose(torch.device("cuda"), torch.float32, 4096) == "formed"
    assert choose(torch.device("mps"), torch.float32, 8) == "formed"


def test_products_are_left_to_dtypes_that_hold_small_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "accumulates_in_fp32", lambda device: True)
    assert choose(torch.device("cuda"), torch.bfloat16, 64) == "products"
    assert choose(torch.device("cuda"), torch.float16, 64) == "formed"
    tiny = torch.tensor(1e-9)
    assert tiny.bfloat16() != 0 == tiny.half()


def test_the_dtype_of_a_product_is_autocasts() -> None:
    x = torch.zeros(2)
    assert product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(x) == torch.bfloat16
        assert product_dtype(x.double()) == torch.float64
