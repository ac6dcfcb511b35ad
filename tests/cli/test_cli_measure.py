"""``sharpkern measure`` on a small Olmo 2 with saved revisions of a real short training."""

import csv
import json
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import sharpkern
from sharpkern.cli import app, checkpoint, revisions
from sharpkern.cli.corpus import read_text, row_loss, rows_of, spread
from sharpkern.errors import SharpkernWarning
from sharpkern.mixtures import fingerprint as _marks
from tests.helpers import checkpoints
from tests.helpers.checkpoints import ENGLISH, REVISIONS


@pytest.fixture(scope="module")
def olmo() -> Path:
    return checkpoints.olmo()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "english.txt"
    path.write_text(ENGLISH, encoding="utf-8")
    return path


def invoke(*arguments: object):
    # Paths of temporary folders may be long, and a terminal breaks them in two.
    wide = {"COLUMNS": "1000"}
    return CliRunner(env=wide).invoke(app, ["measure", *(str(argument) for argument in arguments)])


def words(result) -> str:
    return checkpoints.words(result.output)


def arguments(model: Path, text: Path, output: Path, **changes: object) -> list[object]:
    options = {"batches": 2, "batch-size": 3, "tokens": 32, "revisions": ",".join(REVISIONS), **changes}
    pairs = [(f"--{name}", value) for name, value in options.items() if value is not None]
    return ["--model", model, "--text", text, "--output", output, *(word for pair in pairs for word in pair)]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "measure.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(folder: Path) -> list[dict[str, str]]:
    """The table without what depends on the machine's pace, and on which checkpoint was the process's first."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "forwards")} for row in table(folder)]


@pytest.mark.parametrize("direction", ["adamw", "sgd"])
def test_every_revision_has_the_value_that_the_library_gives(direction, olmo, text, tmp_path) -> None:
    result = invoke(*arguments(olmo, text, tmp_path, direction=direction))
    assert result.exit_code == 0, result.output
    rows = table(tmp_path)
    assert [row["revision"] for row in rows] == REVISIONS
    assert [row["step"] for row in rows] == ["0", "8", "16"]
    assert (tmp_path / "measure.png").stat().st_size > 1000
    for row in rows:
        model, data = loaded(olmo / row["revision"], text)
        losses = [partial(row_loss, model, part) for part in data.split(3)]
        make = sharpkern.adamw_direction if direction == "adamw" else sharpkern.gradient_direction
        expected = sharpkern.critical_sharpness(
            model, lambda losses=losses: torch.stack([loss() for loss in losses]).mean(), make(model, losses)
        )
        assert row["status"] == expected.status == "converged"
        assert float(row["lambda_c"]) == pytest.approx(expected.sharpness, rel=0.02)
        assert float(row["loss"]) == pytest.approx(expected.base_loss, rel=1e-5)
        assert f"{float(row['lambda_c']):.4g}" in words(result)


def loaded(folder: Path, text: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = rows_of([text], lambda words: tokenizer(words)["input_ids"], 32, at_least=6, option="--text")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.use_cache = False
    return model, rows[spread(len(rows), 6)]


def test_one_checkpoint_is_in_memory_at_a_time(olmo, text, tmp_path, monkeypatch) -> None:
    import weakref

    alive, most = weakref.WeakSet(), []
    load = revisions.Checkpoint.load

    def counted(*arguments):
        most.append(len(alive))
        model = load(*arguments)
        alive.add(model)
        return model

    monkeypatch.setattr(revisions.Checkpoint, "load", counted)
    assert invoke(*arguments(olmo, text, tmp_path)).exit_code == 0
    assert most == [0, 0, 0]


def test_stopped_and_called_again_it_gives_the_numbers_of_one_run_through(olmo, text, tmp_path, monkeypatch) -> None:
    through, again = tmp_path / "through", tmp_path / "again"
    assert invoke(*arguments(olmo, text, through)).exit_code == 0
    load, loads = revisions.Checkpoint.load, []

    def stopping(checkpoint, *arguments):
        loads.append(checkpoint.label)
        if len(loads) == 3:
            raise KeyboardInterrupt
        return load(checkpoint, *arguments)

    monkeypatch.setattr(revisions.Checkpoint, "load", stopping)
    stopped = invoke(*arguments(olmo, text, again))
    assert stopped.exit_code == 130
    assert "Stopped at 2 of 3: the same command goes on." in words(stopped)
    assert not (again / "measure.csv").exists()
    assert invoke(*arguments(olmo, text, again)).exit_code == 0
    assert loads == [*REVISIONS[:2], *[REVISIONS[2]] * 2]
    assert numbers(again) == numbers(through)


@pytest.mark.long
def test_blocks_are_measured_alone_too(olmo, text, tmp_path) -> None:
    result = invoke(*arguments(olmo, text, tmp_path, revisions=",".join(REVISIONS[:2])), "--by-block")
    assert result.exit_code == 0, result.output
    with (tmp_path / "measure_blocks.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    blocks = list(dict.fromkeys(row["block"] for row in rows))
    assert blocks[:2] == ["model.embed_tokens", "model.layers.0"]
    assert [(row["revision"], row["block"]) for row in rows] == [(r, b) for r in REVISIONS[:2] for b in blocks]
    assert (tmp_path / "measure_blocks.png").stat().st_size > 1000
    model, data = loaded(olmo / REVISIONS[0], text)
    losses = [partial(row_loss, model, part) for part in data.split(3)]
    mean = lambda: torch.stack([loss() for loss in losses]).mean()
    found = sharpkern.blockwise_critical_sharpness(model, mean, sharpkern.adamw_direction(model, losses))
    for row in rows[: len(blocks)]:
        assert row["status"] == found[row["block"]].status
        if row["status"] == "converged":
            assert float(row["lambda_c"]) == pytest.approx(found[row["block"]].sharpness, rel=0.03)
    # Called again it reads them from the file, and without blocks it is another measurement.
    assert invoke(*arguments(olmo, text, tmp_path), "--by-block").exit_code == 0
    with pytest.warns(SharpkernWarning, match="other settings: by_block was True, is None; they are kept"):
        assert invoke(*arguments(olmo, text, tmp_path, revisions=REVISIONS[0])).exit_code == 0


def test_a_sample_of_batches_tells_of_all(olmo, text, tmp_path) -> None:
    many = {"batches": 24, "batch-size": 1, "revisions": REVISIONS[2]}
    assert invoke(*arguments(olmo, text, tmp_path / "all", **many)).exit_code == 0
    result = invoke(*arguments(olmo, text, tmp_path / "some", sample="auto", **many))
    assert result.exit_code == 0, result.output
    (whole,), (sampled,) = table(tmp_path / "all"), table(tmp_path / "some")
    assert float(sampled["lambda_c"]) == pytest.approx(float(whole["lambda_c"]), rel=float(sampled["error"]) + 0.02)
    assert float(sampled["error"]) <= 0.05
    assert float(sampled["forwards"]) < float(whole["forwards"])
    # The settings are in the file: it goes on.
    assert invoke(*arguments(olmo, text, tmp_path / "some", sample="auto", **many)).exit_code == 0
    assert len((tmp_path / "some" / "measure.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("sample", ["some", "3", "0", "1.5", "-0.5", "nan"])
def test_a_sample_that_is_none_is_named(sample: str, olmo, text, tmp_path) -> None:
    result = invoke(*arguments(olmo, text, tmp_path, sample=sample))
    assert result.exit_code == 2
    assert f"--sample must be auto, a share in (0, 1], or a number of batches from 4 on, got '{sample}'" in words(
        result
    )


def test_revisions_may_be_added_and_results_of_other_settings_are_kept(olmo, text, tmp_path) -> None:
    assert invoke(*arguments(olmo, text, tmp_path, revisions=REVISIONS[0])).exit_code == 0
    before = (tmp_path / "measure.jsonl").read_bytes()
    assert invoke(*arguments(olmo, text, tmp_path)).exit_code == 0
    assert (tmp_path / "measure.jsonl").read_bytes().startswith(before)
    before = (tmp_path / "measure.jsonl").read_bytes()
    with pytest.warns(SharpkernWarning, match="other settings: direction was 'adamw', is 'sgd'; they are kept"):
        assert invoke(*arguments(olmo, text, tmp_path, direction="sgd")).exit_code == 0
    assert (tmp_path / "measure.jsonl").read_bytes().startswith(before)


def test_a_folder_is_a_checkpoint_by_itself(olmo, text, tmp_path) -> None:
    result = invoke(*arguments(olmo / REVISIONS[1], text, tmp_path, revisions=None))
    assert result.exit_code == 0, result.output
    (row,) = table(tmp_path)
    assert (row["revision"], row["step"]) == (REVISIONS[1], "8")


def test_bytes_need_no_tokenizer(olmo, text, tmp_path) -> None:
    model = tmp_path / "bare"
    shutil.copytree(olmo / REVISIONS[1], model, ignore=shutil.ignore_patterns("tokenizer*"))
    result = invoke(*arguments(model, text, tmp_path, revisions=None), "--bytes")
    assert result.exit_code == 0, result.output
    assert float(table(tmp_path)[0]["loss"]) > 0


def bare(olmo: Path, folder: Path) -> Path:
    """A checkpoint without its tokenizer."""
    return shutil.copytree(olmo / REVISIONS[0], folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))


def without_weights(olmo: Path, folder: Path) -> Path:
    return shutil.copytree(olmo / REVISIONS[0], folder / "bare", ignore=shutil.ignore_patterns("*.safetensors"))


def encoder_decoder(olmo: Path, folder: Path) -> Path:
    from transformers import T5Config

    T5Config().save_pretrained(folder / "t5")
    return folder / "t5"


def gpt2_without_vocabulary(olmo: Path, folder: Path) -> Path:
    """A checkpoint for which transformers makes up a tokenizer without a single token."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=300, bos_token_id=0, eos_token_id=0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    return folder / "gpt2"


def small_vocabulary(olmo: Path, folder: Path) -> Path:
    """A checkpoint whose model knows fewer tokens than its tokenizer gives."""
    path = shutil.copytree(olmo / REVISIONS[0], folder / "small")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    return path


def not_text(olmo: Path, folder: Path) -> Path:
    path = folder / "picture.txt"
    path.write_bytes(b"\x89PNG\xff\xfe")
    return path


def empty(olmo: Path, folder: Path) -> Path:
    path = folder / "empty.txt"
    path.write_text(" \n")
    return path


def cut(name: str, size: int | None, as_bin: bool = False):
    """A checkpoint with a file that was not copied to its end."""

    def make(olmo: Path, folder: Path) -> Path:
        model = shutil.copytree(olmo / REVISIONS[0], folder / "cut")
        if as_bin:
            weights = load_file(model / "model.safetensors")
            torch.save(weights, model / "pytorch_model.bin")
            (model / "model.safetensors").unlink()
        (model / name).write_bytes((model / name).read_bytes()[:size])
        return model

    return make


def with_config(content: str):
    def make(olmo: Path, folder: Path) -> Path:
        model = shutil.copytree(olmo / REVISIONS[0], folder / "odd")
        (model / "config.json").write_text(content, encoding="utf-8")
        return model

    return make


def of_own_code(olmo: Path, folder: Path) -> Path:
    """A checkpoint whose model is Python code beside its weights."""
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    model = with_config(json.dumps({"model_type": "mine", "auto_map": classes}))(olmo, folder)
    (model / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", encoding="utf-8")
    return model


def lacks_a_shard(olmo: Path, folder: Path) -> Path:
    model = shutil.copytree(olmo / REVISIONS[0], folder / "shards")
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return model


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revisions": "stage1-step0,stage1-step9"}, "'stage1-step9' must be a folder with a saved model .*got no "
         "such folder; there are: stage1-step0, stage1-step8, stage2-step16"),
        ({"model": bare}, "must have a tokenizer, got none; save it there with .*, or pass --bytes"),
        ({"model": gpt2_without_vocabulary}, "must have a tokenizer, got none; save it there"),
        ({"model": small_vocabulary}, r"vocabulary must hold every token, got token \d+ for 300 of them; save the tok"),
        ({"model": lambda olmo, folder: folder}, "must be a folder with a saved model or the name of one on the hub"),
        ({"model": without_weights}, "bare must hold the model's weights, got none; save the model there again"),
        ({"model": encoder_decoder}, "'t5' must be of a causal language model, got T5Config; name another model"),
        ({"revisions": "stage1-step0,stage1-step0"}, "--revisions must name each revision once, got stage1-step0,"),
        ({"revisions": ","}, "--revisions must hold something between commas, got ','; leave it out"),
        ({"device": "meta"}, "--device must be a device of this machine, got 'meta': it holds no values"),
        ({"tokens": 65}, "--tokens must be at most the model's context of 64, got 65; lower it"),
        ({"batches": 4000}, r"--text must hold at least 12000 rows of 32 tokens, got \d+ tokens, which are"),
        ({"text": empty}, "text must not be empty, got nothing in"),
        ({"text": not_text}, r"picture\.txt must be UTF-8 text, got other bytes; convert it"),
        ({"text": lambda olmo, folder: folder / "nowhere"}, "nowhere must be a file or a folder of text, got"),
        ({"device": "cuda:7"}, "--device must be a device of this machine, got 'cuda:7'"),
        ({"direction": "adam"}, "'adam' is not one of 'adamw', 'sgd'"),
        ({"model": cut("model.safetensors", 0)}, r"cut must hold whole files of weights, got model\.safetensors, which "
         "cannot be read: .*header too small"),
        ({"model": cut("model.safetensors", 100)}, r"got model\.safetensors, which cannot be read: .*header"),
        ({"model": cut("model.safetensors", -1)}, r"got model\.safetensors, which cannot be read: .*not fully covered"),
        ({"model": cut("pytorch_model.bin", 0, as_bin=True)}, r"got pytorch_model\.bin, which cannot be read: "),
        ({"model": cut("pytorch_model.bin", -10, as_bin=True)}, r"got pytorch_model\.bin, which cannot be read: "),
        ({"model": lacks_a_shard}, r"got model-00002-of-00002\.safetensors, which cannot be read: .*No such file"),
        ({"model": cut("config.json", 0)}, r"got '.*cut': .*not a valid JSON"),
        ({"model": with_config("null")}, "--model must be a folder with a saved model .* got '.*odd': .*NoneType"),
        ({"model": with_config('{"model_type": "olmo2", "hidden_size": "x"}')}, "got '.*odd': Validation error for"),
        ({"model": cut("tokenizer.json", 100)}, "must have a tokenizer that can be read, got one that cannot"),
        ({"model": of_own_code}, "--model must be of an architecture of transformers, got one with code of its own, "
         "which sharpkern does not run; "),
        ({"model": "./models/nowhere"}, r"got '\./models/nowhere', where there is no folder; check the path"),
        ({"model": "/models/nowhere"}, "got '/models/nowhere', where there is no folder"),
        ({"model": "models/of/mine"}, "got 'models/of/mine', where there is no folder"),
        ({"model": "runs/misspelt"}, "got 'runs/misspelt', where there is no folder"),
    ],
)  # fmt: skip
def test_bad_input_is_told_before_any_checkpoint_is_loaded(changes, message, olmo, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(revisions.Checkpoint, "load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    given = {name: value(olmo, tmp_path) if callable(value) else value for name, value in changes.items()}
    model, words_of = given.pop("model", olmo), given.pop("text", text)
    if model is not olmo:
        given["revisions"] = None
    result = invoke(*arguments(model, words_of, tmp_path / "out", **given))
    assert result.exit_code == 2, result.exception
    assert re.search(message, words(result)), words(result)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "ran").exists()


def file_above(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def folder_in_place_of(name: str):
    def make(folder: Path) -> Path:
        (folder / "out" / name).mkdir(parents=True)
        return folder / "out"

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            file_above,
            r"--output must be a folder that can be written, got .*out \(.*file is no folder\); choose another",
        ),
        (lambda folder: Path("/proc/out"), r"got /proc/out \("),
        (folder_in_place_of("measure.csv"), r"got .*out \(.*measure\.csv is a folder\)"),
        (folder_in_place_of("measure.png"), r"got .*out \(.*measure\.png is a folder\)"),
        (folder_in_place_of("measure.jsonl"), r"got .*out \(.*measure\.jsonl is a folder\)"),
    ],
)
def test_an_output_that_cannot_be_written_is_told_before_any_work(
    make, message, olmo, text, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(checkpoint, "checkpoints", lambda *_: pytest.fail("looked for"))
    monkeypatch.setattr(revisions.Checkpoint, "config", lambda *_: pytest.fail("read"))
    result = invoke(*arguments(olmo, text, make(tmp_path)))
    assert result.exit_code == 2, result.exception
    assert re.search(message, words(result)), words(result)


def test_a_disk_that_is_full_in_the_end_is_one_message_and_nothing_is_lost(olmo, text, tmp_path, monkeypatch) -> None:
    assert invoke(*arguments(olmo, text, tmp_path)).exit_code == 0
    before = (tmp_path / "measure.csv").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(revisions, "write_rows", full)
    result = invoke(*arguments(olmo, text, tmp_path))
    assert result.exit_code == 2, result.exception
    assert "No space left on device" in words(result)
    assert (tmp_path / "measure.csv").read_bytes() == before


@pytest.mark.parametrize("damage", [{"revision": 1}, {"mark": None}, {"measurement": {}}, {"more": 1}])
def test_a_row_that_no_measure_wrote_is_refused(damage, olmo, text, tmp_path) -> None:
    assert invoke(*arguments(olmo, text, tmp_path, revisions=REVISIONS[0])).exit_code == 0
    path = tmp_path / "measure.jsonl"
    head, row = path.read_text(encoding="utf-8").splitlines()
    path.write_text(f"{head}\n{json.dumps({**json.loads(row), **damage})}\n", encoding="utf-8")
    result = invoke(*arguments(olmo, text, tmp_path, revisions=REVISIONS[0]))
    assert result.exit_code == 2, result.exception
    assert re.search("rows that this function wrote, got another in line 2", words(result))


def test_a_checkpoint_is_known_by_its_bytes_and_not_by_its_times(olmo, text, tmp_path) -> None:
    model, other = (shutil.copytree(olmo / REVISIONS[i], tmp_path / str(i)) for i in (0, 2))
    once = arguments(model, text, tmp_path / "out", revisions=None)
    assert invoke(*once).exit_code == 0
    # Copied to another machine.
    os.utime(model / "model.safetensors", ns=(1, 1))
    assert invoke(*once).exit_code == 0
    # Other weights of the same size and time.
    shutil.copy(other / "model.safetensors", model / "model.safetensors")
    os.utime(model / "model.safetensors", ns=(1, 1))
    result = invoke(*once)
    assert result.exit_code == 2
    assert "must be what was measured before, got other weights by now" in words(result)


def test_of_a_large_file_blocks_all_over_it_count(tmp_path, monkeypatch) -> None:
    path = tmp_path / "weights"
    content = bytearray(range(256)) * 40
    monkeypatch.setattr(_marks, "_BLOCK", 16)
    monkeypatch.setattr(_marks, "_BLOCKS", 8)

    def mark(changed: int | None = None, more: bytes = b"") -> int:
        one = bytearray(content)
        if changed is not None:
            one[changed] ^= 1
        path.write_bytes(one + more)
        return _marks.fingerprint_of_file(path)

    marks = [mark(), mark(0), mark(len(content) - 1), mark(more=b"x")]
    assert len(set(marks)) == 4
    # Each byte of a small one.
    content = content[:128]
    assert len({mark(), *(mark(i) for i in range(128))}) == 129


def test_a_checkpoint_that_was_trained_on_is_not_what_was_measured(olmo, text, tmp_path) -> None:
    model = tmp_path / "model"
    shutil.copytree(olmo / REVISIONS[0], model)
    assert invoke(*arguments(model, text, tmp_path / "out", revisions=None)).exit_code == 0
    shutil.copytree(olmo / REVISIONS[2], model, dirs_exist_ok=True)
    result = invoke(*arguments(model, text, tmp_path / "out", revisions=None))
    assert result.exit_code == 2
    assert "model must be what was measured before, got other weights by now; give another --output" in words(result)


def test_a_checkpoint_that_lacks_weights_is_not_measured_with_random_ones(olmo, text, tmp_path) -> None:
    from safetensors.torch import save_file

    model = tmp_path / "model"
    shutil.copytree(olmo / REVISIONS[0], model)
    weights = load_file(model / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "down_proj" not in k}, model / "model.safetensors", {"format": "pt"})
    result = invoke(*arguments(model, text, tmp_path / "out", revisions=None))
    assert result.exit_code == 2
    assert re.search(
        "must hold all weights of its model, got none that fit for .*down_proj.* and 1 more", words(result)
    )


def test_without_matplotlib_nothing_is_measured_in_vain(olmo, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(revisions.Checkpoint, "load", lambda *_: pytest.fail("loaded"))
    result = invoke(*arguments(olmo, text, tmp_path))
    assert result.exit_code == 1
    assert "pip install 'sharpkern[plot]'" in words(result)


def test_a_name_that_the_hub_does_not_give_is_one_message(text, tmp_path, monkeypatch) -> None:
    import transformers

    def offline(*arguments, **options):
        raise OSError("We couldn't connect to the hub.\nSee how to run offline.")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    result = invoke(*arguments("owner/model", text, tmp_path, revisions="nope"))
    assert result.exit_code == 2
    assert "got 'owner/model' at revision 'nope': We couldn't connect to the hub." in words(result)


def test_all_missing_extras_are_named_in_one_message(olmo, text, tmp_path, monkeypatch) -> None:
    for name in ("transformers", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke(*arguments(olmo, text, tmp_path))
    assert result.exit_code == 1
    assert "needs transformers and matplotlib, which are not installed" in words(result)
    assert "pip install 'sharpkern[transformers,plot]'" in words(result)


def test_a_folder_of_revisions_is_told_what_it_holds(olmo, text, tmp_path) -> None:
    result = invoke(*arguments(olmo, text, tmp_path, revisions=None))
    assert result.exit_code == 2
    assert "a folder without config.json; name them with --revisions: " + ", ".join(sorted(REVISIONS)) in words(result)


def test_without_transformers_the_extra_is_named(olmo, text, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke(*arguments(olmo, text, tmp_path))
    assert result.exit_code == 1
    assert "pip install 'sharpkern[transformers]'" in words(result)


@pytest.mark.parametrize(
    ("labels", "steps"),
    [
        (["step0", "step1000"], [0, 1000]),
        (["stage1-step150-tokens1B", "stage1-step600-tokens3B"], [150, 600]),
        (["checkpoint-500", "checkpoint-1000"], [500, 1000]),
        # The second stage begins anew.
        (["stage1-step900", "stage2-ingredient1-step100"], None),
        (["step100", "main"], None),
    ],
)
def test_steps_are_read_out_of_names_where_they_grow(labels, steps) -> None:
    assert revisions.steps_of(labels) == steps


def test_folders_are_read_in_the_order_of_names_and_pictures_in_them_are_passed_over(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.txt").write_text("two", encoding="utf-8")
    (tmp_path / "a.py").write_text("one", encoding="utf-8")
    (tmp_path / "b" / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "b" / "binary").write_bytes(b"text\0text")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden", encoding="utf-8")
    assert read_text([tmp_path]) == "one\n\ntwo"
