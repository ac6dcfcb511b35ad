"""Real trackers, offline: each gets every value under its name and step, and tells it when it is asked."""

import importlib
import json
import struct
import subprocess
import sys
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sharpkern

Curves = dict[str, list[tuple[int, float]]]

ROOT = Path(__file__).parents[2]
# The last one has a loss without a least value: there is a bound, and no λ_c.
STEPS = (0, 2, 5)


def train(log: Any, own: Callable[[int], object] = lambda step: None) -> sharpkern.Monitor:
    """A loop that is measured at some steps, and logs something of its own in all of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = sharpkern.Monitor(model, optimizer, every=lambda step: step in STEPS, log=log, max_forwards=60)
    for step in range(6):
        x, y = torch.randn(32, 8), torch.randint(4, (32,))
        loss_fn = lambda x=x, y=y, step=step: model(x).mean() if step == 5 else F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss_fn().backward()
        monitor(loss_fn)
        own(step)
        optimizer.step()
    return monitor


# Each trains, and reads back what the tracker has.


def tensorboard(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        monitor = train(writer)
    events = EventAccumulator(str(folder))
    events.Reload()
    return monitor, {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a run's file: seven bytes, and then blocks of 32 KiB of parts with a checksum, a length and a kind."""
    at, whole = 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        if len(data) - at < 7:
            return
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part, at = data[at + 7 : at + 7 + length], at + 7 + length
        if len(part) < length:
            return
        # The only one, the first of several, one between, the last.
        whole = part if kind in {1, 2} else whole + part
        if kind in {1, 4}:
            yield whole


def wandb(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    with wandb.init(project="p", mode="offline", dir=str(folder)):
        monitor = train(wandb.log, lambda step: wandb.log({"loss": step}))
    (path,) = folder.rglob("*.wandb")
    records: list[Any] = []
    deadline = time.monotonic() + 60
    # Another process writes it, and may be late.
    while not (records and records[-1].HasField("exit")) and time.monotonic() < deadline:
        records = [Record.FromString(data) for data in wandb_records(path.read_bytes())]
    curves = defaultdict(list)
    for record in records:
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if name.startswith("sharpness/") and name != "sharpness/step":
                # Against this step its curves are drawn.
                curves[name].append((row["sharpness/step"], value))
    return monitor, curves


def mlflow(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.create_experiment("e", artifact_location=str(folder))
    mlflow.set_experiment("e")
    with mlflow.start_run() as run:
        monitor = train(mlflow.log_metrics)
    client = mlflow.MlflowClient()
    names = client.get_run(run.info.run_id).data.metrics
    history = lambda name: client.get_metric_history(run.info.run_id, name)
    return monitor, {name: [(one.step, one.value) for one in history(name)] for name in names}


def comet_ml(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    import comet_ml

    experiment = comet_ml.OfflineExperiment(
        project_name="p", workspace="w", offline_directory=str(folder), display_summary_level=0
    )
    monitor = train(experiment.log_metrics)
    experiment.end()
    (path,) = folder.glob("*.zip")
    curves = defaultdict(list)
    with zipfile.ZipFile(path) as archive:
        for line in archive.read("messages.json").decode().splitlines():
            metric = json.loads(line).get("payload", {}).get("metric") or {}
            if str(metric.get("metricName", "")).startswith("sharpness/"):
                curves[metric["metricName"]].append((metric["step"], float(metric["metricValue"])))
    return monitor, curves


def trackio(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    import os

    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    run = trackio.init(project="p", embed=False)
    monitor = train(trackio.log)
    trackio.finish()
    curves = defaultdict(list)
    for row in SQLiteStorage.get_logs("p", run.name):
        for name, value in row.items():
            if name.startswith("sharpness/"):
                curves[name].append((row["step"], value))
    return monitor, curves


def aim(folder: Path) -> tuple[sharpkern.Monitor, Curves]:
    import aim

    run = aim.Run(repo=str(folder), system_tracking_interval=None, capture_terminal_logs=False)
    monitor = train(run.track)
    curves: Curves = {}
    for metric in run.metrics():
        steps, (values, *_) = metric.data.numpy()
        curves[metric.name] = sorted(zip(map(int, steps), map(float, values), strict=True))
    return monitor, curves


TRACKERS = {one.__name__: one for one in (tensorboard, wandb, mlflow, comet_ml, trackio, aim)}


def main(name: str, folder: str) -> None:
    monitor, curves = TRACKERS[name](Path(folder))
    rows = [
        (one.step, one.lr, vars(one.measurement)["critical_lr"], one.measurement.sharpness) for one in monitor.history
    ]
    statuses = [one.measurement.status for one in monitor.history]
    print("\n" + json.dumps({"rows": rows, "statuses": statuses, "curves": curves}))


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_has_every_value_under_its_name_and_step(name: str, tmp_path: Path) -> None:
    # Trackers leave threads and processes, and change what is imported after them.
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed; the extra 'trackers' has all but aim, whose pins are of their own")
    program = f"from tests.monitoring.test_trackers import main; main({name!r}, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = next(json.loads(line) for line in reversed(done.stdout.splitlines()) if line.startswith('{"rows"'))
    (*converged, last), curves = (
        found["rows"],
        {key: [tuple(one) for one in value] for key, value in found["curves"].items()},
    )
    assert found["statuses"] == ["converged", "converged", "unbounded"]
    # Some keep float32.
    same = lambda pairs: [(step, pytest.approx(value, rel=1e-6)) for step, value in pairs]
    assert curves["sharpness/lambda_c"] == same((step, sharpness) for step, _, _, sharpness in converged)
    assert curves["sharpness/critical_lr"] == same((step, eta) for step, _, eta, _ in converged)
    assert curves["sharpness/headroom"] == same((step, eta / lr) for step, lr, eta, _ in converged)
    assert curves["sharpness/critical_lr_bound"] == same([(last[0], last[2])])
    assert curves["sharpness/converged"] == [(0, 1.0), (2, 1.0), (5, 0.0)]
    assert curves["sharpness/unbounded"] == [(5, 1.0)]
    assert [step for step, _ in curves["sharpness/loss"]] == list(STEPS)
