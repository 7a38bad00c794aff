"""The ladder: the study's run at further widths, around the transferred learning rate."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd

from mutune.certificate.config import LadderConfig
from mutune.compose import build
from mutune.errors import require
from mutune.files import write_json
from mutune.search.workers import RunAll, default_workers, run_all
from mutune.training.config import MAX_SEED, RunSpec, total_tokens
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
        return fingerprint(asdict(self.spec), self.data_hash)


def ladder_runs(spec: RunSpec, ladder: LadderConfig, directory: Path, device: str, data_hash: str) -> list[LadderRun]:
    """Every run of the ladder, the base width included, the most expensive first.

    Raises:
        Refusal: no width besides the base's, one that the study's head size does not divide, or too many seeds.
    """
    base_width, head = spec.model.width, spec.model.size_per_head
    widths, key = sorted({base_width, *ladder.widths}, reverse=True), f"ladder.widths={ladder.widths}"
    works = f"for example ladder.widths=[{2 * base_width},{4 * base_width}]"
    require(len(widths) > 1, f"{key} holds only the study's own width; {works}.")
    for width in widths:
        require(width % head == 0, f"{key}: the study's head size of {head} does not divide {width}; {works}.")
    require(
        spec.seed + ladder.seeds - 1 <= MAX_SEED,
        f"seed={spec.seed} and ladder.seeds={ladder.seeds} go beyond the largest seed, {MAX_SEED}; for example seed=0.",
    )
    runs = []
    for width in widths:
        model = spec.model.at_width(width)
        for seed in range(ladder.seeds):
            for offset in sorted(ladder.offsets):
                rate = spec.hyperparameters.learning_rate * 2.0**offset
                hyper = replace(spec.hyperparameters, learning_rate=rate)
                run = replace(spec, model=model, hyperparameters=hyper, seed=spec.seed + seed)
                name = f"w{width}_lr{rate:.4g}_s{run.seed}"
                runs.append(LadderRun(width, offset, run.seed, run, directory / name, device, data_hash))
    return runs


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


def run_ladder(
    runs: list[LadderRun], workers: int | None, report: Callable[[int, int, list[str]], None]
) -> pd.DataFrame:
    """Run what is not finished yet, in worker processes; a rerun continues. Returns the points, as `points.COLUMNS`.

    Args:
        report: called with (finished, total, names of the running) at every change and about once a second.
    """
    results = run_open(runs, lambda some, tick: run_all(train_rung, some, workers or default_workers(), tick), report)
    return pd.DataFrame([_point(run, result) for run, result in zip(runs, results, strict=True)])


def run_open(
    runs: Sequence[AnyRun], run_some: RunAll[AnyRun, RunResult], report: Callable[[int, int, list[str]], None]
) -> list[RunResult]:
    """The results of `runs`, in their order; those of finished ones are read from their folders. As `run_ladder`.

    Args:
        run_some: runs those that are not, as `Workers.run` does.
    """
    done = {run.directory: result for run in runs if (result := _finished(run)) is not None}
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
    note = {"rung": run.width, "offset": run.offset}
    return run_to_end(run.spec, run.directory, run.device, note)


def _finished(run: OnLadder) -> RunResult | None:
    """The result of a run that is over; None where there is none, or one of something else, or a damaged one."""
    try:
        data = json.loads((run.directory / RESULT).read_text())
        if not isinstance(data, dict) or data.pop("fingerprint", None) != run.fingerprint:
            return None
        result = build(RunResult, data)
    except (OSError, ValueError):
        return None
    return result if result.diverged or math.isfinite(result.value) else None


def place(spec: RunSpec) -> dict[str, float]:
    """Where a run stands on every axis of a ladder."""
    batch = max(stage.tokens_per_step for stage in spec.stages)
    return {"width": spec.model.width, "depth": spec.model.depth, "tokens": total_tokens(spec.stages), "batch": batch}


def _point(run: LadderRun, result: RunResult) -> dict[str, Any]:
    rate = run.spec.hyperparameters.learning_rate
    outcome = {"loss": math.nan if result.diverged else result.value, "diverged": result.diverged}
    return {**place(run.spec), "learning_rate": rate, "seed": run.seed, **outcome}
