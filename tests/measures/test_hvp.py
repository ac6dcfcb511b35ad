"""Losses that cannot be differentiated twice: refused with the cause and the remedy, or told of, never in silence."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sharpkern.directions.direction import Direction
from sharpkern.errors import UncheckedWarning
from sharpkern.measures.directional import directional_sharpness
from sharpkern.measures.hessian import hessian_sharpness
from sharpkern.ops.linear_cross_entropy import linear_cross_entropy
from tests.helpers.models import OutOfSight

INSTEAD = "or use critical_sharpness, which needs forward passes only$"


def network():
    """Two layers, a batch and labels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(20, 6), torch.randint(0, 3, (20,))


def by_both(model, loss_fn):
    """Each of the two that take products, along parameters of ones."""
    ones = Direction.from_tensors({p: torch.ones_like(p) for p in model.parameters()}, model)
    return [
        lambda: hessian_sharpness(model, loss_fn).value,
        lambda: directional_sharpness(model, loss_fn, ones, method="hvp"),
    ]


def check_refused(model, loss_fn, message, error=RuntimeError):
    for measure in by_both(model, loss_fn):
        with pytest.raises(error, match=message):
            measure()


class GradientMadeForward(torch.autograd.Function):
    """A fused head and cross-entropy: the gradient is computed with the loss and handed out by the backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
            loss = F.cross_entropy(leaves[0] @ leaves[1].T, labels)
            ctx.save_for_backward(*torch.autograd.grad(loss, leaves))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        return *ctx.saved_tensors, None


class ScaledGradientMadeForward(GradientMadeForward):
    """The same, multiplied by what comes from above, as it has to be where the loss is not the last thing."""

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        return grad * hidden, grad * weight, None


class HalfSeen(torch.autograd.Function):
    """A product whose gradient hides from autograd how it depends on one factor."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.detach().T, x.T @ grad


def test_a_fused_operator_behind_everything_is_refused():
    model, inputs, labels = network()
    seen = r"gradients must be differentiable, got \|g\|² = \S+ of which autograd sees 0; an operator .*" + INSTEAD
    check_refused(model, lambda: OutOfSight.apply(model(inputs)).mean(), seen)
    check_refused(model, lambda: GradientMadeForward.apply(model[0](inputs), model[1].weight, labels), seen)


def test_a_gradient_that_hides_one_factor_is_refused():
    model, inputs, labels = network()
    check_refused(
        model,
        lambda: F.cross_entropy(HalfSeen.apply(model[0](inputs), model[1].weight.T), labels),
        "products must be symmetric, got uᵀHv = .* and vᵀHu = .*" + INSTEAD,
    )


def test_a_saved_derivative_cannot_be_seen_and_is_told_of():
    model, inputs, labels = network()
    loss_fn = lambda: ScaledGradientMadeForward.apply(model[0](inputs), model[1].weight, labels)
    for measure in by_both(model, loss_fn):
        with pytest.warns(
            UncheckedWarning, match=r"of ScaledGradientMadeForward cannot be checked: .* by both methods"
        ):
            measure()


def test_torchs_own_operators_are_not_warned_of():
    model, inputs, labels = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(measure() for measure in by_both(model, lambda: F.cross_entropy(model(inputs).tanh(), labels)))


def test_our_own_fused_head_is_refused():
    model, inputs, labels = network()
    check_refused(
        model,
        lambda: linear_cross_entropy(model[0](inputs), model[1].weight, labels),
        r"cannot be differentiated twice \(linear_cross_entropy must be .*take torch\.nn\.functional\.cross_entropy",
    )


def test_flash_attention_that_the_closure_insists_on_is_refused():
    torch.manual_seed(0)
    model, hidden = nn.Linear(4, 12, bias=False), torch.randn(2, 2, 6, 4)

    def loss_fn():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(*model(hidden).chunk(3, -1), is_causal=True).square().mean()

    check_refused(model, loss_fn, r"twice \(derivative for .*flash_attention.* is not implemented\); run .*" + INSTEAD)


@pytest.mark.parametrize("what", ["model", "closure"])
def test_what_is_compiled_is_refused(what):
    model, inputs, labels = network()
    loss_fn = lambda: F.cross_entropy(model(inputs), labels)
    if what == "model":
        model = torch.compile(model, backend="aot_eager")
    else:
        loss_fn = torch.compile(loss_fn, backend="aot_eager")
    # Torch says one or the other, by what else the process has compiled.
    said = r"twice \((torch\.compile with aot_autograd|This backward function was compiled) .*\)"
    check_refused(model, loss_fn, said + "; run the model eagerly .*" + INSTEAD)


def test_checkpoints_hide_parameters_or_do_not():
    model, inputs, labels = network()
    # As with frozen embeddings and adapters: the input asks for a gradient, so that the checkpoint has one.
    inputs.requires_grad_()
    plain = hessian_sharpness(model, lambda: F.cross_entropy(model[1](model[0](inputs)), labels)).value

    def loss_fn(reentrant):
        return F.cross_entropy(model[1](checkpoint(model[0], inputs, use_reentrant=reentrant)), labels)

    assert hessian_sharpness(model, lambda: loss_fn(False)).value == pytest.approx(plain, rel=1e-5)
    check_refused(model, lambda: loss_fn(True), "with use_reentrant=False, got True, which hides .*" + INSTEAD)


def test_attention_that_is_computed_anew_between_checkpoints_is_what_it_was():
    torch.manual_seed(0)
    model, hidden = nn.Linear(8, 24, bias=False), torch.randn(4, 2, 6, 8)

    def attention(x):
        q, k, v = model(x).chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    plain = hessian_sharpness(model, lambda: attention(hidden).square().mean()).value
    anew = lambda: checkpoint(attention, hidden, use_reentrant=False).square().mean()
    assert hessian_sharpness(model, anew).value == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("low", ["autocast", "weights"])
def test_rounding_to_16_bits_is_not_taken_for_a_hidden_gradient(low):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)), torch.randn(64, 64)
    labels = torch.randint(0, 10, (64,))
    if low == "weights":
        model, inputs = model.bfloat16(), inputs.bfloat16()

    def loss_fn():
        with torch.autocast("cpu", torch.bfloat16, enabled=low == "autocast"):
            return F.cross_entropy(model(inputs).float(), labels)

    exact = hessian_sharpness(model.float(), lambda: F.cross_entropy(model(inputs.float()), labels)).value
    model.to(inputs.dtype)
    assert hessian_sharpness(model, loss_fn, tol=0.1).value == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_closure_without_a_graph_is_refused(mode):
    model, inputs, labels = network()
    check_refused(
        model,
        mode()(lambda: F.cross_entropy(model(inputs), labels)),
        r"with its graph, got one without; remove detach\(\), item\(\), no_grad\(\) and inference_mode\(\) from",
        ValueError,
    )
