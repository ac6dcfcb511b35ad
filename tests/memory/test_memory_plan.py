"""Memory plans: fake tensors take what real ones do, by every method, and the figures that a plan is asked for."""

import json
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import sharpkern
from sharpkern.cli import app, memory
from sharpkern.cli.memory import Head, Optimizer
from sharpkern.memory import architectures, planning
from sharpkern.memory.architectures import ARCHITECTURES
from sharpkern.memory.cards import CARDS, USABLE, MethodMemory
from sharpkern.memory.counter import bytes_of, peak_bytes
from sharpkern.memory.methods import Method, methods
from sharpkern.memory.optimizers import OPTIMIZERS
from sharpkern.memory.plan import MemoryPlan
from sharpkern.memory.training_state import TrainingState, fake_copy
from sharpkern.tensors.fake import pretend_device
from tests.helpers.processes import on_ranks

GIB = 2**30
TOKENS, BATCH = 64, 2


def olmo2(path: Path, **shape: int) -> str:
    """A configuration file of an Olmo2 of 36 million parameters, or another shape."""
    transformers = pytest.importorskip("transformers", reason="the model is of transformers")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8}
    sizes |= {"vocab_size": 30000, "max_position_embeddings": 512, "num_key_value_heads": 8, **shape}
    transformers.Olmo2Config(**sizes, dtype="float32").save_pretrained(path)
    return str(path)


def test_a_small_model_on_a_cpu_takes_what_in_place_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256))
    inputs = torch.randn(4, 256)
    loss_fn = lambda: model(inputs).square().mean()
    loss_fn().backward()
    direction = sharpkern.Direction.from_gradients(model)
    measure = partial(sharpkern.critical_sharpness, model, loss_fn, direction)
    # The checks of the first and the second measurement take memory of their own.
    for engine in ("auto", "auto", "inplace", "inplace"):
        measure(engine=engine)
    swapped = peak_bytes(measure)
    monkeypatch.setattr("sharpkern.engines.session.may_swap", lambda *_: False)
    theta = sum(p.nbytes for p in model.parameters())
    assert theta < swapped < peak_bytes(partial(measure, engine="inplace")) + 0.05 * theta


def on_real_tensors(
    name: str, optimizer: str, head: str, shard: Callable[[nn.Module], object] | None = None
) -> TrainingState:
    """The scene of a plan, on tensors that have values."""
    model, vocabulary = architectures.language_model(name, None)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        nn.init.constant_(tensor, 0.01)
    if shard is not None:
        shard(model)
    loss = architectures.language_loss(TOKENS, BATCH, head)
    return TrainingState(model, loss, optimizer, nullcontext(), vocabulary)


def rows_of(
    scene: TrainingState, optimizer: str, only: Callable[[Method], bool] = lambda method: True
) -> list[MethodMemory]:
    found = methods(4, from_state=optimizer.startswith("adamw") and optimizer != "adamw-8bit")
    with pretend_device("cuda"):
        return [planning._row(scene, method) for method in found if only(method)]


@pytest.mark.parametrize(
    ("optimizer", "head", "vocabulary", "parameters"),
    [
        ("none", "stock", 4096, 9),
        pytest.param("adamw-fp32", "chunked", 30000, 36, marks=pytest.mark.long),
        pytest.param("adamw-masters", "stock", 4096, 9, marks=pytest.mark.long),
    ],
)
def test_a_plan_is_what_a_real_run_takes_to_two_percent(
    optimizer: str, head: str, vocabulary: int, parameters: int, tmp_path: Path
) -> None:
    name = olmo2(tmp_path, vocab_size=vocabulary)
    options = {"tokens": TOKENS, "batch_size": BATCH, "num_steps": 4, "progress": False}
    plan = sharpkern.memory_plan(name, optimizer=optimizer, head=head, **options)
    assert round(plan.conditions["parameters"] / 1e6) == parameters
    real = rows_of(on_real_tensors(name, optimizer, head), optimizer)
    assert [(row.method, row.direction) for row in plan.rows] == [(row.method, row.direction) for row in real]
    for planned, counted in zip(plan.rows, real, strict=True):
        assert planned.peak_bytes == pytest.approx(counted.peak_bytes, rel=0.02), planned.method
        assert planned.host_bytes == counted.host_bytes
        for part in planned.parts | counted.parts:
            sizes = planned.parts.get(part, 0), counted.parts.get(part, 0)
            assert abs(sizes[0] - sizes[1]) <= 0.02 * counted.peak_bytes, (planned.method, part)


def allocated_peak(function: Callable[[], object]) -> int:
    """Most bytes that CUDA's allocator has handed out during a call, above those before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or HIP device"),
]


@pytest.mark.parametrize(
    ("device", "peak"), [("cpu", peak_bytes), pytest.param("cuda", allocated_peak, marks=ON_GPU)], ids=["cpu", "cuda"]
)
@pytest.mark.parametrize(
    ("engine", "kind"),
    [
        ("virtual", "λ_c"),
        pytest.param("inplace", "λ_c", marks=pytest.mark.long),
        pytest.param("virtual", "curve of micro-batches", marks=pytest.mark.long),
        pytest.param("inplace", "curve of micro-batches", marks=pytest.mark.long),
        ("virtual", "sample"),
        pytest.param("inplace", "sample", marks=pytest.mark.long),
        pytest.param("virtual", "blocks", marks=pytest.mark.long),
        ("inplace", "blocks"),
    ],
)
def test_a_plan_is_what_a_measurement_takes_to_two_percent(
    engine: str, kind: str, device: str, peak: Callable[[Callable[[], object]], int], tmp_path: Path
) -> None:
    name = olmo2(tmp_path, vocab_size=8192)
    # Micro-batches are evaluated one after the other.
    batch_size = 1 if kind in ("curve of micro-batches", "sample") else BATCH
    plan = sharpkern.memory_plan(name, tokens=TOKENS, batch_size=batch_size, optimizer="adamw-fp32", progress=False)
    row = plan["virtual" if engine == "virtual" else "in place", "resident"]
    torch.manual_seed(0)
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name), dtype=torch.float32).eval().to(device)
    model.config.use_cache = False
    rows = torch.randint(0, 8192, (BATCH, TOKENS), device=device)
    loss_fn = lambda: model(input_ids=rows, labels=rows).loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_fn().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_fn().backward()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = bytes_of([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters()), *states])

    one_row = lambda k: model(input_ids=rows[k % BATCH][None], labels=rows[k % BATCH][None]).loss * (1 + 0.01 * k)
    parts = [partial(one_row, k) for k in range(12)]

    def measure() -> None:
        direction = sharpkern.Direction.from_optimizer(optimizer, resident=True)
        if kind == "λ_c":
            sharpkern.critical_sharpness(model, loss_fn, direction, engine=engine, max_forwards=4)
        elif kind == "curve of micro-batches":
            sharpkern.losses_along(model, parts[:BATCH], direction, [1e-3, 2e-3], engine=engine)
        elif kind == "blocks":
            head = {"head": "lm_head.*"}
            sharpkern.blockwise_critical_sharpness(model, loss_fn, direction, head, engine=engine, max_forwards=4)
        else:
            sharpkern.critical_sharpness(model, parts, direction, sample=4, clip=1.0, engine=engine, max_forwards=4)

    # The first measurement is checked once against another way to form weights, and so is the second.
    measure()
    if kind != "λ_c":
        measure()
    taken = held + peak(measure)
    if kind == "blocks":
        # No more than for all blocks at once; in place, no copy of the others.
        assert taken <= 1.02 * row.peak_bytes
    else:
        assert row.peak_bytes == pytest.approx(taken, rel=0.02)


def per_rank(rank: int, name: str) -> dict[tuple[str, str], int]:
    from torch.distributed.fsdp import fully_shard

    def shard(model: Any) -> None:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)

    found = {}
    for method in methods(4, from_state=True):
        if method.sharded and method.direction != "resident":
            scene = on_real_tensors(name, "adamw-fp32", "stock", shard)
            with pretend_device("cuda"):
                found[method.name, method.direction] = planning._row(scene, method).peak_bytes
    return found


@pytest.mark.long
def test_a_sharded_plan_is_what_each_of_two_ranks_takes(tmp_path: Path) -> None:
    name = olmo2(tmp_path / "model", num_hidden_layers=2, vocab_size=4096)
    plan = sharpkern.memory_plan(name, tokens=TOKENS, batch_size=BATCH, num_gpus=2, progress=False)
    ranks = on_ranks({"rows": partial(per_rank, name=name)}, 2, tmp_path, seconds=200)
    for rank in ranks:
        assert isinstance(rank["rows"], dict), rank["rows"]
        assert len(rank["rows"]) == 4
        for row in plan.rows:
            if row.direction == "resident":
                continue
            # The backward pass gathers a layer ahead, and when the last one's memory goes is the collectives' timing.
            rel = 0.05 if row.method == "forward and backward" else 0.02
            assert row.peak_bytes == pytest.approx(rank["rows"][row.method, row.direction], rel=rel), row.method
    # What was gathered for a layer goes before the next: more layers have no more of it.
    name = olmo2(tmp_path / "deep", num_hidden_layers=6, vocab_size=4096)
    deep = sharpkern.memory_plan(name, tokens=TOKENS, batch_size=BATCH, num_gpus=2, progress=False)
    for row, deeper in zip(plan.rows, deep.rows, strict=True):
        assert deeper.parts["gathered"] < 0.85 * 2 * deeper.parts["weights"]
        if row.method != "forward and backward":
            assert 0 < deeper.parts["gathered"] <= 1.01 * row.parts["gathered"], row.method
    name = olmo2(tmp_path / "alone", num_hidden_layers=2, vocab_size=4096)
    alone = sharpkern.memory_plan(name, tokens=TOKENS, batch_size=BATCH, progress=False)
    for part in ("weights", "optimizer", "gradients", "direction"):
        halves = plan["in place", "resident"].parts[part], alone["in place", "resident"].parts[part]
        assert halves[0] == pytest.approx(halves[1] / 2, rel=0.01)


@pytest.mark.long
def test_seven_billion_from_the_optimizers_state_take_a_gibibyte_more_than_a_forward_pass() -> None:
    model, vocabulary = architectures.language_model("olmo2-7b", torch.bfloat16)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    loss = architectures.language_loss(4096, 1, "chunked")
    scene = TrainingState(fake_copy(model, mode), loss, "adamw-fp32", mode, vocabulary)
    wanted = {("plain forward", ""), ("virtual", "state"), ("in place", "state")}
    forward, in_place, virtual = rows_of(scene, "adamw-fp32", lambda method: (method.name, method.direction) in wanted)
    # Gradients are there whenever an optimizer's next step is asked for.
    before = forward.peak_bytes + virtual.parts["gradients"]
    assert forward.peak_bytes / GIB == pytest.approx(13.59 + 54.38 + 0.41, abs=0.02)
    assert virtual.peak_bytes - before <= 0.2 * GIB
    assert in_place.peak_bytes - before == pytest.approx(13.59 * GIB, rel=0.01)
    assert "direction" not in virtual.parts


def test_parameters_are_those_of_the_published_models() -> None:
    pytest.importorskip("transformers")
    billions = {}
    for name in ARCHITECTURES:
        model, _ = architectures.language_model(name, torch.bfloat16)
        billions[name] = round(sum(p.numel() for p in model.parameters()) / 1e9, 2)
    assert billions == {
        "olmo2-1b": 1.48,
        "olmo2-7b": 7.30,
        "olmo2-13b": 13.72,
        "olmo2-32b": 32.23,
        "llama3-8b": 8.03,
        "llama3-70b": 70.55,
        "qwen3-0.6b": 0.6,
        "qwen3-1.7b": 1.72,
        "qwen3-4b": 4.02,
        "qwen3-8b": 8.19,
        "qwen3-14b": 14.77,
        "qwen3-32b": 32.76,
    }


def test_a_step_on_a_copy_of_an_optimizer_is_what_an_8_bit_one_takes(tmp_path: Path) -> None:
    options = {"tokens": 32, "optimizer": "adamw-8bit", "progress": False}
    plan = sharpkern.memory_plan(olmo2(tmp_path, num_hidden_layers=1), dtype=torch.bfloat16, **options)
    held = plan["virtual"].parts
    assert held["optimizer"] == pytest.approx(held["weights"] * (1 + 4 / 256), rel=0.01)
    # Weights and gradients in float32, and the state: while Δθ is made, in float32, of which it stays.
    assert held["direction"] == pytest.approx(4 * held["weights"] + held["optimizer"], rel=0.01)
    assert {row.direction for row in plan.rows[2:]} == {"resident"}


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(512, 4096), nn.GELU(), nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def squares(model: nn.Module) -> Tensor:
    return model(torch.zeros(64, 512)).square().mean()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_model_of_ones_own_is_planned_for_and_left_alone(device: str) -> None:
    with torch.device(device):
        model = Regression()
    before = {name: (id(p), p.device, p._version) for name, p in model.named_parameters()}
    plan = sharpkern.memory_plan(model, squares, progress=False)
    assert {name: (id(p), p.device, p._version) for name, p in model.named_parameters()} == before
    weights = bytes_of(model.parameters())
    virtual, resident = plan["virtual", "state"], plan["virtual", "resident"]
    assert virtual.parts["weights"] == virtual.parts["gradients"] == weights
    # Besides its moments it counts its steps.
    assert virtual.parts["optimizer"] == 2 * weights + 6 * 4
    assert resident.parts["direction"] == weights
    assert plan["in place", "state"].parts["copies"] == pytest.approx(weights, rel=0.01)
    assert plan["in place, from the host", "state"].host_bytes == pytest.approx(weights, rel=0.01)
    assert virtual.parts["formed"] >= 4096 * 4096 * 4
    assert plan["deep"].peak_bytes < plan["clone"].peak_bytes


@pytest.mark.parametrize(("width", "most"), [(1024, 8 * 4096 * 1024 * 4), (16384, 2**30)], ids=["a matrix", "a part"])
def test_formed_rows_of_several_step_sizes_are_counted_as_on_a_card_with_room(width: int, most: int) -> None:
    with torch.device("meta"):
        model = nn.Linear(width, 4096, bias=False)
    plan = sharpkern.memory_plan(model, lambda model: model(torch.zeros(512, width)).square().mean(), progress=False)
    assert plan["batched", "state"].parts["formed"] == pytest.approx(most, rel=0.02)


def test_a_direction_in_bf16_is_planned_for_where_weights_are() -> None:
    with torch.device("meta"):
        model = Regression().bfloat16()
    loss_fn = lambda model: model(torch.zeros(64, 512, dtype=torch.bfloat16)).square().mean()
    plan = sharpkern.memory_plan(model, loss_fn, progress=False)
    weights = bytes_of(model.parameters())
    for method in ("in place", "virtual", "batched"):
        assert plan[method, "bf16"].parts["direction"] == pytest.approx(weights, rel=0.01)
        assert plan[method, "resident"].parts["direction"] == pytest.approx(2 * weights, rel=0.01)
        assert "direction" not in plan[method, "state"].parts
    assert "On 24 GB or more Δθ is kept in bf16, which moves fewer bytes." in " ".join(str(plan).split())
    in_fp32 = sharpkern.memory_plan(model.float(), squares, progress=False)
    assert not any(row.direction == "bf16" for row in in_fp32.rows)
    assert "bf16" not in str(in_fp32)


@pytest.mark.parametrize(("gigabytes", "card"), [(1, 24), (7, 80), (14, 141), (60, None)])
def test_the_headline_says_from_which_card_on_a_direction_is_kept(gigabytes: int, card: int | None) -> None:
    size = gigabytes * GIB
    held = {"weights": size, "gradients": size, "optimizer": 4 * size}
    rows = (MethodMemory("virtual", "state", 1, held), MethodMemory("virtual", "bf16", 1, held | {"direction": size}))
    said = str(MemoryPlan("model", {}, rows))
    assert (f"On {card} GB or more Δθ is kept in bf16" in said) if card else ("kept in bf16" not in said)


def test_tied_weights_are_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(3000, 128), nn.Linear(128, 3000, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, rows: Tensor) -> Tensor:
            return self.head(self.embedding(rows))

    with torch.device("meta"):
        model = Tied()
    plan = sharpkern.memory_plan(
        model, lambda model: model(torch.zeros(4, 8, dtype=torch.int64)).mean(), progress=False
    )
    assert plan["virtual"].parts["weights"] == 3000 * 128 * 4
    assert plan.conditions["parameters"] == 3000 * 128


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_planned_for_on_shards(optimizer: str) -> None:
    with torch.device("meta"):
        model = Regression()
    whole, shards = (
        sharpkern.memory_plan(model, squares, optimizer=optimizer, num_gpus=num, progress=False) for num in (1, 4)
    )
    for row in shards.rows:
        # On the way back gradients are among what FSDP2 has gathered.
        if row.method == "forward and backward":
            continue
        alone = whole[row.method, row.direction]
        # Where Δθ is made by a step on a copy, the peak may be then, or in the pass.
        for part in ("weights", "optimizer", "gradients", *(["direction"] if optimizer != "adamw-8bit" else [])):
            assert 4 * row.parts.get(part, 0) == pytest.approx(alone.parts.get(part, 0), rel=0.35), (row.method, part)
    assert not torch.distributed.is_initialized()


class Odd(nn.Module):
    """Parameters that are frozen, or not read, and a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = (nn.Linear(512, 512, bias=False) for _ in range(3))
        self.frozen.requires_grad_(False)
        self.scale = torch.ones(512)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.used(x)) * self.scale


def test_a_model_with_parameters_that_are_frozen_or_not_read_is_planned_for() -> None:
    with torch.device("meta"):
        model = Odd()
    plan = sharpkern.memory_plan(model, squares, progress=False)
    matrix = 4 * 512**2
    for row in plan.rows:
        assert row.parts["weights"] == 3 * matrix
        if row.direction == "resident":
            assert row.parts["direction"] == 2 * matrix, row.method
    assert plan["virtual", "state"].parts["gradients"] == 2 * matrix
    with pytest.raises(ValueError, match="model must have parameters that are trained, got none"):
        sharpkern.memory_plan(model.requires_grad_(False), squares, progress=False)


def test_what_an_engine_cannot_evaluate_is_left_out() -> None:
    with torch.device("meta"):
        model = nn.LSTM(64, 64)
    plan = sharpkern.memory_plan(model, lambda model: model(torch.zeros(5, 3, 64))[0].mean(), progress=False)
    assert {row.method for row in plan.rows if row.direction == "state"} >= {"in place", "virtual"}
    assert not any(row.method.startswith("batched") for row in plan.rows)


def test_no_more_tokens_than_learned_positions(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=1, n_embd=64, n_head=2, n_positions=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens must be at most the model's 32 positions, got 33"):
        sharpkern.memory_plan(tmp_path, tokens=33, progress=False)


def test_a_card_is_the_smallest_that_holds_it() -> None:
    def of(size: float) -> int | None:
        return MethodMemory("", "", 1, {"weights": int(size)}).card

    assert [of(USABLE * card) for card in CARDS] == list(CARDS)
    assert of(USABLE * 24 + 1) == 40
    assert of(192 * GIB) is None


def test_a_plan_is_told_written_and_drawn(tmp_path: Path) -> None:
    name = olmo2(tmp_path / "model", num_hidden_layers=1, vocab_size=1000)
    files = tmp_path / "plan.json", tmp_path / "plan.png"
    arguments = ["memory", name, "--tokens", "64", "--steps", "2", "--json", str(files[0]), "--plot", str(files[1])]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    record = json.loads(files[0].read_text())
    assert record["conditions"] == {
        "parameters": 3_648_000,
        "optimizer": "adamw-fp32",
        "gpus": 1,
        "tokens": 64,
        "batch_size": 1,
        "dtype": "float32",
        "head": "stock",
    }
    assert MemoryPlan.from_json(record).to_json() == record
    for row in record["rows"]:
        assert row["peak_bytes"] == sum(row["parts"].values())
        assert row["card_gb"] == 24
        assert row["method"] in result.output
    assert result.output.startswith("Fits a 24 GB card: virtual, Δθ from state (")
    assert "MiB on each GPU" in result.output
    assert all(len(line) <= 80 for line in result.output.splitlines() if not line.startswith("Wrote"))
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (("olmo3-1t",), {}, ValueError, "model must be one of olmo2-1b, .* got 'olmo3-1t'; pass the path of a config"),
        ((3,), {}, TypeError, "model must be a name, a path or a torch.nn.Module, got int; build the model under"),
        ((nn.Linear(2, 2),), {}, TypeError, "loss_fn must be given with a module, got none"),
        (("olmo2-1b", squares), {}, TypeError, "loss_fn must be left out for a model by name"),
        (("olmo2-1b",), {"optimizer": "lion"}, ValueError, "optimizer must be one of none, .*, got 'lion'"),
        (("olmo2-1b",), {"head": "none"}, ValueError, "head must be one of stock, chunked, got 'none'"),
        (("olmo2-1b",), {"num_steps": 9}, ValueError, "num_steps must be from 1 to 8, got 9"),
        (("olmo2-1b",), {"num_gpus": 0}, ValueError, "num_gpus must be from 1 to 65536, got 0"),
        (("olmo2-1b",), {"tokens": 1.5}, TypeError, "tokens must be an integer, got 1.5"),
        (("olmo2-1b",), {"dtype": torch.int8}, TypeError, "dtype must be a floating torch.dtype, got torch.int8"),
        (
            (nn.Linear(512, 2), lambda model: squares(model) * squares(model).item()),
            {},
            ValueError,
            "loss_fn must not read values, which a plan has none of",
        ),
        (
            (nn.Linear(512, 2), lambda model: squares(model) * squares(model).detach().numpy()),
            {},
            ValueError,
            "loss_fn must not read values, which a plan has none of, got .numpy",
        ),
    ],
)
def test_bad_input_is_refused_with_its_remedy(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sharpkern.memory_plan(*arguments, **options, progress=False)


def test_a_configuration_of_something_else_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model must be a causal language model, got a ViTConfig"):
        sharpkern.memory_plan(tmp_path, progress=False)
    own_code = '{"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}'
    for content in ("{}", "null", '{"model_ty', '{"model_type": "olmo2", "hidden_size": "x"}', own_code):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="model must be a configuration of transformers"):
            sharpkern.memory_plan(tmp_path, progress=False)


def test_the_headline_says_where_nothing_fits() -> None:
    rows = tuple(
        MethodMemory(name, "state", 1, {"weights": size * GIB}) for name, size in (("in place", 300), ("virtual", 250))
    )
    plan = MemoryPlan("large", {}, rows)
    words = "Fits no card of up to 192 GB; the least is virtual, Δθ from state (250.00 GiB on each GPU). Shard it"
    assert str(plan).startswith(words)


def test_help_keeps_choices_whole_on_a_narrow_terminal() -> None:
    shown = CliRunner().invoke(app, ["memory", "--help"], env={"COLUMNS": "60"}).output
    assert "auto|float32|bfloat16|float16" in shown
    assert "…" not in shown


def test_the_command_line_offers_what_there_is() -> None:
    assert [choice.value for choice in Optimizer] == list(OPTIMIZERS)
    assert [choice.value for choice in Head] == list(architectures.HEADS)
    refused = CliRunner().invoke(app, ["memory", "olmo3-1t"], env={"COLUMNS": "1000"})
    assert refused.exit_code == 2
    assert "model must be one of olmo2-1b" in refused.output


def test_files_that_cannot_be_written_are_told_before_anything_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "memory_plan", lambda *_, **__: pytest.fail("counted"))
    (tmp_path / "file").touch()
    for option in ("--json", "--plot"):
        arguments = ["memory", "olmo2-1b", option, str(tmp_path / "file" / "plan")]
        refused = CliRunner().invoke(app, arguments, env={"COLUMNS": "1000"})
        assert refused.exit_code == 2, refused.exception
        assert re.search(rf"{option} must be a file that can be written, got .*file is no folder", refused.output)
