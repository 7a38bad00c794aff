"""Runs that are made once: each knows what decides its losses, and leaves its result beside its records."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mutune.compose import build
from mutune.files import write_json
from mutune.search.claims import Claims
from mutune.search.workers import POLL_SECONDS, RunAll
from mutune.training.result import RunResult, discard

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
    """The results of `runs`, in their order; those of finished ones are read from their folders, and those that other
    processes are at are waited for.

    Args:
        run_some: runs those that are not, as `Workers.run` does.
        report: called with (finished, total, names of the running) at every change and about once a second.
    """
    done: dict[Path, RunResult] = {}

    def tick(running: list[AnyRun]) -> None:
        report(len(done), len(runs), [run.directory.name for run in running])

    with Claims() as claims:
        while True:
            done |= {run.directory: result for run in runs if (result := finished(run)) is not None}
            open_runs = [run for run in runs if run.directory not in done]
            tick([])
            if not open_runs:
                return [done[run.directory] for run in runs]
            before = len(done)
            for run, result in run_some(claims.of(open_runs, lambda run: finished(run) is None), tick):
                write_json(run.directory / RESULT, {"fingerprint": run.fingerprint, **asdict(result)})
                discard(run.directory)
                done[run.directory] = result
                claims.release(run.directory)
            if len(done) == before:  # other processes are at the rest
                time.sleep(POLL_SECONDS)


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
