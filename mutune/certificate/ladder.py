"""A ladder's runs: what each is, where it lies, and whether it is finished."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mutune.certificate.points import AXES
from mutune.certificate.rungs import place
from mutune.compose import build
from mutune.files import write_json
from mutune.search.workers import RunAll
from mutune.training.config import RunSpec
from mutune.training.run import RunResult, run_to_end

RESULT = "result.json"


class OnLadder(Protocol):
    """What is run on a ladder, whatever the model: it has a folder, and knows what decides its losses."""

    @property
    def directory(self) -> Path:
        """Where its records and its result go."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its losses."""


AnyRun = TypeVar("AnyRun", bound=OnLadder)


@dataclass(frozen=True)
class LadderRun:
    """One training run of the ladder.

    Attributes:
        rung: its name, in what it differs from the base.
        offset: octaves from the transferred learning rate.
    """

    rung: str
    offset: float
    spec: RunSpec
    directory: Path
    device: str
    data_hash: str

    def __str__(self) -> str:
        return f"ladder run {self.directory.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its losses."""
        return fingerprint(asdict(self.spec), self.data_hash)

    @property
    def note(self) -> dict[str, Any]:
        """What its records say it belongs to; a rung of widths is named by its width."""
        width = self.spec.model.width
        return {"rung": width if self.rung == f"w{width}" else self.rung, "offset": self.offset}


def rung_name(spec: RunSpec, base: RunSpec) -> str:
    """`w64` for a width, and what else differs from the base: `w32_d8`, `w32_t245760`, `w32_b1024`."""
    here, there = place(spec), place(base)
    return f"w{spec.model.width}" + "".join(
        f"_{axis[0]}{here[axis]:.0f}" for axis in AXES if axis != "width" and here[axis] != there[axis]
    )


def fingerprint(*data: Any) -> str:
    """Hash of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def gather(runs: Sequence[OnLadder], ladder: Path, spare: Path) -> None:
    """Let `ladder` hold these runs alone: what another ladder left goes to `spare`, and comes back when asked for."""
    wanted = {run.directory.name for run in runs}
    for folder in list(ladder.glob("*/")):
        if folder.name not in wanted:
            _move(folder, spare / folder.name)
    for folder in list(spare.glob("*/")):
        if folder.name in wanted and not (ladder / folder.name).exists():
            _move(folder, ladder / folder.name)


def _move(folder: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)


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
        done[run.directory] = result
    tick([])
    return [done[run.directory] for run in runs]


def train_rung(run: LadderRun) -> RunResult:
    """One run of the ladder; a worker's whole job."""
    return run_to_end(run.spec, run.directory, run.device, run.note)


def finished(run: OnLadder) -> RunResult | None:
    """The result of a run that is over; None where there is none, or one of something else, or a damaged one."""
    try:
        data = json.loads((run.directory / RESULT).read_text())
        if not isinstance(data, dict) or data.pop("fingerprint", None) != run.fingerprint:
            return None
        result = build(RunResult, data)
    except (OSError, ValueError):
        return None
    return result if result.diverged or math.isfinite(result.value) else None
