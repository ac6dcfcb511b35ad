"""Operations on parameter-sized tensors against float64."""

import pytest
import torch

from sharpkern import ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("delta_dtype", DTYPES)
def test_formed_weights_are_rounded_once(
    base_dtype: torch.dtype, delta_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "_CPU_CHUNK", 100)
    base, delta = torch.randn(37, 11).to(base_dtype), torch.randn(37, 11).to(delta_dtype)
    exact = base.double() - 0.0123 * delta.double()
    formed = ops.form(base, delta, -0.0123)
    assert formed.dtype == base_dtype
    # Half a unit in the last place, and the roundings of the wider arithmetic before.
    eps, wide = torch.finfo(base_dtype).eps, torch.finfo(ops.compute_dtype(base_dtype, delta_dtype)).eps
    budget = (eps / 2 + (2 * wide if eps == wide else wide)) * exact.abs() + 4 * wide * delta.double().abs() * 0.0123
    assert ((formed.double() - exact).abs() <= budget + 1e-7 * (base_dtype == torch.float16)).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (63,), (1000, 130), (3, 0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_CPU_CHUNK", 64)
    base, delta = torch.randn(shape).to(dtype), torch.randn(shape)
    expected = (base.float() + 0.5 * delta).to(dtype)
    assert torch.equal(ops.form(base, delta, 0.5), expected)
    out = torch.full(shape, torch.nan, dtype=dtype)
    assert ops.form(base, delta, 0.5, out=out) is out
    assert torch.equal(out, expected)


def test_strides_are_kept_and_the_inputs_untouched() -> None:
    base, delta = torch.randn(8, 5).t(), torch.randn(8, 5).t()
    copies = base.clone(), delta.clone()
    formed = ops.form(base, delta, 2.0)
    assert formed.stride() == base.stride()
    assert torch.equal(base, copies[0])
    assert torch.equal(delta, copies[1])


def test_step_sizes_are_not_rounded_to_the_weights_dtype() -> None:
    """The CPU's own bf16 add rounds alpha to bf16, up to 0.2 %."""
    base, delta = torch.zeros(1, dtype=torch.bfloat16), torch.full((1,), 256.0, dtype=torch.bfloat16)
    alpha = 1.00390625  # half-way between two bf16 numbers
    wide = ops.form(base, delta, alpha, dtype=torch.float32)
    assert wide.item() == 257.0
    assert base.add(delta, alpha=alpha).item() != 257.0, "the trap no longer springs"


def test_totals_over_no_tensors() -> None:
    assert ops.total([]) == 0.0
    assert ops.total([torch.tensor(1.0), torch.tensor(2.5, dtype=torch.float64)]) == 3.5
