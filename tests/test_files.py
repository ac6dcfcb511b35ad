"""Files that are written stay whole: on a full disk what was there stays, and so do permissions, links and pipes."""

import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from sharpkern.cli import demo, revisions
from sharpkern.cli.digits import DemoRun
from sharpkern.memory.cards import MethodMemory
from sharpkern.memory.plan import MemoryPlan
from sharpkern.mixtures.results import MixturePoint, MixtureSweep
from sharpkern.monitoring.monitor import Monitor
from sharpkern.monitoring.plot import plot_history
from tests.monitoring.test_monitor import Loop
from tests.monitoring.test_plot import record

HISTORY = [record(step, 1.0 + step) for step in range(40)]
SWEEP = MixtureSweep(
    ("old", "new"),
    ("a",),
    tuple((share / 40, 1 - share / 40) for share in range(40)),
    tuple(
        MixturePoint((share / 40, 1 - share / 40), 0, "a", 0.5, 4.0, "converged", 0.01, (0.4, 0.5), 1.0, 3, "virtual")
        for share in range(40)
    ),
)
PLAN = MemoryPlan("tiny", {}, tuple(MethodMemory(f"way {i}", "", 1, {"weights": (1 + i) * 2**30}) for i in range(9)))


def monitor() -> Monitor:
    found = Loop().monitor
    found.history = HISTORY
    return found


@contextmanager
def full_disk() -> Iterator[None]:
    """Writing fails after 500 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "history as a table": ("run.csv", lambda path: monitor().to_csv(path)),
    "history as a picture": ("run.png", lambda path: plot_history(HISTORY, path)),
    "sweep as a table": ("sweep.csv", SWEEP.to_csv),
    "sweep as a picture": ("sweep.png", SWEEP.plot),
    "demo": ("demo.csv", lambda path: demo.write_csv(DemoRun(0.1, 20.0, 50, 40, HISTORY), path)),
    "checkpoints": (
        "measure.csv",
        lambda path: revisions.write([(f"step{r.step}", r.measurement) for r in HISTORY], path.parent, "measure"),
    ),
    "plan as numbers": ("plan.json", PLAN.save),
    "plan as a picture": ("plan.png", PLAN.plot),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_leaves_what_was_there(writer: str, tmp_path: Path) -> None:
    name, write = WRITERS[writer]
    path = tmp_path / name
    write(path)
    before = path.read_bytes()
    written = sorted(tmp_path.iterdir())
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(path)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == written
    write(path)
    assert path.read_bytes() == before


def test_a_file_that_takes_anothers_place_has_its_permissions_and_new_ones_the_usual(tmp_path: Path) -> None:
    plain, mine = tmp_path / "plain.csv", tmp_path / "mine.csv"
    mine.touch()
    mine.chmod(0o660)
    (tmp_path / "usual").touch()
    for path in (plain, mine):
        SWEEP.to_csv(path)
    assert stat.S_IMODE(mine.stat().st_mode) == 0o660
    assert plain.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_link_stays_one_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    link, target = tmp_path / "latest.csv", folder / "one.csv"
    link.symlink_to(target)
    for _ in range(2):
        SWEEP.to_csv(link)
        assert link.is_symlink()
        assert len(target.read_text(encoding="utf-8").splitlines()) == 41
        target.write_text("old", encoding="utf-8")
    assert sorted(tmp_path.iterdir()) == [link, folder]


@pytest.mark.parametrize("write", [SWEEP.to_csv, SWEEP.plot])
def test_a_pipe_is_written_through(write: Callable[[Path], object], tmp_path: Path) -> None:
    path, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(path)
    file.touch()
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join()
    write(file)
    assert read == [file.read_bytes()]
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_a_picture_without_an_ending_is_a_png_as_matplotlib_has_it(tmp_path: Path) -> None:
    SWEEP.plot(tmp_path / "sweep")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_where_nothing_can_be_written_the_error_names_the_path_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for path, error in ((tmp_path / "none" / "s.csv", FileNotFoundError), (tmp_path / "folder.csv", IsADirectoryError)):
        with pytest.raises(error, match=path.name):
            SWEEP.to_csv(path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anything")
def test_a_file_that_must_not_be_written_is_not_replaced(tmp_path: Path) -> None:
    kept, folder = tmp_path / "kept.csv", tmp_path / "folder"
    kept.write_text("kept", encoding="utf-8")
    kept.chmod(0o400)
    with pytest.raises(PermissionError, match=r"kept\.csv"):
        SWEEP.to_csv(kept)
    assert kept.read_text(encoding="utf-8") == "kept"
    # A folder that takes no further file, with one in it that may be written.
    folder.mkdir()
    (folder / "one.csv").touch()
    folder.chmod(0o500)
    SWEEP.to_csv(folder / "one.csv")
    assert (folder / "one.csv").stat().st_size > 1000
    folder.chmod(0o700)
