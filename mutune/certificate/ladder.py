"""The ladder: the study's run at further widths, around the transferred learning rate."""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mutune.certificate.config import LadderConfig
from mutune.certificate.valley import Valley, fit_valley
from mutune.files import write_json
from mutune.search.workers import default_workers, run_all
from mutune.training.config import RunSpec
from mutune.training.run import RunResult, run_to_end

RESULT = "result.json"


@dataclass(frozen=True)
class LadderRun:
    """One training run of the ladder. `offset` is in octaves from the transferred learning rate."""

    width: int
    offset: float
    seed: int
    spec: RunSpec
    directory: Path
    device: str
    data_hash: str

    def __str__(self) -> str:
        return f"ladder run {self.directory.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its losses."""
        data = json.dumps([asdict(self.spec), self.data_hash], sort_keys=True)
        return hashlib.sha256(data.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Point:
    """A finished run of the ladder."""

    width: int
    offset: float
    seed: int
    learning_rate: float
    value: float
    diverged: bool


@dataclass(frozen=True)
class Rung:
    """One width of the ladder: a fitted valley per seed, in log2 of the base learning rate."""

    width: int
    valleys: dict[int, Valley]
    points: list[Point]


def ladder_runs(spec: RunSpec, ladder: LadderConfig, directory: Path, device: str, data_hash: str) -> list[LadderRun]:
    """Every run of the ladder, the base width included, the most expensive first."""
    base_width = spec.model.width
    runs = []
    for width in sorted({base_width, *ladder.widths}, reverse=True):
        model = spec.model if width == base_width else spec.model.at_width(width)
        for seed in range(ladder.seeds):
            for offset in sorted(ladder.offsets):
                rate = spec.hyperparameters.learning_rate * 2.0**offset
                hyper = replace(spec.hyperparameters, learning_rate=rate)
                run = replace(spec, model=model, hyperparameters=hyper, seed=spec.seed + seed)
                name = f"w{width}_lr{rate:.4g}_s{run.seed}"
                runs.append(LadderRun(width, offset, run.seed, run, directory / name, device, data_hash))
    return runs


def run_ladder(
    runs: list[LadderRun], workers: int | None, report: Callable[[int, int, list[str]], None]
) -> list[Point]:
    """Run what is not finished yet, in worker processes; a rerun continues.

    Args:
        report: called with (finished, total, names of the running) at every change and about once a second.
    """
    done = {run.directory: result for run in runs if (result := _finished(run)) is not None}
    open_runs = [run for run in runs if run.directory not in done]

    def tick(running: list[LadderRun]) -> None:
        report(len(done), len(runs), [run.directory.name for run in running])

    for run, result in run_all(train_rung, open_runs, workers or default_workers(), tick):
        write_json(run.directory / RESULT, {"fingerprint": run.fingerprint, **asdict(result)})
        done[run.directory] = result
    tick([])
    return [_point(run, done[run.directory]) for run in runs]


def train_rung(run: LadderRun) -> RunResult:
    """One run of the ladder; a worker's whole job."""
    note = {"rung": run.width, "offset": run.offset}
    return run_to_end(run.spec, run.directory, run.device, note)


def fit_rungs(points: list[Point]) -> list[Rung]:
    """The valleys of a ladder by width, narrowest first; optima in log2 of the base learning rate."""
    rungs = []
    for width in sorted({point.width for point in points}):
        mine = [point for point in points if point.width == width]
        valleys = {
            seed: fit_valley(
                *zip(*[(math.log2(p.learning_rate), p.value) for p in mine if p.seed == seed], strict=True)
            )
            for seed in sorted({point.seed for point in mine})
        }
        rungs.append(Rung(width, valleys, mine))
    return rungs


def optima(rungs: list[Rung]) -> dict[int, dict[int, float]]:
    """Seed → width → log2 of the best base learning rate, as `fit_drift` takes them."""
    return {seed: {rung.width: rung.valleys[seed].optimum for rung in rungs} for seed in rungs[0].valleys}


def _finished(run: LadderRun) -> RunResult | None:
    try:
        data = json.loads((run.directory / RESULT).read_text())
    except (OSError, ValueError):
        return None
    if data.pop("fingerprint", None) != run.fingerprint:
        return None
    return RunResult(**data)


def _point(run: LadderRun, result: RunResult) -> Point:
    rate = run.spec.hyperparameters.learning_rate
    return Point(run.width, run.offset, run.seed, rate, result.value, result.diverged)
