"""Which ranks decide together: read off the model where it says so, found out by comparing them where nothing does.

Wrappers such as `DistributedDataParallel` and DTensors name their process groups. Gradients averaged by hand leave no
trace. So ranks that nothing tells of compare themselves: each leaves in torch's key-value store what it holds, the last
to come judges for all, and none waits longer than `_PATIENCE` for one that does not come. A collective would hang where
only some of the ranks measure. All ranks of the run are compared, no subgroup of them.

They do so at the first measurement, by an evaluation of the loss. Those found to train one model meet again at every
measurement, without one: perhaps only some of them come.

| found                                                   | then                                                     |
|---------------------------------------------------------|----------------------------------------------------------|
| the same weights, update and learning rate; other losses | one model on several batches: the mean over all ranks    |
| the same weights; other updates and losses              | error: gradients are not averaged                        |
| other weights; closures that talk to other ranks        | error: a model that is split over ranks needs `ranks=`   |
| other weights                                           | each alone: replicas, sweeps, adversaries, actors        |
| all the same                                            | the mean, which is each one's own; compared again later  |
| not all come                                            | each alone, with a warning                               |

A caller who passes ``ranks=`` has said it all. A caller's own ``reduce=`` says that ranks decide alike. Those whose
losses it makes the same must then move alike.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from sharpkern.distributed.declared import Declared, Ranks, device_of
from sharpkern.distributed.deepspeed import is_engine
from sharpkern.distributed.flat import is_flat_module, is_inside
from sharpkern.distributed.layout import Layout, layout_of
from sharpkern.distributed.lockstep import replicate_state
from sharpkern.distributed.ranks import Alone, Peers, Together, Verdict, device_kind, raise_gravest
from sharpkern.distributed.sharding import is_distributed, local, local_as, over_shards, reshard
from sharpkern.engines.evaluation.reach import Reached
from sharpkern.engines.judging import Facts, decided, judged, missed
from sharpkern.errors import UncheckedWarning, warn
from sharpkern.ops.reductions import inner_product, to_host

# Seconds that ranks wait for others, the first time that one does not come, and from then on.
_PATIENCE = 5.0
_LITTLE_PATIENCE = 0.5
# Measurements after which ranks that nothing told apart are left to themselves.
_ATTEMPTS = 10


def num_ranks() -> int:
    """Ranks of the run, 1 where there is but one process, or only a stand-in for others."""
    if not is_distributed() or distributed.get_backend() == "fake":
        return 1
    return distributed.get_world_size()


def outermost(model: nn.Module, loss_fns: Iterable[Callable[..., object]]) -> nn.Module:
    """The wrapper that communicates in the passes of closures which call the model through one; else the model."""
    if num_ranks() == 1 or (any(map(_is_wrapper, model.modules())) and not is_inside(model)):
        return model
    known = _around.get(model)
    around = None if known is None else known()
    if around is not None:
        return around
    parameters = {id(parameter) for parameter in model.parameters()}
    reached = Reached(*loss_fns)
    reached.follow()
    for module in reached.modules:
        if _is_wrapper(module) and any(id(parameter) in parameters for parameter in module.parameters()):
            _around[model] = ref(module)
            return module
    return model


def ranks_for(
    model: nn.Module,
    reduce: Callable[[Tensor], Tensor] | None,
    outer: nn.Module,
    ranks: Ranks | str | None = None,
) -> Peers:
    """The ranks that decide alike, as far as it is known."""
    reshard(outer)
    # An engine that cannot be measured is refused before anything is.
    layout = layout_of(outer)
    if ranks is not None and is_distributed():
        return _as_told(ranks, model, layout)
    # What is around a whole model may be for training alone, while one rank evaluates the model inside.
    told, found = layout.ranks() if layout.copied else named_ranks(model), _known(model)
    if num_ranks() > 1 and not (found.reduced if reduce else told or found.together is False):
        return Unsettled(model, reduce)
    return Alone(reduce) if reduce else told or Alone()


def _as_told(ranks: Ranks | str, model: nn.Module, layout: Layout) -> Peers:
    """The ranks as the caller has named them."""
    if isinstance(ranks, Ranks):
        return Declared(ranks, layout, device_of(model, ranks))
    if layout.copied:
        raise ValueError(
            f"ranks must not be 'alone' where {layout.copied}, which all ranks gather together; leave ranks out"
        )
    return Alone()


@dataclass
class _Findings:
    """What is known of the ranks that hold a model.

    Attributes:
        together: they train it on a batch each, at least when they were compared; None where it is not known yet.
        attempts: comparisons that told nothing.
        reduced: a caller's own function of the loss was found to fit.
    """

    together: bool | None = None
    attempts: int = 0
    reduced: bool = False


_findings: WeakKeyDictionary[nn.Module, _Findings] = WeakKeyDictionary()
# The wrappers are not held.
_around: WeakKeyDictionary[nn.Module, "ref[nn.Module]"] = WeakKeyDictionary()


def _known(model: nn.Module) -> _Findings:
    return _findings.setdefault(model, _Findings())


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module says which ranks there are, or that it cannot be measured."""
    averages = isinstance(module, DistributedDataParallel) or replicate_state(module) is not None
    return averages or is_engine(module) or is_flat_module(module)


def named_ranks(model: nn.Module) -> Together | None:
    """The ranks that a model's wrappers or its DTensors name."""
    if not is_distributed():
        return None
    return layout_of(model).ranks()


class Listening(TorchDispatchMode):
    """Notes whether what runs under it talks to other ranks.

    Attributes:
        heard: whether it did.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.heard = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.heard |= "c10d" in getattr(func, "namespace", "")
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def size_of(
    moves: Iterable[tuple[Tensor, Tensor | Callable[[], Tensor] | None]], ranks: Peers | None = None
) -> tuple[float, float, float]:
    """|θ|², θᵀΔθ and |Δθ|² of all of the model, as far as this is known."""
    parameters, sums = [], []
    for parameter, update in moves:
        theta = local(parameter.detach())
        delta = torch.zeros_like(theta) if update is None else update() if callable(update) else update
        delta = local_as(delta.detach(), parameter)
        parameters.append(parameter)
        sums.append(torch.stack([inner_product(a, b) for a, b in ((theta, theta), (theta, delta), (delta, delta))]))
    totals = over_shards(parameters, sums)
    rows = list(zip(*(to_host([one[k] for one in totals]) for k in range(3)), strict=True))
    theta_sq, along, norm_sq = (ranks or Alone()).totals(parameters, rows, 3)
    return theta_sq, along, norm_sq


class Unsettled(Alone):
    """Ranks that have yet to compare themselves: each alone until then, but that one which fails tells the others.

    Attributes:
        listening: to be entered around the evaluation whose loss is compared.
        were_together: they were found to train one model, so that there is no need to evaluate it.
    """

    def __init__(self, model: nn.Module, reduce: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__(reduce)
        self._model = model
        self.listening = Listening()
        self.were_together = reduce is None and _known(model).together is True

    def agree(
        self, loss: Tensor | None, failure: BaseException | None = None, *, asks: bool = False, random: bool = False
    ) -> Verdict:
        """As alone, having told others of a failure; with a function of the caller's own they wait in that."""
        try:
            if self._reduce is None and isinstance(failure, Exception):
                _meet({"failure": device_kind(failure)})
            with self.listening:
                verdict = super().agree(loss, failure, asks=asks, random=random)
            self.listening.heard |= loss is not None and self._reduce is not None and verdict.loss != float(loss)
            return verdict
        finally:
            del failure

    def all_come(self) -> bool:
        """Whether all ranks are there to evaluate their losses, in which they may need each other."""
        if self.were_together or self._reduce is not None:
            return True
        verdict = self._heeded(_meet({"ready": True}))
        if "warning" in verdict:
            _known(self._model).together = False
        return "ready" in verdict

    def settled(self, facts: Facts) -> Peers:
        """Compare with the other ranks."""
        found = _known(self._model)
        talks, reduces = self.listening.heard, self._reduce is not None
        # A function that concerns this rank alone has nobody to compare with.
        verdict: Mapping[str, Any] = decided(None)
        if talks or not reduces:
            verdict = self._heeded(_meet(asdict(replace(facts, talks=talks, reduces=reduces))))
        if reduces:
            found.reduced = True
            return Alone(self._reduce)
        if verdict["together"] is not None:
            found.together = verdict["together"]
        elif not self.were_together:
            found.attempts += 1
            found.together = False if found.attempts == _ATTEMPTS else None
        if not verdict["mean"]:
            return Alone()
        return Together([distributed.group.WORLD], next(self._model.parameters()).device)

    def _heeded(self, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
        """Raise or warn as a verdict says."""
        if "failures" in verdict:
            raise_gravest(None, verdict["failures"], num_ranks())
        if "error" in verdict:
            raise ValueError(verdict["error"])
        if "warning" in verdict:
            warn(verdict["warning"], UncheckedWarning)
        return verdict


def _meet(said: Mapping[str, Any]) -> Mapping[str, Any]:
    """Say something to all ranks and wait for the others to do so, but not for long; the verdict, the same for all."""
    c10d: Any = distributed.distributed_c10d
    default = c10d._get_default_store()
    if default is None:
        return missed(1, num_ranks())
    try:
        store = c10d.PrefixStore("sharpkern", default)
        patience = _LITTLE_PATIENCE if store.add("missed", 0) else _PATIENCE
        end, pause = time.monotonic() + patience, 1e-3
        # Ranks that measure something else in between, or come late, find each other in the round that is open.
        number: int = store.add("round", 0)
        store.set(f"{number}/{distributed.get_rank()}", json.dumps(said))
        if store.add(f"{number}/here", 1) >= num_ranks():
            _close(store, number)
        while not store.check([f"{number}/verdict"]):
            late = time.monotonic() - end
            if late > patience:
                # Whoever was to judge is gone.
                return missed(1, num_ranks())
            if late > 0:
                _close(store, number)
            time.sleep(pause)
            pause = min(1.5 * pause, 0.05)
        verdict: Mapping[str, Any] = json.loads(store.get(f"{number}/verdict"))
    except RuntimeError:
        # The rank that keeps the store has ended.
        return missed(1, num_ranks())
    return verdict


def _close(store: Any, number: int) -> None:
    """Judge a round and open the next one, unless another rank does."""
    if store.add(f"{number}/closed", 1) > 1:
        return
    size = num_ranks()
    here = [rank for rank in range(size) if store.check([f"{number}/{rank}"])]
    if len(here) < size:
        store.add("missed", 1)
    verdict = judged([json.loads(store.get(f"{number}/{rank}")) for rank in here], size)
    # Whoever reads the verdict may meet again at once.
    store.add("round", 1)
    store.set(f"{number}/verdict", json.dumps(verdict))
