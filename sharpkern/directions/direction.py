"""Update directions: how the parameters move per unit learning rate, θ⁺ = θ − ηΔθ, and where that comes from."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from sharpkern.directions.blocks import items_of, selected
from sharpkern.directions.difference import Weights, displacements
from sharpkern.directions.from_optimizer import optimizer_update
from sharpkern.directions.names import NameTable
from sharpkern.directions.optimizer_state import check_gradient, check_parameter
from sharpkern.directions.placement import check_fit, checked_module, placed
from sharpkern.directions.preconditioner import inverse_preconditioner
from sharpkern.directions.shared_memory import also_moved, norm_once, summed
from sharpkern.distributed.declared import Ranks, splits
from sharpkern.distributed.flat import is_flat
from sharpkern.distributed.sharding import local, local_as, over_shards, reshard
from sharpkern.errors import NoUpdateError
from sharpkern.ops.reductions import inner_product, slopes_and_norms, to_host
from sharpkern.ops.together import sums_of_steps
from sharpkern.ops.update import LazyUpdate, ParamUpdate, StoredUpdate

# Tensors whose |Δθ|² is taken again before a direction that is not in memory is used, and by how much it may differ:
# less than any step that matters, more than another backend's roundings.
_NUM_WITNESSES = 4
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Direction:
    """An update direction Δθ, made by one of the class methods.

    Parameters are known by identity, never by position; a tied weight stands once, and parameters that are not listed
    do not move. Parameters that share memory (``decoder.weight.data = encoder.weight.data.T``) move as one: an
    optimizer's updates of them add up, and `bind` adds those that are not listed. Nothing here is ever written.

    Attributes:
        parameters: the parameters that move; empty as long as only their names are known, see `bind`.
        sources: for each its Δθ, or this rank's shard of it, of its shape and on its device, in a floating dtype that
            may be wider than its own; or the optimizer step that Δθ is worked out of whenever it is needed.
        masters: for each the higher-precision copy that it is the rounding of, or None.
        slope: Δθᵀg, to the digits of float32 at least, in units of loss/learning-rate; None where no gradient belongs
            to Δθ. Where an optimizer maximizes, g is the gradient of what falls: minus the loss. Under FSDP1, and where
            ``ranks=`` split the model, it is of this rank's part, and a measurement adds up the parts.
        norm_sq: |Δθ|², likewise; of this rank's part as the slope is.
        lr: learning rate of the reference group, whose unit Δθ is per; None where it comes from no optimizer.

    Source:
        Kalra et al. 2026, "A Scalable Measure of Loss Landscape Curvature".

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(torch.ones(3, 2)).mean().backward()
        >>> Direction.from_optimizer(optimizer)
        Direction(2 tensors, 3 elements, |Δθ| = 1.73, slope = 3, lr = 0.1)
    """

    parameters: tuple[nn.Parameter, ...]
    sources: tuple[Tensor | LazyUpdate, ...]
    masters: tuple[Tensor | None, ...]
    slope: float | None
    norm_sq: float
    lr: float | None
    _names: tuple[str, ...] = field(default=(), repr=False)
    _norms_sq: tuple[float, ...] = field(default=(), repr=False)
    _slopes: tuple[float, ...] = field(default=(), repr=False)
    _part: "tuple[Direction, tuple[Any, ...]] | None" = field(default=None, repr=False)
    _versions: tuple[int, ...] = field(default=(), repr=False)
    # This rank's share of a direction: others hold the rest, so that it may move nothing, and its sums are of its own.
    _is_share: bool = field(default=False, repr=False)
    # Its parameters are no model's, but what is moved in their place; see `sharpkern.distributed.layout`.
    _of_pieces: bool = field(default=False, repr=False)
    # What clipping will multiply the gradient by, where the direction knows it.
    _clip: float | None = field(default=None, repr=False)

    @classmethod
    @torch.no_grad()
    def from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        *,
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        scaler: GradScaler | None = None,
        resident: bool | None = None,
        ranks: Ranks | str | None = None,
    ) -> "Direction":
        """Return the update that the next ``optimizer.step()`` would make.

        Call it between ``backward()`` (and clipping) and ``step()``. SGD, Adam, AdamW, RMSprop and lion-pytorch's Lion
        have a closed form; any other optimizer, a wrapper of another one included, takes one step on a copy of itself.
        Without a learning rate an optimizer finds its own step: η then counts steps, and ``lr`` is 1.
        The optimizer, its state, parameters and gradients are only read; hooks of the step do not run, so what one of
        them changes is not seen.

        Args:
            optimizer: any torch optimizer whose parameters hold their gradients. Where several step together, a list
                of them, or a container that holds them as ``optimizers`` and steps each: Δθ is that of all, each
                with its own learning rates. Accelerate's and Lightning's wrappers are looked through.
            masters: higher-precision copies of 16-bit weights, {parameter of the model: copy}, whether the optimizer
                holds the parameters or the copies. Those an optimizer keeps as
                ``state[parameter]["master_param"]`` are found without it.
            scaler: the GradScaler of fp16 training, to divide by its scale if ``unscale_`` has not yet been called.
            resident: True keeps Δθ in memory, where it is fastest and outlives the step. False works it out of the
                gradients and the optimizer's state, where there is a closed form, whenever a weight is needed: no
                memory, but to be measured before they change. By default False on CUDA and HIP devices, True elsewhere;
                but there Δθ of bf16 weights is kept in bf16, in a process by itself, where it takes a third of the free
                memory at most.
            ranks: the `sharpkern.Ranks` of the measurement, where they split the model: this rank's part of it may have
                nothing to move.

        Returns:
            The direction per unit learning rate of the reference group, which is the first with a positive rate and a
            gradient: other groups move by their ratio to it. Parameters without gradient, and groups of rate 0, do not
            move. The slope is that of what falls: of minus the loss where the optimizer maximizes, and None where some
            groups do and others do not.

        Raises:
            NoUpdateError: if no learning rate is positive, all gradients are zero or one is not finite, or the step
                would move nothing, or not to finite weights.
            TypeError: if an argument or a parameter is of a kind that is not supported, or the optimizer needs a
                closure or several gradients, steps inside of the backward pass or a part of the parameters on each
                rank, or cannot step on a copy.
            ValueError: if there is no gradient or one that is sparse, a parameter stands in two optimizers, or
                parameters share memory in a way in which their updates have no sum (other dtypes, masters, expanded
                tensors).

        Memory:
            One tensor of each parameter's size; none where it is not resident. While an optimizer other than torch's is
            copied, also its state and the gradients.
        """
        return cls._from_optimizer(optimizer, masters, scaler, resident, is_share=splits(ranks))

    @classmethod
    @torch.no_grad()
    def _from_optimizer(
        cls,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        masters: Mapping[nn.Parameter, Tensor] | None = None,
        scaler: GradScaler | None = None,
        resident: bool | None = None,
        *,
        is_share: bool = False,
        clip: float | None = None,
    ) -> "Direction":
        """Return the update, which may move nothing on a rank that holds a share of the model.

        ``clip`` is what the step will multiply the gradients by, as clipping inside of it does.
        """
        step = optimizer_update(optimizer, masters, scaler, resident, is_share, clip)
        slopes = [update.slope for update in step.updates if update.slope is not None]
        # Where some climb what others descend, no loss is known to fall.
        has_slope = len(slopes) == len(step.updates) and len({update.slot.climbs for update in step.updates}) <= 1
        return cls._checked(
            [update.source for update in step.updates],
            labels=[update.slot.label for update in step.updates],
            if_zero="the gradients are not zero, but this step moves nothing: some optimizers rest in their first "
            "steps, so measure a later one",
            parameters=[update.slot.parameter for update in step.updates],
            masters=[update.slot.master for update in step.updates],
            norms_sq=[update.norm_sq for update in step.updates],
            slopes=slopes if has_slope else (),
            lr=step.lr,
            is_share=step.is_share,
            of_pieces=step.of_pieces,
            clip=step.clip,
        )

    @classmethod
    @torch.no_grad()
    def from_gradients(
        cls,
        model: nn.Module,
        preconditioner: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        ranks: Ranks | str | None = None,
    ) -> "Direction":
        """Return the gradient g itself, the update of plain gradient descent, or P⁻¹g with Adam's preconditioner P.

        Along P⁻¹g directional sharpness is a Rayleigh quotient of P^-1/2 H P^-1/2, and so at most
        ``hessian_sharpness(model, loss_fn, preconditioner=optimizer)``, which has the same P.

        Args:
            model: a module whose parameters hold their gradients; those without do not move.
            preconditioner: the Adam or AdamW that trains the model, or a list of several, after at least one step,
                whose P is taken; parameters that it never moved do not move.
            ranks: as for `from_optimizer`.

        Returns:
            The direction, with |g|² as its slope and no learning rate; or with gᵀP⁻¹g, per unit learning rate of the
            optimizer's first moving group.

        Raises:
            TypeError: if ``model`` is no module, a parameter is complex or the preconditioner is no Adam or AdamW.
            ValueError: if there is no gradient, one that is sparse, not finite or zero everywhere, or the
                preconditioner has moved none of the model's parameters that hold one.

        Memory:
            None: it holds the gradients themselves, and refuses to be measured once they have changed. With a
            preconditioner two tensors of each parameter's size, of which one is kept.
        """
        reshard(checked_module(model))
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        is_share = splits(ranks) or any(map(is_flat, model.parameters()))
        if not named and not is_share:
            raise ValueError(
                "model must hold a gradient in some parameter, got none; call loss.backward() before "
                "Direction.from_gradients"
            )
        inverse, lr = (None, None) if preconditioner is None else inverse_preconditioner(preconditioner)
        if inverse is not None:
            named = [(name, parameter) for name, parameter in named if parameter in inverse]
            if not named and not is_share:
                raise ValueError(
                    f"preconditioner must have moved parameters of the model that hold gradients, got {len(inverse)} "
                    "others; pass the optimizer of this model's own parameters"
                )
        gradients = []
        for name, parameter in named:
            assert parameter.grad is not None
            check_parameter(f"'{name}'", parameter)
            check_gradient(f"'{name}'", parameter.grad)
            gradients.append(parameter.grad.detach())
        parameters = [parameter for _, parameter in named]
        updates = gradients
        if inverse is not None:
            updates = [inverse[parameter] * g for parameter, g in zip(parameters, gradients, strict=True)]
        labels = [f"'{name}'" for name, _ in named]
        direction = cls._checked(
            summed(parameters, updates, labels),
            labels=labels,
            if_zero="check that the loss depends on the model",
            parameters=parameters,
            lr=lr,
            is_share=is_share,
        )
        if inverse is None:
            return direction.as_gradient()
        slopes = direction._slopes_of(dict(zip(parameters, gradients, strict=True)))
        return dataclasses.replace(direction, slope=sum(slopes), _slopes=tuple(slopes))

    @classmethod
    @torch.no_grad()
    def from_tensors(
        cls, tensors: Mapping[str, Tensor] | Mapping[nn.Parameter, Tensor], model: nn.Module
    ) -> "Direction":
        """Return a direction of your own.

        Args:
            tensors: Δθ by the parameter's name or by the parameter: its shape and device, any floating dtype.
                Parameters that are left out do not move; of those that share memory one is enough.
            model: the module that the names are of; prefixes of DDP, FSDP and torch.compile do not matter.

        Returns:
            The direction, with neither slope nor learning rate.

        Raises:
            TypeError: if an argument, a key, or a dtype is of a kind that is not supported.
            ValueError: if a name is unknown, a shape or device differs, values are not finite or all zeros, or
                parameters that share memory are given different displacements of it.

        Memory:
            None: it holds the tensors themselves, and refuses to be measured once they have changed.
        """
        if not isinstance(tensors, Mapping):
            raise TypeError(
                f"tensors must be a mapping of names or parameters to tensors, got {type(tensors).__name__}; "
                "pass {name: tensor}"
            )
        placements = placed(tensors.items(), model)
        for name, parameter, tensor in placements:
            check_fit(name, parameter, tensor)
        return cls._checked(
            [tensor.detach() for _, _, tensor in placements],
            labels=[f"'{name}'" for name, _, _ in placements],
            if_zero="pass a tensor that moves some parameter",
            parameters=[parameter for _, parameter, _ in placements],
        )

    @classmethod
    @torch.no_grad()
    def between(cls, before: Weights, after: Weights, lr: float) -> "Direction":
        """Return the direction from one set of weights to another, (before − after)/lr: any step, with no formula.

        Measure it at ``before``, where the step started.

        Args:
            before: the model, or its values by name (a state_dict) or by parameter.
            after: the same after a step of learning rate ``lr``. A parameter that a mapping lacks while the other side
                is a module does not move.
            lr: learning rate of that step.

        Returns:
            The direction, without a slope. It belongs to the parameters of the side that holds them (of ``before`` if
            both do); where neither does, the names are resolved when it is measured, see `bind`.

        Raises:
            TypeError: if a side is neither module nor mapping, or a parameter is complex.
            ValueError: if ``lr`` is not positive, names or shapes differ, or nothing changed in between.

        Memory:
            One tensor of each parameter's size, in the dtype of the two sides; the sides can be dropped afterwards.

        Examples:
            >>> import copy
            >>> model = nn.Linear(2, 1)
            >>> optimizer = torch.optim.Adafactor(model.parameters(), lr=0.1)
            >>> model(torch.ones(3, 2)).mean().backward()
            >>> before = copy.deepcopy(model.state_dict())
            >>> optimizer.step()
            >>> after = copy.deepcopy(model.state_dict())
            >>> direction = Direction.between(before, after, lr=0.1)

            It is measured at before, and the run goes on at after:

            >>> _ = model.load_state_dict(before)
            >>> _ = model.load_state_dict(after)
        """
        if not 0 < float(lr) < math.inf:
            raise ValueError(f"lr must be a positive finite number, got {lr}; pass the learning rate of the step")
        moved = displacements(before, after, float(lr))
        return cls._checked(
            [one.tensor for one in moved],
            labels=[f"'{one.name}'" if one.name else "a parameter" for one in moved],
            if_zero="before and after are equal: clone the weights before the step (state_dict() shares their memory)",
            parameters=[one.parameter for one in moved if one.parameter is not None],
            names=[one.name for one in moved if one.parameter is None],
            lr=float(lr),
        )

    @torch.no_grad()
    def bind(self, model: nn.Module) -> "Direction":
        """Return the direction on the parameters of ``model``, once it is certain that it belongs to them.

        Args:
            model: the module about to be measured, wrapped or not.

        Returns:
            This direction if it has its parameters, else one whose names were looked up in ``model``: an exact match
            first, then one without the prefixes of wrappers; buffers are dropped.

        Raises:
            TypeError: if ``model`` is no module.
            ValueError: if a parameter is not of this model, a name is unknown, a shape differs, the tensors were
                changed since the direction was made, or another parameter shares memory with one of these as another
                dtype.

        Memory:
            None, unless tensors have to go to another device, or parameters that are not listed share memory with
            these: then as much as those.
        """
        reshard(checked_module(model))
        if self._part is not None:
            everything, items = self._part
            return (
                everything.bind(model)
                ._restricted(selected(items, model, may_lack=everything._is_share))
                ._with_all_that_move(model)
            )
        if self._of_pieces:
            self._refuse_what_has_changed()
            return self
        parameters = {id(parameter) for parameter in model.parameters()}
        if not parameters and not self._is_share:
            raise ValueError("model must have parameters, got a module without any; pass the module that is trained")
        if self._names:
            return self._resolved(model)
        foreign = [parameter for parameter in self.parameters if id(parameter) not in parameters]
        if foreign:
            raise ValueError(
                f"direction must belong to the model's own parameters, got {len(foreign)} of {len(self.parameters)} "
                f"that are not (the first of shape {list(foreign[0].shape)}); measure the model that the direction or "
                "its optimizer was made from, and copy it together with that model: copies hold parameters of their own"
            )
        self._refuse_what_has_changed()
        return self._with_all_that_move(model)

    def only(self, which: str | nn.Parameter | nn.Module | Iterable[str | nn.Parameter | nn.Module]) -> "Direction":
        """Return the part of the direction that moves some parameters; all others stay where they are.

        Args:
            which: parameters, or modules for all that they hold, or names of either; names may be patterns with ``*``
                ("blocks.0.*"). What does not move is left out.

        Returns:
            The direction with its own slope, which is the share of these parameters in Δθᵀg, in the same units. Where
            ``which`` holds names they are looked up when it is measured, see `bind`; until then ``parameters`` is
            empty, the slope None and the norm nan.

        Raises:
            NoUpdateError: nothing of it moves.
            TypeError: ``which`` is of another kind.
            ValueError: the tensors were changed since the direction was made.

        Memory:
            None.

        Examples:
            >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
            >>> model(torch.ones(3, 2)).mean().backward()
            >>> Direction.from_gradients(model).only("1").bind(model)
            Direction(2 tensors, 3 elements, ...)
        """
        items = items_of(which)
        if any(isinstance(item, str) for item in items) or self._names or self._part is not None:
            return Direction((), (), (), None, math.nan, self.lr, _part=(self, tuple(items)))
        return self._restricted([p for i in items for p in ([i] if isinstance(i, nn.Parameter) else i.parameters())])

    @torch.no_grad()
    def _restricted(self, parameters: Sequence[nn.Parameter]) -> "Direction":
        """Return the part that moves these parameters."""
        if self._of_pieces:
            raise TypeError(
                "a part of a direction must be of a model's parameters, got DeepSpeed's tensors, which hold many of "
                "them or parts of one; measure the whole direction, or blocks in a run without DeepSpeed"
            )
        self._refuse_what_has_changed()
        wanted = set(map(id, parameters))
        kept = [i for i, p in enumerate(self.parameters) if id(p) in wanted and self._norms_sq[i] > 0]
        if not kept and not self._is_share:
            raise NoUpdateError(
                f"direction must move some of the parameters that are named, got none of {len(wanted)} among the "
                f"{len(self.parameters)} that move; name others"
            )
        return self._checked(
            [self.sources[i] for i in kept],
            labels=[f"the parameter of shape {list(self.parameters[i].shape)}" for i in kept],
            if_zero="name others",
            parameters=[self.parameters[i] for i in kept],
            masters=[self.masters[i] for i in kept],
            norms_sq=[self._norms_sq[i] for i in kept],
            slopes=[self._slopes[i] for i in kept] if self.slope is not None and self._slopes else (),
            lr=self.lr,
            is_share=self._is_share,
            of_pieces=self._of_pieces,
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Δθ of each parameter, or this rank's shard of it; where it is not resident, worked out anew at every access.

        Every rank has to ask where it is not resident and of shards: whether it has changed is found out together.

        Raises:
            ValueError: if what it was made from was changed since.
        """
        if self._part is not None:
            raise ValueError(
                "direction must be bound for its tensors to be known where its part was named, got one that is not; "
                "call bind(model)"
            )
        self._refuse_what_has_changed()
        return tuple(source if isinstance(source, Tensor) else source.update() for source in self.sources)

    @property
    def nbytes(self) -> int:
        """Bytes that Δθ takes: none where it is worked out of the optimizer's state."""
        return sum(source.nbytes for source in self.sources if isinstance(source, Tensor))

    @torch.no_grad()
    def slope_of(self, gradients: Mapping[nn.Parameter, Tensor]) -> float:
        """Return Δθᵀg of some gradient; parameters that it lacks have none.

        Args:
            gradients: g by parameter, of its shape and on its device.

        Returns:
            The slope in units of loss/learning-rate, accumulated in float64; over all ranks where they hold shards.

        Memory:
            Δθ once more, where it is not resident.
        """
        return sum(self._slopes_of(gradients))

    def _slopes_of(self, gradients: Mapping[nn.Parameter, Tensor]) -> list[float]:
        """Return the share of Δθᵀg that each parameter with a gradient has."""
        there = [(p, delta) for p, delta in zip(self.parameters, self.tensors, strict=True) if p in gradients]
        sums = slopes_and_norms([delta for _, delta in there], [local_as(gradients[p].detach(), p) for p, _ in there])
        return to_host([one[0] for one in over_shards([p for p, _ in there], sums)])

    def shares(self) -> list[tuple[nn.Parameter, float, float]]:
        """Return every parameter with its share of the slope and of |Δθ|², which add up to those of this rank.

        Raises:
            ValueError: parameters share memory, so that nothing is the share of one of them.
        """
        slopes = [0.0] * len(self.parameters) if self.slope is None else self._slopes
        if len(slopes) != len(self.parameters) or not math.isclose(sum(self._norms_sq), self.norm_sq, abs_tol=1e-300):
            raise ValueError(
                "parameters must not share memory where a model is split over ranks, got some that do; tie weights by "
                "using one nn.Parameter in both places"
            )
        return list(zip(self.parameters, slopes, self._norms_sq, strict=True))

    def as_gradient(self) -> "Direction":
        """Return the direction with |Δθ|² as its slope, as it is where Δθ is the gradient."""
        # Memory that parameters share counts once, and is nobody's own.
        apart = math.isclose(sum(self._norms_sq), self.norm_sq)
        return dataclasses.replace(self, slope=self.norm_sq, _slopes=self._norms_sq if apart else ())

    def moves(self) -> Iterator[tuple[nn.Parameter, ParamUpdate]]:
        """Yield every parameter that moves with its move, from its master where it still is the rounding of that.

        Of a DTensor it is the move of this rank's shard.

        After a checkpoint was loaded into the model alone, for example, the weights are the truth, and the masters of
        before are left out of account.

        Memory:
            Nothing, unless Δθ is laid out in memory unlike its parameter (then a copy of that Δθ).
        """
        for parameter, source, master, norm_sq in zip(
            self.parameters, self.sources, self.masters, self._norms_sq, strict=True
        ):
            if norm_sq != 0:
                mine = local(parameter)
                full = None if master is None else local(master)
                current = full is not None and torch.equal(full.to(mine.dtype), mine)
                yield parameter, _move(source, full if full is not None and current else mine, mine)

    def __repr__(self) -> str:
        num_elements = sum(_like(source).numel() for source in self.sources)
        if self._part is not None:
            return f"Direction(a part of {self._part[0]!r}, by name)"
        facts = [f"{len(self.sources)} tensors", f"{num_elements} elements"]
        facts.append(f"|Δθ| = {math.sqrt(self.norm_sq):.3g}")
        facts += [
            f"{name} = {value:.3g}" for name, value in (("slope", self.slope), ("lr", self.lr)) if value is not None
        ]
        return f"Direction({', '.join(facts)}{', by name' if self._names else ''})"

    def __getstate__(self) -> dict[str, Any]:
        """What a copy is made of; whether it is still true goes with it."""
        return {**self.__dict__, "_versions": self._versions == _state_of(self.sources)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of another: writes to copies are counted anew, and θ is what the copies of parameters hold."""
        self.__dict__.update(state)
        thetas = [p if master is None else master for p, master in zip(self.parameters, self.masters, strict=False)]
        steps = {
            i: source.at(local(thetas[i]).detach())
            for i, source in enumerate(self.sources)
            if isinstance(source, LazyUpdate)
        }
        self.__dict__["sources"] = tuple(steps.get(i, source) for i, source in enumerate(self.sources))
        self.__dict__["_versions"] = _state_of(self.sources) if state["_versions"] else ()

    def _refuse_what_has_changed(self) -> None:
        """Raise where Δθ is no longer what it was made as."""
        # Both are asked: the second is a collective where the steps are of shards.
        written = self._versions != _state_of(self.sources)
        if self._steps_have_changed() or written:
            raise ValueError(
                "direction must hold what it was made with, got tensors written since (a backward, clipping or "
                "zero_grad of its gradients, or the step itself); make the direction anew just before measuring, or "
                "with resident=True where it is to outlive the step"
            )

    @torch.no_grad()
    def _steps_have_changed(self) -> bool:
        """Whether a step that Δθ is worked out of is another by now: fused optimizers write without being counted.

        The smallest tensors are witnesses for all, since an optimizer steps all of them.
        """
        if self._names:
            return False
        steps = [
            (parameter, source, norm_sq)
            for parameter, source, norm_sq in zip(self.parameters, self.sources, self._norms_sq, strict=True)
            if isinstance(source, LazyUpdate) and norm_sq > 0
        ]
        witnesses = sorted(steps, key=lambda step: step[0].numel())[:_NUM_WITNESSES]
        sums = over_shards([p for p, _, _ in witnesses], sums_of_steps([source for _, source, _ in witnesses]))
        now = to_host([one[1] for one in sums])
        return any(abs(new - norm_sq) > _SAME * norm_sq for new, (*_, norm_sq) in zip(now, witnesses, strict=True))

    def _resolved(self, model: nn.Module) -> "Direction":
        """Return the direction with its names looked up in ``model``."""
        buffers = NameTable(dict(model.named_buffers(remove_duplicate=False)))
        named = zip(self._names, self.tensors, strict=True)
        placements = placed(((name, tensor) for name, tensor in named if buffers.find(name) is None), model)
        tensors = [tensor.to(parameter.device) for _, parameter, tensor in placements]
        for (name, parameter, _), tensor in zip(placements, tensors, strict=True):
            check_fit(name, parameter, tensor)
        return self._checked(
            tensors,
            labels=[f"'{name}'" for name, _, _ in placements],
            if_zero="only buffers differ between before and after",
            parameters=[parameter for _, parameter, _ in placements],
            lr=self.lr,
        )._with_all_that_move(model)

    def _with_all_that_move(self, model: nn.Module) -> "Direction":
        """Return the direction with the parameters of ``model`` that move because they share memory with its own."""
        own = {id(parameter) for parameter in self.parameters}
        names = {id(parameter): f"'{name}'" for name, parameter in model.named_parameters()}
        everything = [*self.parameters, *(p for p in model.parameters() if id(p) not in own)]
        moved = also_moved(everything, self.sources, self.masters, labels=[names[id(p)] for p in everything])
        if not moved:
            return self
        sources = (*self.sources, *moved.values())
        return dataclasses.replace(
            self,
            parameters=(*self.parameters, *moved),
            sources=sources,
            masters=(*self.masters, *(None for _ in moved)),
            # How fast the loss falls by these is not known.
            slope=None,
            _norms_sq=(*self._norms_sq, *to_host([inner_product(delta, delta) for delta in moved.values()])),
            _versions=_state_of(sources),
        )

    @classmethod
    def _checked(
        cls,
        sources: Sequence[Tensor | LazyUpdate],
        *,
        labels: Sequence[str],
        if_zero: str,
        parameters: Sequence[nn.Parameter],
        masters: Sequence[Tensor | None] | None = None,
        names: Sequence[str] = (),
        norms_sq: Sequence[float] | None = None,
        slopes: Sequence[float] = (),
        lr: float | None = None,
        is_share: bool = False,
        of_pieces: bool = False,
        clip: float | None = None,
    ) -> "Direction":
        """Return the direction if it is finite and moves something; ``if_zero`` is the remedy when it does not."""
        if not names:
            sources = [
                local_as(source, p) if isinstance(source, Tensor) else source
                for p, source in zip(parameters, sources, strict=True)
            ]
        if norms_sq is None:
            tensors = [source for source in sources if isinstance(source, Tensor)]
            shards = [local(tensor) for tensor in tensors]
            norms_sq = to_host(
                [sums[1] for sums in over_shards(parameters or tensors, slopes_and_norms(shards, shards))]
            )
        if not math.isfinite(sum(norms_sq)):
            culprit = next(label for label, one in zip(labels, norms_sq, strict=True) if not math.isfinite(one))
            raise NoUpdateError(
                f"direction for {culprit} must be finite, got nan or inf; check the gradients, weights and optimizer "
                "state it was made from"
            )
        if sum(norms_sq) == 0 and not is_share:
            raise NoUpdateError(f"direction must move some parameter, got all zeros; {if_zero}")
        return cls(
            parameters=tuple(parameters),
            sources=tuple(sources),
            masters=tuple(masters or [None] * len(sources)),
            slope=sum(slopes) if slopes else None,
            norm_sq=norm_once(parameters, sources, norms_sq, labels) if parameters else sum(norms_sq),
            lr=lr,
            _names=tuple(names),
            _norms_sq=tuple(norms_sq),
            _slopes=tuple(slopes),
            _versions=_state_of(sources),
            _is_share=is_share,
            _of_pieces=of_pieces,
            _clip=clip,
        )


def _like(source: Tensor | LazyUpdate) -> Tensor:
    """Return a tensor of the shape of a source."""
    return source if isinstance(source, Tensor) else source.base


def _move(source: Tensor | LazyUpdate, base: Tensor, like: Tensor) -> ParamUpdate:
    """Return the move of a parameter with all operands laid out in memory like it: views are taken of all alike."""
    if base.stride() != like.stride():
        base = torch.empty_like(like, dtype=base.dtype).copy_(base)
    if isinstance(source, LazyUpdate):
        if all(operand.stride() == like.stride() for operand in source.operands[1:]):
            return source.at(base)
        source = source.update()
    if source.stride() != like.stride():
        source = torch.empty_like(like, dtype=source.dtype).copy_(source)
    return StoredUpdate(base, source)


def _state_of(sources: Sequence[Tensor | LazyUpdate]) -> tuple[int, ...]:
    """Return the counts of in-place writes to everything that Δθ is, or is worked out of; θ itself may be written."""
    tensors = [
        tensor for source in sources for tensor in ((source,) if isinstance(source, Tensor) else source.operands[1:])
    ]
    return tuple(map(_version, tensors))


def _version(tensor: Tensor) -> int:
    """Return the count of in-place writes to ``tensor``, which inference tensors do not keep."""
    return 0 if tensor.is_inference() else tensor._version
