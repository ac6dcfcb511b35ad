"""Directions: which parameters move, by how much, and per which learning rate."""

import copy
import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sharpkern.directions.direction import Direction
from sharpkern.directions.names import NameTable
from sharpkern.ops.reductions import inner_product

SGD, ADAM, ADAMW, NADAM = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam


class Tied(nn.Module):
    """An embedding whose weight is also the head's, a frozen layer, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.unused = nn.Linear(3, 3)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.embedding(tokens))))


def make_tied(*, gradients: bool = True) -> Tied:
    torch.manual_seed(0)
    model = Tied()
    if gradients:
        backward(model)
    return model


def backward(model: nn.Module, factor: float = 1.0) -> None:
    tokens = torch.arange(10)
    (factor * nn.functional.cross_entropy(model(tokens), tokens.flip(0))).backward()


def moved(direction: Direction) -> dict[int, Tensor]:
    return {id(p): delta for p, delta in zip(direction.parameters, direction.tensors, strict=True)}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(a: Direction, b: Direction) -> None:
    assert list(map(id, a.parameters)) == list(map(id, b.parameters))
    assert all(map(torch.equal, a.tensors, b.tensors))


def linear(value: float = 1.0) -> nn.Linear:
    """A 2 × 3 layer whose weight has gradient ``value`` everywhere, its bias none."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.weight.grad = torch.full((2, 3), value)
    return layer


# Which parameters move: trap 6.


@pytest.mark.parametrize("kind", [SGD, ADAMW, NADAM])
def test_frozen_and_unused_parameters_do_not_move_and_tied_ones_stand_once(kind):
    model = make_tied()
    optimizer = kind(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    direction = Direction.from_optimizer(optimizer)
    optimizer.step()
    real = [id(p) for p, old in zip(model.parameters(), before, strict=True) if not torch.equal(p, old)]
    assert [id(p) for p in direction.parameters] == real
    assert real == [id(model.embedding.weight), id(model.norm.weight), id(model.norm.bias)]


def test_groups_need_neither_names_nor_the_order_of_the_model():
    model = make_tied()
    optimizer = SGD([model.norm.bias], lr=0.1)
    optimizer.add_param_group({"params": [model.embedding.weight]})
    direction = Direction.from_optimizer(optimizer).bind(model)
    assert [id(p) for p in direction.parameters] == [id(model.norm.bias), id(model.embedding.weight)]
    assert all(torch.equal(p.grad, t) for p, t in zip(direction.parameters, direction.tensors, strict=True))


def test_a_wrapped_model_has_the_same_parameters():
    model = make_tied()
    direction = Direction.from_optimizer(SGD(model.parameters(), lr=0.1))
    wrapped = nn.Sequential(model)
    assert direction.bind(wrapped) is direction


def test_a_copy_of_the_model_is_not_the_model():
    model = make_tied()
    direction = Direction.from_optimizer(SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"the model's own parameters, got 3 of 3 that are not \(the first of shape"):
        direction.bind(copy.deepcopy(model))


# Learning rates per group: trap 7.


@pytest.mark.parametrize("kind", [SGD, ADAM, ADAMW, NADAM])
def test_groups_move_by_their_own_ratio(kind):
    model = make_tied()
    groups = [
        {"params": [model.frozen.weight], "lr": 7.0},
        {"params": [model.unused.weight], "lr": 5.0},
        {"params": [model.embedding.weight], "lr": 0.0},
        {"params": [model.norm.weight], "lr": 0.01},
        {"params": [model.norm.bias], "lr": 0.003},
    ]
    optimizer = kind(groups)
    direction = Direction.from_optimizer(optimizer)
    # The first group with a gradient and a positive rate.
    assert direction.lr == 0.01
    assert [id(p) for p in direction.parameters] == [id(model.norm.weight), id(model.norm.bias)]
    before = [p.detach().clone() for p in direction.parameters]
    optimizer.step()
    for theta, delta, p in zip(before, direction.tensors, direction.parameters, strict=True):
        torch.testing.assert_close(theta - direction.lr * delta, p.detach(), rtol=3e-7, atol=1e-9)


@settings(derandomize=True, max_examples=25, deadline=None)
@given(lr=st.floats(1e-5, 10), ratio=st.floats(1e-3, 1e3), decay=st.floats(0, 1))
def test_sgd_is_gradient_plus_decay_times_the_ratio(lr, ratio, decay):
    layer = linear(2.0)
    layer.bias.grad = torch.ones(2)
    groups = [{"params": [layer.weight], "lr": lr}, {"params": [layer.bias], "lr": lr * ratio}]
    direction = Direction.from_optimizer(SGD(groups, weight_decay=decay))
    torch.testing.assert_close(direction.tensors[0], 2 + decay * layer.weight.detach())
    torch.testing.assert_close(direction.tensors[1], ratio * (1 + decay * layer.bias.detach()))
    assert direction.lr == lr


def test_the_first_step_of_adam_is_the_sign_of_the_gradient():
    layer = linear()
    layer.weight.grad.copy_(torch.tensor([[3.0, -2.0, 1e-3], [-5.0, 1.0, 0.0]]))
    direction = Direction.from_optimizer(ADAM([layer.weight], lr=0.1))
    torch.testing.assert_close(direction.tensors[0], layer.weight.grad.sign(), rtol=2e-5, atol=0)


# Master weights.


@pytest.mark.parametrize("kind", [SGD, ADAMW, NADAM])
def test_an_optimizer_of_masters_moves_the_parameters_in_the_precision_of_the_masters(kind):
    layer = linear().bfloat16()
    master = layer.weight.detach().float() + 1e-4
    master.grad = torch.full((2, 3), 0.1)
    direction = Direction.from_optimizer(kind([master], lr=1e-4), masters={layer.weight: master}).bind(layer)
    alone = Direction.from_optimizer(kind([master], lr=1e-4))
    assert direction.parameters[0] is layer.weight
    assert direction.masters[0] is master
    assert direction.tensors[0].dtype is torch.float32
    assert torch.equal(direction.tensors[0], alone.tensors[0])


@pytest.mark.parametrize("kind", [SGD, ADAMW, NADAM])
def test_masters_beside_the_optimizer_are_what_decays(kind):
    layer = linear().bfloat16()
    layer.weight.grad = torch.full((2, 3), 0.1).bfloat16()
    master = layer.weight.detach().float() + 1e-3
    reference = nn.Parameter(master.clone())
    reference.grad = layer.weight.grad.float()
    options = {"lr": 1e-2, "weight_decay": 0.5}
    expected = Direction.from_optimizer(kind([reference], **options))
    direction = Direction.from_optimizer(kind([layer.weight], **options), masters={layer.weight: master})
    assert direction.masters[0] is master
    assert torch.equal(direction.tensors[0], expected.tensors[0])


def test_masters_in_the_state_are_found():
    class WithMasters(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})
            for p in self.param_groups[0]["params"]:
                self.state[p]["master_param"] = p.detach().float()

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p]["master_param"].sub_(p.grad.float(), alpha=self.param_groups[0]["lr"])
                p.copy_(self.state[p]["master_param"].bfloat16())

    layer = linear().bfloat16()
    layer.weight.grad = torch.full((2, 3), 0.1).bfloat16()
    optimizer = WithMasters([layer.weight], lr=1e-3)
    master = optimizer.state[layer.weight]["master_param"]
    before = master.clone()
    direction = Direction.from_optimizer(optimizer)
    assert direction.masters[0] is master
    assert torch.equal(master, before)
    torch.testing.assert_close(direction.tensors[0], layer.weight.grad.float(), rtol=1e-3, atol=0)


# Loss scaling: trap 21.


@pytest.mark.parametrize("kind", [SGD, ADAMW, NADAM])
def test_the_scale_of_the_loss_is_taken_out_of_the_gradients_once(kind):
    plain = make_tied()
    expected = Direction.from_optimizer(kind(plain.parameters(), lr=0.1))

    model = make_tied(gradients=False)
    optimizer = kind(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # the scale is made at first use
    backward(model, factor=scaler.get_scale())
    scaled = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    still_scaled = Direction.from_optimizer(optimizer, scaler=scaler)
    assert all(map(torch.equal, scaled, (p.grad for p in model.parameters() if p.grad is not None)))
    assert id(optimizer) not in scaler._per_optimizer_states
    scaler.unscale_(optimizer)
    unscaled = Direction.from_optimizer(optimizer, scaler=scaler)
    for direction in (still_scaled, unscaled):
        assert direction.slope == pytest.approx(expected.slope, rel=1e-6)
        for a, b in zip(direction.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    scaler.step(optimizer)
    with pytest.raises(ValueError, match=re.escape("call Direction.from_optimizer before scaler.step(optimizer)")):
        Direction.from_optimizer(optimizer, scaler=scaler)


def test_a_disabled_scaler_changes_nothing():
    layer = linear(2.0)
    optimizer = SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert_same(Direction.from_optimizer(optimizer, scaler=scaler), Direction.from_optimizer(optimizer))


class SubclassOfSGD(SGD):
    """Has no closed form, as any subclass."""


@pytest.mark.parametrize("kind", [SGD, SubclassOfSGD])
def test_the_scale_that_a_fused_step_finds_on_the_optimizer_is_the_whole_of_it(kind):
    """Inside scaler.step() of a fused optimizer, where a pre-hook may measure, the gradients are still scaled."""
    layer = linear(8.0)
    optimizer = kind([layer.weight], lr=0.125, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    seen: list[Direction] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(Direction.from_optimizer(optimizer, scaler=scaler)))
    seen.append(Direction.from_optimizer(optimizer, scaler=scaler))
    scaler.step(optimizer)
    assert len(seen) == 2
    for direction in seen:
        torch.testing.assert_close(direction.tensors[0], torch.full((2, 3), 2.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [SGD, NADAM])
def test_the_scaler_that_accelerates_wrapper_carries_is_found(kind):
    accelerate = pytest.importorskip("accelerate", reason="an extra")
    accelerate.Accelerator(cpu=True)
    layer = linear(8.0)
    inner = kind(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    wrapped = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    assert_same(Direction.from_optimizer(wrapped), Direction.from_optimizer(inner, scaler=scaler))


# Gradients, tensors, two sets of weights.


def test_gradients_are_a_direction_whose_slope_is_their_square():
    model = make_tied()
    direction = Direction.from_gradients(model)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    square = sum(float(g.double().square().sum()) for g in grads)
    assert all(t.data_ptr() == g.data_ptr() for t, g in zip(direction.tensors, grads, strict=True))
    assert direction.slope == direction.norm_sq == pytest.approx(square, rel=1e-14)
    assert direction.lr is None
    assert direction.bind(model) is direction


def test_gradients_that_changed_since_are_no_longer_the_direction():
    model = make_tied()
    direction = Direction.from_gradients(model)
    backward(model)
    with pytest.raises(ValueError, match="must hold what it was made with, got tensors written since"):
        direction.bind(model)


def test_tensors_go_by_name_or_by_parameter():
    model = make_tied()
    by_name = {name: torch.ones_like(p) for name, p in model.named_parameters() if p.requires_grad}
    by_parameter = {p: torch.ones_like(p) for p in model.parameters() if p.requires_grad}
    direction = Direction.from_tensors(by_name, model)
    assert_same(direction, Direction.from_tensors(by_parameter, model))
    assert (direction.slope, direction.lr) == (None, None)
    assert direction.norm_sq == sum(p.numel() for p in by_parameter)
    ddp_name = {f"module._orig_mod.{name}": tensor for name, tensor in by_name.items()}
    assert_same(direction, Direction.from_tensors(ddp_name, model))


def test_both_names_of_a_tied_weight_may_be_given_if_they_agree():
    model = make_tied()
    ones = torch.ones(10, 6)
    direction = Direction.from_tensors({"embedding.weight": ones, "head.weight": ones.clone()}, model)
    assert direction.norm_sq == 60
    with pytest.raises(ValueError, match=r"for 'head\.weight' must be given once, got two different tensors"):
        Direction.from_tensors({"embedding.weight": ones, "head.weight": 2 * ones}, model)


def step_of(model: nn.Module) -> tuple[Direction, dict[str, Tensor], dict[str, Tensor]]:
    optimizer = SGD(model.parameters(), lr=0.5)
    expected, before = Direction.from_optimizer(optimizer), weights(model)
    optimizer.step()
    model.norm.running_mean += 1
    return expected, before, weights(model)


@pytest.mark.parametrize("form", ["module-state", "state-module", "states", "wrapped states", "modules", "parameters"])
def test_between_two_sets_of_weights(form):
    model = make_tied()
    old = copy.deepcopy(model)
    old_parameters = {p: p.detach().clone() for p in model.parameters()}
    expected, before, after = step_of(model)
    wrapped = {f"module.{name}": value for name, value in before.items()}
    sides, measured = {
        "module-state": ((old, after), old),
        "state-module": ((before, model), model),
        "states": ((before, after), model),
        "wrapped states": ((wrapped, after), model),
        "modules": ((old, model), old),
        "parameters": ((old_parameters, model), model),
    }[form]
    unbound = Direction.between(*sides, 0.5)
    direction = unbound.bind(measured)
    position = {id(p): index for index, p in enumerate(measured.parameters())}
    expected_position = {id(p): index for index, p in enumerate(model.parameters())}
    found = {position[key]: delta for key, delta in moved(direction).items()}
    assert direction.lr == 0.5
    assert direction.slope is None
    assert len(found) == 7
    for key, delta in moved(expected).items():
        torch.testing.assert_close(found.pop(expected_position[key]), delta, rtol=1e-5, atol=1e-6)
    assert all(float(delta.abs().max()) == 0 for delta in found.values())
    assert direction.norm_sq == pytest.approx(expected.norm_sq, rel=1e-5)


def test_between_divides_16_bit_differences_in_float32():
    before, after = (nn.Linear(20, 20, bias=False).bfloat16() for _ in range(2))
    direction = Direction.between(before, after.state_dict(), 3e-3)
    expected = (before.weight.float() - after.weight.float()) / 3e-3
    assert torch.equal(direction.tensors[0], expected.detach().bfloat16())


def test_parameters_that_a_snapshot_lacks_do_not_move():
    model = make_tied()
    before = {"norm.bias": model.norm.bias.detach() + 1}
    direction = Direction.between(before, model, 1.0)
    assert [id(p) for p in direction.parameters] == [id(model.norm.bias)]


def test_a_name_that_two_parameters_share_without_their_wrappers_is_unknown():
    one, two = object(), object()
    table = NameTable({"module.a": one, "_orig_mod.a": two, "b": one, "module.b": one, "c.module.d": two})
    assert table.find("module.a") is one
    assert table.find("a") is None
    assert table.find("module.module.b") is one
    # Only in front is "module" a wrapper's name.
    assert table.find("c.d") is None


def test_inner_products_are_summed_over_all_chunks(monkeypatch):
    monkeypatch.setattr("sharpkern.ops.arithmetic.CPU_CHUNK", 7)
    a, b = torch.randn(5, 9), torch.randn(9, 5).T
    assert float(inner_product(a, b)) == pytest.approx(float((a.double() * b.double()).sum()), rel=1e-14)


def test_repr_says_what_it_is():
    layer = linear(2.0)
    assert repr(Direction.from_optimizer(SGD([layer.weight], lr=0.1))) == (
        "Direction(1 tensors, 6 elements, |Δθ| = 4.9, slope = 24, lr = 0.1)"
    )
    unbound = Direction.between({"weight": torch.ones(2)}, {"weight": torch.zeros(2)}, 1.0)
    assert repr(unbound) == "Direction(1 tensors, 2 elements, |Δθ| = 1.41, lr = 1, by name)"


def test_a_direction_cannot_be_changed():
    direction = Direction.from_gradients(linear())
    with pytest.raises(AttributeError):
        direction.slope = 0.0
