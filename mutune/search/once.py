"""Runs that are made once: each knows what decides its losses, and leaves its result beside its records."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mutune.compose import build
from mutune.files import write_json
from mutune.search.workers import RunAll
from mutune.training.run import RunResult, discard

RESULT = "result.json"


class Once(Protocol):
    """A run, whatever the model: it has a folder, and knows what decides its losses."""

    @property
    def directory(self) -> Path:
        """Where its records and its result go."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its losses."""


AnyRun = TypeVar("AnyRun", bound=Once)


def fingerprint(*data: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def run_open(
    runs: Sequence[AnyRun], run_some: RunAll[AnyRun, RunResult], report: Callable[[int, int, list[str]], None]
) -> list[RunResult]:
    """The results of `runs`, in their order; those of finished ones are read from their folders.

    Args:
        run_some: runs those that are not, as `Workers.run` does.
        report: called with (finished, total, names of the running) at every change and about once a second.
    """
    done = {run.directory: result for run in runs if (result := finished(run)) is not None}
    open_runs = [run for run in runs if run.directory not in done]

    def tick(running: list[AnyRun]) -> None:
        report(len(done), len(runs), [run.directory.name for run in running])

    for run, result in run_some(open_runs, tick):
        write_json(run.directory / RESULT, {"fingerprint": run.fingerprint, **asdict(result)})
        discard(run.directory)
        done[run.directory] = result
    tick([])
    return [done[run.directory] for run in runs]


def finished(run: Once) -> RunResult | None:
    """The result of a run that is over; None where there is none, or one of something else, or a damaged one."""
    try:
        data = json.loads((run.directory / RESULT).read_text())
        if not isinstance(data, dict) or data.pop("fingerprint", None) != run.fingerprint:
            return None
        result = build(RunResult, data)
    except (OSError, ValueError):
        return None
    return result if result.diverged or math.isfinite(result.value) else None
