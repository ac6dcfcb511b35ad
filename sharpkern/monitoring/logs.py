"""How a Monitor's numbers reach a logger, by the logger's own rule about steps."""

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

Send = Callable[[Mapping[str, float], int], object]

_STEP = "sharpness/step"


def sender(log: Any) -> Send:
    """Return what sends values of a step to a logger."""
    if hasattr(log, "add_scalar"):
        return lambda values, step: _send_scalars(log, values, step)
    if str(getattr(log, "__module__", "")).split(".")[0] == "wandb":
        return _ToRun(log)
    if _takes_step(log):
        return _ToTrackers(log) if hasattr(getattr(log, "__self__", None), "trackers") else _with_step(log)
    return lambda values, step: log({**values, _STEP: step})


def _with_step(log: Callable[..., object]) -> Send:
    return lambda values, step: log(dict(values), step=step)


def _send_scalars(log: Any, values: Mapping[str, float], step: int) -> None:
    for name, value in values.items():
        log.add_scalar(name, value, step)


def _takes_step(log: Callable[..., object]) -> bool:
    try:
        parameters = inspect.signature(log).parameters
    except (TypeError, ValueError):
        # One of C that does not tell.
        return True
    return "step" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())


class _ToRun:
    """Sends to a run of wandb, which drops what comes for a step before that of its last row.

    The values join the row that is open, so that the loop's own count goes on as it does, and stand against a step of
    their own.
    """

    def __init__(self, log: Callable[..., object]) -> None:
        self._log = log
        self._defined = False
        self._last: int | None = None

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of one step."""
        run: Any = getattr(self._log, "__self__", None) or getattr(sys.modules.get("wandb"), "run", None)
        if not self._defined and hasattr(run, "define_metric"):
            run.define_metric("sharpness/*", step_metric=_STEP)
            self._defined = True
        row, where = getattr(run, "step", None), {}
        if isinstance(row, int):
            # Where the loop has logged nothing since, the last values are in the open row still.
            self._last = row + 1 if row == self._last else row
            where = {"step": self._last}
        log = self._log if run is None else run.log
        log({**values, _STEP: step}, **where)


class _ToTrackers:
    """Sends to the trackers of an Accelerator, each by its own rule."""

    def __init__(self, log: Any) -> None:
        self._log = log
        self._runs: dict[int, _ToRun] = {}

    def __call__(self, values: Mapping[str, float], step: int) -> None:
        """Send the values of one step."""
        accelerator = self._log.__self__
        if all(tracker.name != "wandb" for tracker in accelerator.trackers):
            self._log(dict(values), step=step)
            return
        for tracker in accelerator.trackers:
            if tracker.name != "wandb":
                tracker.log(dict(values), step=step)
            elif accelerator.is_main_process:
                self._runs.setdefault(id(tracker), _ToRun(tracker.tracker.log))(values, step)
