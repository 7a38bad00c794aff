"""A ladder climbed: runs planned in rounds, each from the finished runs alone, until the budget is spent.

So a ladder that was killed goes on as if it had not been.
"""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from mutune.certificate.budget import Timed
from mutune.certificate.design import Plan, measurable, next_runs
from mutune.certificate.ladder import LadderRun, gather, train_rung
from mutune.certificate.planned import Ladder, Paid
from mutune.certificate.points import AXES, COLUMNS
from mutune.certificate.rungs import place, rung_name
from mutune.errors import Refusal
from mutune.files import read_yaml, write_json, write_yaml
from mutune.folders import CONFIG
from mutune.search.once import RESULT, finished, run_open
from mutune.search.workers import Workers
from mutune.training.price import price
from mutune.training.result import RunResult

#: (finished, planned, names of the running)
Report: TypeAlias = Callable[[int, int, list[str]], None]
STUDY_FACTS = ("study", "trial", "params")  # of a trial's config.yaml


@dataclass(frozen=True)
class Climbed:
    """A ladder's outcome.

    Attributes:
        points: as `points.COLUMNS`, of the rungs with three finished rates.
        left_out: rungs that the budget had no room for, or of which too few runs finished, by name.
        early: whether it stopped with budget left, its verdict being clear.
        runs: the finished ones that did not diverge.
    """

    points: pd.DataFrame
    left_out: list[str]
    early: bool
    runs: list[LadderRun]


def climb(
    ladder: Ladder,
    spare: Path,
    report: Report,
    clear: Callable[[pd.DataFrame], bool] = lambda points: False,
    measured: Callable[[str], None] = lambda words: None,
) -> Climbed:
    """Run what is not finished yet, in worker processes, until the ladder is done; a rerun continues.

    Args:
        spare: where runs go that this ladder has no need of.
        report: called at every change and about once a second.
        clear: whether the points settle the verdict, so that no further rates and seeds are needed.
        measured: called after a round with a line for every rung that it added to.
    """
    made: dict[Path, tuple[LadderRun, RunResult]] = {}
    runs = ladder.reused()
    with Workers(train_rung, ladder.workers) as pool:
        while True:
            gather([*(run for run, _ in made.values()), *runs], ladder.directory, spare)
            if runs:
                if taken := _take_over(runs, ladder):
                    measured(f"runs of other transfers, copied: {taken}")
                made |= _round(runs, pool, partial(_ahead, report, len(made)))
            points = _points(made.values())
            for words in _measured(ladder, points, {run.rung for run in runs}):
                measured(words)
            plan = _next(ladder, made, points, clear)
            if not plan.runs:
                break
            runs = sorted(map(ladder.run, plan.runs), key=lambda run: -price(run.spec).flops)
    known = measurable(points)
    have = {tuple(row) for row in known[list(AXES)].itertuples(index=False)}
    lost = [spec for spec in ladder.rungs if tuple(place(spec).values()) not in have]
    names = [rung_name(spec, ladder.rungs[0]) for spec in lost]
    return Climbed(known, names, plan.early, [run for run, result in made.values() if not result.diverged])


def _measured(ladder: Ladder, points: pd.DataFrame, names: set[str]) -> Iterator[str]:
    """What is known of each rung that has one of these names."""
    for spec in ladder.rungs:
        if (name := rung_name(spec, ladder.rungs[0])) not in names:
            continue
        mine = points[(points[list(AXES)] == list(place(spec).values())).all(axis=1)]
        diverged = int(mine.diverged.sum())
        means = mine[~mine.diverged.astype(bool)].groupby("learning_rate").loss.mean()
        lowest = f"lowest mean loss {means.min():.4f} at {means.idxmin():.4g}" if len(means) else "no loss"
        yield f"rung {name}, {len(mine)} runs, {lowest}{f', {diverged} diverged' if diverged else ''}"


def _take_over(runs: list[LadderRun], ladder: Ladder) -> int:
    """Copy what the study and other ladders have of these runs; returns how many are of the latter."""
    taken = 0
    for run in runs:
        if finished(run) is not None:
            continue
        if (trial := ladder.paid.get(run.fingerprint)) is not None:
            _copy(run, trial)
        elif (twin := ladder.twin(run)) is not None:
            with suppress(OSError, Refusal):  # gone in between: then it is made
                _copy(run, twin)
                taken += 1
    return taken


def _round(
    runs: list[LadderRun], pool: Workers[LadderRun, RunResult], report: Report
) -> dict[Path, tuple[LadderRun, RunResult]]:
    """Finish these runs; by folder, since that is what tells runs apart."""
    results = run_open(runs, pool.run, report)
    return {run.directory: (run, result) for run, result in zip(runs, results, strict=True)}


def _ahead(report: Report, before: int, done: int, total: int, running: list[str]) -> None:
    """Progress of a round as that of the ladder."""
    report(before + done, before + total, running)


def _next(
    ladder: Ladder,
    made: Mapping[Path, tuple[LadderRun, RunResult]],
    points: pd.DataFrame,
    clear: Callable[[pd.DataFrame], bool],
) -> Plan:
    """The next round. A grid is made at once."""
    if ladder.config.offsets is not None:
        return Plan([], []) if made else ladder.first
    own = [Timed(r.spec, result.seconds) for r, result in made.values() if r.fingerprint not in ladder.paid]
    cost = ladder.budget.shares(ladder.rungs, own)
    return next_runs(points, ladder.design, cost, ladder.budget.left(own), clear)


def _points(made: Iterable[tuple[LadderRun, RunResult]]) -> pd.DataFrame:
    """Finished runs, in an order that does not depend on which finished first."""
    points = pd.DataFrame([_point(run, result) for run, result in made], columns=list(COLUMNS))
    return points.sort_values([*AXES, "seed", "learning_rate"], ignore_index=True)


def _copy(run: LadderRun, trial: Paid) -> None:
    """Copy the study's trial, or the run of another ladder, that this run is."""
    shutil.copytree(trial.directory, run.directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RESULT))
    facts = read_yaml(run.directory / CONFIG, "run's config")
    kept = {key: value for key, value in facts.items() if key not in (*STUDY_FACTS, *run.note)}
    write_yaml(run.directory / CONFIG, {**run.note, **kept})
    write_json(run.directory / RESULT, {"fingerprint": run.fingerprint, **asdict(trial.result)})


def _point(run: LadderRun, result: RunResult) -> dict[str, Any]:
    rate = run.spec.hyperparameters.learning_rate
    outcome = {"loss": math.nan if result.diverged else result.value, "diverged": result.diverged}
    return {**place(run.spec), "learning_rate": rate, "seed": run.spec.seed, **outcome}
