"""Compiled models and losses: measured without compiling anything, and trained as if nobody had measured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sharpkern

pytestmark = [
    # Dynamo looks for gradients of what flows through the model, inductor at scripted modules that it does not use.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

Inputs = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """A residual layer that knows its number, as those of transformers do: Dynamo makes a graph for each number."""

    def __init__(self, number: int, width: int = 16) -> None:
        super().__init__()
        self.number, self.linear, self.dropout = number, nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(torch.tanh(self.linear(x))) / (1 + self.number)


class Layers(nn.Module):
    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Layer(number) for number in range(num_layers))
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Graphs:
    """A backend of torch.compile that counts what it is given to compile, and what of it is run.

    Attributes:
        compiled: graphs so far.
        calls: of all of them so far.
    """

    def __init__(self) -> None:
        self.compiled = self.calls = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.compiled += 1

        def counted(*args: Any) -> Any:
            self.calls += 1
            return graph(*args)

        return counted


# How people compile: each takes a model and options of torch.compile, and returns the model and the loss of a batch.


def _loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def wrapped(model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    model = torch.compile(model, **options)
    return model, _loss_of(model)


def by_method(model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    model.compile(**options)
    return model, _loss_of(model)


def blocks(model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    for block in model.blocks:
        block.compile(**options)
    return model, _loss_of(model)


def wrapped_blocks(model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, **options)
    return model, _loss_of(model)


def loss_function(model: nn.Module, **options: Any) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return model, torch.compile(_loss_of(model), **options)


def not_compiled(model: nn.Module) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    return model, _loss_of(model)


# The engine that is taken, and the functions that are compiled: two layers, or all in one. A loss function that a
# closure calls is not seen to be compiled: the virtual engine runs it eagerly.
WAYS = {
    wrapped: ("inplace", 1),
    by_method: ("inplace", 1),
    blocks: ("inplace", 2),
    wrapped_blocks: ("inplace", 2),
    loss_function: ("virtual", 1),
}


class Run:
    """Some steps of training, each on a batch of its own.

    Attributes:
        weights: after the last step.
        stream: state of torch's random stream after it.
        history: of the monitor.
    """

    def __init__(
        self, how: Callable[..., Any], model: nn.Module, batches: list[Inputs], *, every: int | None, **options: Any
    ) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, loss_of = how(model, **options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        monitor = sharpkern.Monitor(model, optimizer, every=every) if every else None
        for x, y in batches:
            loss_fn = lambda x=x, y=y: loss_of(x, y)
            optimizer.zero_grad()
            loss_fn().backward()
            if monitor is not None:
                monitor(loss_fn)
            optimizer.step()
        self.weights = [parameter.detach().clone() for parameter in model.parameters()]
        self.stream = torch.get_rng_state()
        self.history = [] if monitor is None else [record.measurement for record in monitor.history]

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Run)
        return torch.equal(self.stream, other.stream) and all(map(torch.equal, self.weights, other.weights))

    __hash__ = None


def layers(num_layers: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return Layers(num_layers).double()


def rows(num: int = 32) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(32, 16, generator=generator).double(), torch.randint(0, 10, (32,), generator=generator)
    return x[:num], y[:num]


# The last batch of a data set is often a smaller one, for which another graph is made.
BATCHES = [rows()] * 48 + [rows(20)] * 3


@pytest.fixture(scope="module")
def eager() -> Run:
    return Run(not_compiled, layers(), BATCHES, every=None)


@pytest.fixture(scope="module")
def measured_eagerly() -> Run:
    return Run(not_compiled, layers(), BATCHES, every=2)


@pytest.mark.parametrize("how", WAYS, ids=lambda how: how.__name__)
def test_nothing_is_compiled_and_nothing_changes(how: Callable[..., Any], eager: Run, measured_eagerly: Run) -> None:
    engine, num_functions = WAYS[how]
    graphs = Graphs()
    measured = Run(how, layers(), BATCHES, every=2, backend=graphs)
    # The graphs of this backend round as the eager run does.
    assert measured == eager == measured_eagerly
    assert graphs.compiled == 2 * num_functions
    assert graphs.calls == len(BATCHES) * num_functions
    assert len(measured.history) == 26
    assert {m.engine for m in measured.history} == {engine}
    for m, e in zip(measured.history, measured_eagerly.history, strict=True):
        assert m.status == "converged"
        assert m.critical_lr == pytest.approx(e.critical_lr, rel=1e-5)


def test_a_compiled_closure_is_measured_in_place() -> None:
    (model, loss_of), (x, y), graphs = not_compiled(layers()), rows(), Graphs()
    torch._dynamo.reset()
    closure = lambda: loss_of(x, y)
    compiled = torch.compile(closure, backend=graphs)
    compiled().backward()
    direction = sharpkern.Direction.from_gradients(model)
    measured = sharpkern.critical_sharpness(model, compiled, direction)
    assert measured.engine == "inplace"
    assert graphs.compiled == 1
    assert measured.critical_lr == pytest.approx(
        sharpkern.critical_sharpness(model, closure, direction).critical_lr, rel=1e-5
    )


def test_graphs_that_the_run_has_for_evaluation_are_used() -> None:
    (x, y), graphs = rows(), Graphs()
    torch._dynamo.reset()
    model, loss_of = wrapped(layers(), backend=graphs)
    loss_fn = lambda: loss_of(x, y)
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    before = graphs.calls
    eagerly = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert (graphs.compiled, graphs.calls) == (1, before)
    with torch.random.fork_rng(), torch.no_grad():
        loss_fn()
    before = graphs.calls
    by_graph = sharpkern.critical_sharpness(model, loss_fn, direction)
    assert (graphs.compiled, graphs.calls) == (2, before + by_graph.forwards)
    assert by_graph.critical_lr == pytest.approx(eagerly.critical_lr, rel=1e-5)


def test_a_run_keeps_all_of_dynamos_graphs_to_itself() -> None:
    """Dynamo compiles a function 8 times and then refuses: here for four layers, and for four with smaller batches."""
    graphs = Graphs()
    batches = [rows(), rows(20)]
    measured = Run(blocks, layers(4), batches, every=1, backend=graphs, fullgraph=True)
    assert measured == Run(not_compiled, layers(4), batches, every=None)
    assert graphs.compiled == torch._dynamo.config.recompile_limit == 8


@pytest.mark.parametrize("how", ["by a stance", "by an option"])
def test_a_run_that_forbids_further_graphs_is_measured(how: str) -> None:
    (x, y), graphs = rows(), Graphs()
    torch._dynamo.reset()
    model, loss_of = wrapped(layers(), backend=graphs)
    loss_fn = lambda: loss_of(x, y)
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    stance = "fail_on_recompile" if how == "by a stance" else "default"
    with (
        torch.compiler.set_stance(stance),
        torch._dynamo.config.patch(error_on_recompile=how == "by an option"),
    ):
        assert sharpkern.critical_sharpness(model, loss_fn, direction).status == "converged"
        with torch.no_grad(), pytest.raises(Exception, match=r"(?i)recompil"):
            loss_fn()


@pytest.mark.long
def test_the_default_backend() -> None:
    """It rounds unlike an eager run, so that a step which is not taken by its code shows."""
    x, y = rows()
    batches = [(x.float(), y)] * 50
    measured = Run(wrapped, layers().float(), batches, every=2, mode="reduce-overhead")
    assert measured == Run(wrapped, layers().float(), batches, every=None, mode="reduce-overhead")
    assert measured != Run(not_compiled, layers().float(), batches, every=None)
    assert {m.engine for m in measured.history} == {"inplace"}
