"""One parameter in several places: it stands in a direction once, and moves in all of them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sharpkern
from tests.helpers.cases import tokens
from tests.helpers.language_models import gpt2, llama
from tests.helpers.models import GPT
from tests.helpers.oracle import LossFn, engine_losses

STEP_SIZES = (0.3, 1.0)


class Recurrent(nn.Module):
    """The same layer several times over, and its weight once more the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 16)
        self.layer, self.back = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.back.weight = self.layer.weight
        self.layers = nn.ModuleList([self.layer, self.layer])

    def forward(self, tokens_BT: Tensor) -> Tensor:
        x = self.embed(tokens_BT)
        for layer in (*self.layers, self.back):
            x = x + torch.tanh(layer(x))
        return x @ self.embed.weight.T


def loss_of(model: nn.Module) -> LossFn:
    x = tokens()

    def loss_fn() -> Tensor:
        output = model(x[:, :-1])
        logits = output if isinstance(output, Tensor) else output.logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())

    return loss_fn


def in_one_place(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy of a model in which the first of these names is of a parameter of its own."""
    model = copy.deepcopy(model)
    *path, last = names[0].split(".")
    module = model.get_submodule(".".join(path))
    setattr(module, last, nn.Parameter(getattr(module, last).detach().clone()))
    return model


@pytest.mark.parametrize("engine", ["virtual", "batched", "inplace"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: GPT(dropout=0.0),
        Recurrent,
        lambda: llama(tie_word_embeddings=True),
        lambda: gpt2(tie_word_embeddings=True),
    ],
    ids=["gpt", "recurrent", "llama", "gpt2"],
)
def test_every_use_moves(build: Callable[[], nn.Module], engine: str) -> None:
    model = build()
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    (tied,) = (p for p in model.parameters() if len(places[id(p)]) > 1)
    names = places[id(tied)]
    delta = torch.randn(tied.shape, generator=torch.Generator().manual_seed(3)) * tied.detach().std()
    direction = sharpkern.Direction.from_tensors(dict.fromkeys(names, delta), model)
    assert [id(parameter) for parameter in direction.parameters] == [id(tied)]
    losses = engine_losses(engine, model, loss_of(model), direction, STEP_SIZES)

    def moved(copied: nn.Module, names: list[str]) -> list[float]:
        """Losses of a copy in which the parameters of these names were moved, each once."""
        parameters = {id(p): p for name, p in copied.named_parameters(remove_duplicate=False) if name in names}
        values, done = [], 0.0
        with torch.no_grad():
            for eta in STEP_SIZES:
                for parameter in parameters.values():
                    parameter.sub_(delta, alpha=eta - done)
                done = eta
                values.append(loss_of(copied)().item())
        return values

    assert losses == pytest.approx(moved(copy.deepcopy(model), names), rel=1e-5)
    # One use alone is another function: or else the comparison would tell nothing.
    assert losses != pytest.approx(moved(in_one_place(model, names), names[:1]), rel=1e-4)


def test_the_optimizers_update_of_a_tied_weight_is_that_of_all_its_gradients() -> None:
    model = llama(tie_word_embeddings=True)
    loss_of(model)().backward()
    direction = sharpkern.Direction.from_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    assert len(direction.parameters) == len(list(model.parameters()))
    deltas = {id(p): delta for p, delta in zip(direction.parameters, direction.tensors, strict=True)}
    assert torch.equal(deltas[id(model.lm_head.weight)], model.model.embed_tokens.weight.grad)
    measured = sharpkern.critical_sharpness(model, loss_of(model), direction)
    assert (measured.status, measured.engine) == ("converged", "virtual")
