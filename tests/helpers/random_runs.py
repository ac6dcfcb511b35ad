"""Random training runs, for tests/fuzz.py: tables of parts, and the run that a seed draws from them.

A run is one integer: built anew from it, it is the same to the last bit.
"""

import copy
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from tests.helpers.models import Block

# Batch, length, width, vocabulary, classes.
B, T, W, V, C = 6, 4, 8, 12, 5

LossFn = Callable[[], Tensor]


class Calls(nn.Module):
    """A layer that calls ``function(x, *parts)``: modules in other layouts, and parameters that are read by hand."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.layers = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        shapes = [part for part in parts if isinstance(part, tuple)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape) / math.sqrt(W)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers, *self.weights)


class Remembers(nn.Module):
    """What it returns depends on an expanded buffer, a plain tensor, and lists of its own, which it goes on with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(W, 2).t()[:1].expand(3, W))
        self.count, self.seen, self.nested = torch.zeros(()), [], {"past": (None, [])}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.seen.append(self.count.clone())
        self.nested["past"][1].append(len(self.seen))
        self.cache = x.detach()
        x = x - 0.1 * self.centre[0] * self.count - 0.01 * len(self.nested["past"][1])
        self.centre[:1].mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return x


def across(module: nn.Module) -> nn.Module:
    """A layer of [B, W, T]."""
    return Calls(lambda x, m: m(x.transpose(1, 2)).transpose(1, 2), module)


def first(module: nn.Module, *, queries: int = 1) -> nn.Module:
    return Calls(lambda x, m: m(*[x] * queries)[0], module)


def complex_product(x: Tensor, w: Tensor) -> Tensor:
    z = torch.view_as_complex(x.to(w.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z @ torch.view_as_complex(w)).flatten(-2)


# [B, T, W] → [B, T, W].
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(W, W),
    "linear, relu_": lambda: nn.Sequential(nn.Linear(W, W), nn.ReLU(inplace=True)),
    "linear, dropout_": lambda: nn.Sequential(nn.Linear(W, W), nn.Dropout(0.2, inplace=True)),
    "conv": lambda: across(nn.Conv1d(W, W, 3, padding=1, groups=2)),
    "layer norm": lambda: nn.LayerNorm(W),
    "rms norm": lambda: nn.RMSNorm(W),
    "group norm": lambda: across(nn.GroupNorm(2, W)),
    "batch norm": lambda: across(nn.BatchNorm1d(W)),
    "instance norm": lambda: across(nn.InstanceNorm1d(W, affine=True, track_running_stats=True)),
    "gru": lambda: first(nn.GRU(W, W, batch_first=True)),
    "lstm": lambda: first(nn.LSTM(W, W // 2, 2, batch_first=True, bidirectional=True, dropout=0.1)),
    "attention": lambda: first(nn.MultiheadAttention(W, 2, dropout=0.1, batch_first=True), queries=3),
    "encoder": lambda: nn.TransformerEncoderLayer(W, 2, 16, dropout=0.1, batch_first=True),
    "gpt block": lambda: Block(W, 2, 0.1),
    "weight norm": lambda: weight_norm(nn.Linear(W, W)),
    "spectral norm": lambda: spectral_norm(nn.Linear(W, W)),
    "bilinear": lambda: Calls(lambda x, m: m(x, x), nn.Bilinear(W, W, W)),
    "remembers": Remembers,
    "matmul": lambda: Calls(lambda x, w: x @ w.T, (W, W)),
    "addmm": lambda: Calls(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w).view_as(x), (W, W), (W,)),
    "einsum": lambda: Calls(lambda x, w: torch.einsum("bti,oi->bto", x, w), (W, W)),
    "experts": lambda: Calls(lambda x, w: torch.cat([x @ w[0], x.tanh() @ w[1]], -1), (2, W, W // 2)),
    "chunks": lambda: Calls(lambda x, w: F.scaled_dot_product_attention(*(x @ w.T).chunk(3, -1)), (3 * W, W)),
    "parts": lambda: Calls(lambda x, w: F.linear(x, w.view(2, W, W)[1] * w[:W].sigmoid()), (2 * W, W)),
    "indexed": lambda: Calls(lambda x, w: x @ w[[2, 0, 1, 4, 3, 6, 5, 7]].unflatten(1, (2, -1)).flatten(1), (W, W)),
    "stacked": lambda: Calls(lambda x, *ws: x @ torch.stack(ws).mean(0), (W, W), (W, W)),
    "by name": lambda: Calls(
        lambda x, ws: x @ ws["w"] + ws["b"], nn.ParameterDict({"w": torch.eye(W), "b": torch.ones(W)})
    ),
    "normalised": lambda: Calls(lambda x, w: F.linear(x, F.normalize(w, dim=1) + w.softmax(0)), (W, W)),
    "functional": lambda: Calls(lambda x, w, b: F.layer_norm(x, (W,), w + 1, b), (W,), (W,)),
    "scalars": lambda: Calls(lambda x, a, b: x * (1 + a) + b, (), (1,)),
    "complex": lambda: Calls(complex_product, (W // 2, W // 2, 2)),
    "unused": lambda: Calls(lambda x, w, unused, empty: x * (1 + w) + empty.sum(), (W,), (3,), (0, 4)),
}
# What torch cannot do in 16 bits, or under autocast without gradients.
FULL_PRECISION = {"bilinear", "complex", "spectral norm", "encoder"}

WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda layer: layer,
    "residual ": lambda layer: Calls(lambda x, m: x + 0.5 * m(x), layer),
    "twice ": lambda layer: Calls(lambda x, m: m(torch.tanh(m(x))), layer),
    "frozen ": lambda layer: layer.requires_grad_(False),
    "checkpointed ": lambda layer: Calls(lambda x, m: checkpoint(m, x, use_reentrant=False), layer),
    "reentrant ": lambda layer: Calls(lambda x, m: checkpoint(m, x, use_reentrant=True), layer),
}
ACTIVATIONS = [nn.Identity, nn.Tanh, nn.GELU, nn.SiLU, nn.ReLU, nn.Softplus]

STEMS: dict[str, Callable[[], nn.Module]] = {
    # With positions: the row of the padding is zero, where norms bend at once.
    "tokens": lambda: Calls(lambda x, m, w: m(x) + w, nn.Embedding(V, W, padding_idx=0), (T, W)),
    "vectors": lambda: nn.Linear(3, W),
    "images": lambda: Calls(lambda x, m: m(x).flatten(2).transpose(1, 2), nn.Conv2d(2, W, 3, padding=1)),
}
SHAPES = {"tokens": (B, T), "vectors": (B, T, 3), "images": (B, 2, 2, 2)}
HEADS: dict[str, Callable[[], nn.Module]] = {
    "each": lambda: nn.Linear(W, C),
    "pooled": lambda: Calls(lambda x, m: m(x.mean(1)), nn.Linear(W, C)),
    "last": lambda: Calls(lambda x, w: x[:, -1] @ w.t(), (C, W)),
    "tied": lambda: nn.Linear(W, V, bias=False),
}


def squares(model: nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.shape == (W, W)][:2]


def one_memory(model: nn.Module, view: Callable[[Tensor], Tensor]) -> None:
    if len(pair := squares(model)) == 2:
        pair[1].data = view(pair[0].data)


def one_buffer(model: nn.Module) -> None:
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
    nn.utils.vector_to_parameters(flat, model.parameters())


# How parameters come to lie on one memory, which a cast ends.
MEMORIES: dict[str, Callable[[nn.Module], object]] = {
    "": lambda model: None,
    "same memory": partial(one_memory, view=lambda w: w),
    "transposed memory": partial(one_memory, view=Tensor.t),
    "one buffer": one_buffer,
}

LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "cross-entropy": lambda out, y, t: F.cross_entropy(out, y),
    "smoothed": lambda out, y, t: F.cross_entropy(out, y, label_smoothing=0.1),
    "ignoring": lambda out, y, t: F.cross_entropy(out, y, ignore_index=0),
    "weighted": lambda out, y, t: F.cross_entropy(out, y, weight=torch.linspace(0.5, 1, out.shape[1]).to(out)),
    "nll": lambda out, y, t: F.nll_loss(out.log_softmax(-1), y, reduction="sum") / 10,
    "soft labels": lambda out, y, t: F.cross_entropy(out, t.softmax(-1)),
    "mse": lambda out, y, t: F.mse_loss(out, t),
    "huber": lambda out, y, t: F.huber_loss(out, t),
    "bce": lambda out, y, t: F.binary_cross_entropy_with_logits(out, t.sigmoid()),
    "kl": lambda out, y, t: F.kl_div(out.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "margin": lambda out, y, t: F.multi_margin_loss(out, y),
    "by hand": lambda out, y, t: (out.logsumexp(-1) - (out * t.softmax(-1)).sum(-1)).square().mean(),
}


def appended(seen: list[Tensor], out: Tensor) -> Tensor:
    seen.append(out.detach().mean())
    return out * (1 + 0.01 * len(seen))


def carried(state: dict[str, Tensor], out: Tensor) -> Tensor:
    before, state["h"] = state.get("h", 0.0), out.detach().mean(0)
    return out + 0.1 * before


# What a closure reaches outside of the model: how it is made, and what the closure does with it.
OUTSIDE: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, Tensor], Tensor]]] = {
    "critic": (lambda out: nn.BatchNorm1d(out.shape[1]).to(out.dtype), lambda critic, out: out + critic(out)),
    "list": (lambda out: [], appended),
    "hidden state": (lambda out: {}, carried),
    "counter": (lambda out: torch.zeros(1), lambda count, out: out * (1 + 0.01 * count.add_(1))),
    "generator": (
        lambda out: torch.Generator().manual_seed(3),
        lambda own, out: out + 0.1 * torch.randn(out.shape, generator=own).to(out),
    ),
    "global stream": (lambda out: None, lambda _, out: out + 0.1 * torch.randn(out.shape).to(out)),
    "other streams": (lambda out: None, lambda _, out: out * (1 + 0.1 * random.random() + 0.1 * np.random.rand())),
}

# Options of which one is drawn, and flags of which each may be.
FLAGS = {"weight_decay": 0.05, "maximize": True, "foreach": True, "fused": True}
ALL, UNFUSED = tuple(FLAGS), ("weight_decay", "maximize", "foreach")
OPTIMIZERS: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "SGD": ([{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.9, "dampening": 0.3}], ALL),
    "Adam": ([{}, {"amsgrad": True}, {"betas": (0.5, 0.9)}, {"decoupled_weight_decay": True}], ALL),
    "AdamW": ([{}, {"amsgrad": True}, {"betas": (0.9, 0.95), "eps": 1e-6}], ALL),
    "RMSprop": ([{}, {"momentum": 0.5}, {"centered": True}], UNFUSED),
    "Adagrad": ([{}, {"lr_decay": 0.1}, {"initial_accumulator_value": 0.1}], ALL),
    "Adadelta": ([{}], UNFUSED),
    "NAdam": ([{}, {"decoupled_weight_decay": True}], UNFUSED),
    "RAdam": ([{}, {"decoupled_weight_decay": True}], UNFUSED),
    "Adamax": ([{}], UNFUSED),
    "Rprop": ([{}], ("maximize", "foreach")),
    "ASGD": ([{}, {"t0": 1.0}], UNFUSED),
    "Adafactor": ([{"eps": (1e-7, 1e-3)}], UNFUSED),
    "Muon, AdamW": ([{}], ("weight_decay",)),
}

# How often each.
CONTEXTS = {
    "": 20,
    "no_grad": 2,
    "enable_grad": 2,
    "inference_mode": 2,
    "autocast": 3,
    "float64": 2,
    "deterministic": 2,
}
DTYPES = {torch.float32: 6, torch.float64: 3, torch.bfloat16: 1}
OTHERS = ["relative", "forward", "hvp"]
ENGINES = {"auto": 3, "virtual": 2, "batched": 2, "inplace": 3}
FORMS = ["cells", "partial", "method", "object"]


def drawn(rng: random.Random, weights: dict[Any, float]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def context_of(seed: int) -> str:
    return drawn(random.Random(seed), CONTEXTS)


class RandomRun:
    """The training run of a seed, at its start.

    Args:
        seed: of everything.
        compiled: whether the model may be compiled.
    """

    def __init__(self, seed: int, *, compiled: bool = False) -> None:
        torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)
        self.rng = rng = random.Random(seed)
        self.context, self.dtype = drawn(rng, CONTEXTS), drawn(rng, DTYPES)
        self.low = self.dtype == torch.bfloat16 or self.context == "autocast"
        self.about = [self.context, str(self.dtype).removeprefix("torch.")]
        self._draw_model(rng)
        self._draw_loss(rng)
        self._draw_optimizers(rng)
        self._draw_measurement(rng)
        # The compiler takes seconds, and draws other masks or has other gradients of these.
        unlike = any(name in str(self) for name in ("checkpointed", "reentrant", "remembers", "functional_call"))
        self.is_compiled = rng.random() < 0.01 and compiled and not unlike
        self.called = torch.compile(self.model, backend="eager") if self.is_compiled else self.model

    def _draw_model(self, rng: random.Random) -> None:
        stem, names, layers = rng.choice(list(STEMS)), [], []
        for _ in range(rng.randint(1, 4)):
            name = rng.choice([name for name in LAYERS if not (self.low and name in FULL_PRECISION)])
            wrapper = rng.choices(list(WRAPPERS), [10, 4, 2, 2, 1, 1])[0]
            layers += [WRAPPERS[wrapper](LAYERS[name]()), rng.choice(ACTIVATIONS)()]
            names.append(wrapper + name)
        head = rng.choice([name for name in HEADS if name != "tied" or stem == "tokens"])
        self.model = nn.Sequential(STEMS[stem](), *layers, HEADS[head]())
        if head == "tied":
            self.model[-1].weight = self.model[0].layers[0].weight
        self.model.to(self.dtype).train(rng.random() < 0.8)
        if rng.random() < 0.1:
            for parameter in squares(self.model):
                parameter.data = parameter.data.t().contiguous().t()
        memory = rng.choices(list(MEMORIES), [30, 1, 1, 2])[0]
        self.on_one_memory = MEMORIES[memory]
        self.on_one_memory(self.model)
        self.independent = not memory
        x = torch.randint(V, SHAPES[stem]) if stem == "tokens" else torch.randn(SHAPES[stem])
        self.x = x.to(self.dtype) if x.is_floating_point() else x
        self.about += [stem, *names, head, memory]

    def _draw_loss(self, rng: random.Random) -> None:
        with torch.no_grad():
            out = wide(copy.deepcopy(self.model)(self.x).flatten(0, -2))
        self.y, self.t = torch.randint(out.shape[1], out.shape[:1]), torch.randn(out.shape)
        self.loss_name, self.penalty = rng.choice(list(LOSSES)), rng.choice([0.0] * 9 + [0.01])
        self.num_micro, self.form, self.functional = rng.choice([1, 1, 1, 2]), rng.choice(FORMS), rng.random() < 0.1
        names = rng.sample(list(OUTSIDE), rng.choices([0, 1, 2], [7, 2, 1])[0])
        self.outside = {name: OUTSIDE[name][0](out) for name in names}
        self.about += [self.loss_name, *names, self.form, "functional_call" * self.functional]
        self.about += ["penalty" * (self.penalty > 0), f"micro={self.num_micro}"]

    def _draw_optimizers(self, rng: random.Random) -> None:
        # Of two parameters on one memory the second reads what the first has moved, which is of second order.
        left_out = set() if self.independent else {"Adafactor", "ASGD"}
        # It divides by the size of parameters.
        left_out |= {"Adafactor"} if not all(parameter.numel() for parameter in self.model.parameters()) else set()
        name = rng.choice([name for name in OPTIMIZERS if name not in left_out])
        variants, flags = OPTIMIZERS[name]
        options = {**rng.choice(variants), **{flag: FLAGS[flag] for flag in flags if rng.random() < 0.15}}
        if self.dtype == torch.bfloat16:
            # Its runs differ from each other.
            options.pop("fused", None)
        if "fused" in options:
            options.pop("foreach", None)
        if not self.independent and "weight_decay" in flags:
            options["weight_decay"] = 0.0
        self.sign = -1 if options.get("maximize") else 1
        rate = lr = 10 ** rng.uniform(-4, -0.5)
        if rng.random() < 0.05 and name in ("SGD", "Adam", "AdamW") and "foreach" not in options:
            rate = torch.tensor(lr, dtype=torch.float64)
        held = [parameter for parameter in self.model.parameters() if parameter.requires_grad or rng.random() < 0.5]
        rng.shuffle(held)
        parts = {name: held}
        if name == "Muon, AdamW":
            parts = {"Muon": [p for p in held if p.ndim == 2], "AdamW": [p for p in held if p.ndim != 2]}
        self.optimizers: list[optim.Optimizer] = []
        for kind, parameters in parts.items():
            cut = rng.randrange(len(parameters)) if rng.random() < 0.3 and parameters else 0
            groups = [
                {"params": parameters[:cut], "lr": lr * rng.choice([0.0, 0.1, 3.0])},
                {"params": parameters[cut:]},
            ]
            groups = [group for group in groups if group["params"]]
            if groups:
                self.optimizers.append(getattr(optim, kind)(groups, lr=rate, **options))
        self.clip, self.set_to_none = rng.choice([None, None, 0.1]), rng.random() < 0.95
        said = ", ".join(f"{name}={value}" for name, value in options.items())
        self.about += [
            f"{name}({said})",
            f"lr={lr:.3g}",
            f"groups={[len(one.param_groups) for one in self.optimizers]}",
        ]

    def _draw_measurement(self, rng: random.Random) -> None:
        self.warm_up, self.monitored, self.resident = rng.randrange(4), rng.random() < 0.3, rng.choice([None, False])
        more = [{"certify": True}, {"method": "bisection"}, {"max_forwards": 12}, *[{}] * 9]
        self.breaks_at, self.also = rng.choice([0, 0, 0, rng.randint(1, 6)]), rng.choice([*OTHERS, *[""] * 12])
        self.options: dict[str, Any] = {"engine": drawn(rng, ENGINES), **rng.choice(more)}
        self.about += ["Monitor" * self.monitored, f"warm-up={self.warm_up}", *map(str, self.options.values())]
        self.about += [f"breaks at {self.breaks_at}" * (self.breaks_at > 0), f"also {self.also}" * bool(self.also)]

    def __str__(self) -> str:
        return " · ".join(filter(None, self.about))

    @property
    def optimizer(self) -> Any:
        """The optimizer, or the list of several."""
        return self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers

    def loss(self) -> Tensor:
        return self.loss_of(self.called, self.outside)

    __call__ = loss

    def loss_of(self, model: nn.Module, outside: dict[str, Any]) -> Tensor:
        """The loss by a model and with what is outside of it, this run's or copies of them."""
        call = partial(torch.func.functional_call, model, dict(model.named_parameters())) if self.functional else model
        losses = []
        for i in range(self.num_micro):
            out = wide(call(self.x[i :: self.num_micro]).flatten(0, -2))
            for name, thing in outside.items():
                out = OUTSIDE[name][1](thing, out)
            rows = torch.arange(len(self.y)).view(len(self.x), -1)[i :: self.num_micro].flatten()
            losses.append(LOSSES[self.loss_name](out, self.y[rows], self.t[rows].to(out.dtype)))
        loss = torch.stack(losses).mean()
        if self.penalty:
            loss = loss + self.penalty * sum(wide(parameter).square().sum() for parameter in model.parameters())
        return loss

    def closure(self) -> LossFn:
        """The loss in one of the forms that people write."""
        model, outside, loss_of = self.called, self.outside, RandomRun.loss_of
        return {
            "cells": lambda: loss_of(self, model, outside),
            "partial": partial(loss_of, self, model, outside),
            "method": self.loss,
            "object": self,
        }[self.form]

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.context == "autocast")

    def backward(self) -> None:
        """Leave the gradients of a step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(self.set_to_none)
        with self.autocast():
            loss = self.sign * self.loss()
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def cast(self, dtype: torch.dtype) -> None:
        """Go on in a wider dtype from the same values."""
        modules = [self.model, *(thing for thing in self.outside.values() if isinstance(thing, nn.Module))]
        for module in (part.to(dtype) for one in modules for part in one.modules()):
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    setattr(module, name, value.to(dtype))
        for state in (state for optimizer in self.optimizers for state in optimizer.state.values()):
            for name, value in state.items():
                if isinstance(value, Tensor) and name not in ("step", "mu_product", "eta", "mu"):
                    state[name] = value.to(dtype)
        self.x = self.x.to(dtype) if self.x.is_floating_point() else self.x
        self.on_one_memory(self.model)


def wide(out: Tensor) -> Tensor:
    return out if out.dtype == torch.float64 else out.float()
