"""The ladders of one transfer, run and judged: of the study's own table, and of those that are compared with it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from mutune.certificate.assessment import Assessment, assess
from mutune.certificate.band import with_band
from mutune.certificate.climb import Climbed, climb
from mutune.certificate.comparison import compare
from mutune.certificate.config import Prediction
from mutune.certificate.differences import Difference, difference_table
from mutune.certificate.ladder import LadderRun
from mutune.certificate.laws import law_slopes
from mutune.certificate.planned import Ladder
from mutune.certificate.points import AXES
from mutune.certificate.prediction import predict_target
from mutune.certificate.rungs import place, rung_name
from mutune.certificate.verdict import Case, Verdict, is_clear, judge
from mutune.data.prepare import prepare
from mutune.progress import ProgressLine, clock
from mutune.scaling.horizon import HorizonConfig
from mutune.training.config import RunSpec


class UnmeasuredError(Exception):
    """Nothing can be said, since the rung that rates are counted from has fewer than three finished ones."""


@dataclass(frozen=True)
class Judged:
    """A transfer's verdict and what it rests on; a published one has no ladder and so no assessment.

    Attributes:
        notes: what a reader of the ladder has to know, sentences.
        compared: a row per table, where several were run, as `comparison.compare`.
    """

    verdict: Verdict
    differences: list[Difference]
    prediction: Prediction
    assessment: Assessment | None = None
    notes: list[str] = field(default_factory=list)
    compared: list[dict[str, Any]] = field(default_factory=list)


def under(table: str, proxy: RunSpec) -> RunSpec:
    """The proxy's run under another table, all else equal."""
    if table == proxy.parametrization.table:
        return proxy
    return replace(proxy, parametrization=replace(proxy.parametrization, table=table, depth_exponent=1.0))


def judge_ladders(
    ladders: Mapping[str, Ladder], target: RunSpec, horizon: HorizonConfig, spares: Mapping[str, Path]
) -> Judged:
    """Make the runs of every table's ladder, and say what follows for the first, which is the study's own.

    Args:
        ladders: by table; their first rungs differ in the table alone.
        spares: by table, where runs go that its ladder has no need of.

    Raises:
        search.workers.WorkError: a run failed.
        UnmeasuredError: the own ladder's base has too few finished runs.
    """
    own, cases, notes = next(iter(ladders)), dict[str, Case](), list[str]()
    runs: list[LadderRun] = []
    for table, ladder in ladders.items():
        ask, alone = _question(ladder.rungs[0], target, horizon), len(ladders) == 1
        name = "ladder" if alone else f"ladder {table}"
        climbed = _climb(ladder, spares[table], ask if alone else None, name)
        runs = climbed.runs if table == own else runs
        if climbed.early:
            count = len(climbed.points)
            notes.append(f"the ladder stopped early, after {count} runs: more could hardly change the verdict")
        if climbed.left_out:
            names = ", ".join(climbed.left_out)
            notes.append(f"left out of the {name}, for its budget or want of finished runs: {names}")
        if rung_name(ladder.rungs[0], ladder.rungs[0]) not in climbed.left_out:
            cases[table] = ask(climbed.points)
            continue
        few = f"fewer than three learning rates finished at the base of the {name}, around "
        few += f"{2.0**ladder.design.log2_rate:.4g}"
        if table == own:
            raise UnmeasuredError(
                f"{few}; take a lower hyperparameters.learning_rate, or leave it out to have the study's best, or "
                "raise the budget."
            )
        notes.append(f"{few}; it is not compared")
    case = cases[own]
    compared = compare({table: case.assessment for table, case in cases.items()}) if len(cases) > 1 else []
    prediction = with_band(predict_target(ladders[own].rungs[0], target, case.assessment), runs, target)
    return Judged(judge(case), case.differences, prediction, case.assessment, notes, compared)


def _question(proxy: RunSpec, target: RunSpec, horizon: HorizonConfig) -> Callable[[pd.DataFrame], Case]:
    """What a ladder's points are judged by."""
    vocab_size, table = prepare(proxy.data, proxy.tokenizer).vocab_size, proxy.parametrization.table

    def ask(points: pd.DataFrame) -> Case:
        laws = law_slopes(horizon, [axis for axis in AXES if points[axis].nunique() > 1])
        found = assess(points, place(proxy), place(target), proxy.hyperparameters.learning_rate, laws)
        differing = difference_table(proxy, target, vocab_size, target.tokenizer.num_ids, found.nearest_values())
        return Case(differing, found, table)

    return ask


def _climb(ladder: Ladder, spare: Path, ask: Callable[[pd.DataFrame], Case] | None, name: str) -> Climbed:
    """Make the ladder's runs, with a line of progress.

    Args:
        ask: by whose verdict it may stop early; None spends the budget.
    """
    line, seen = ProgressLine(), -1

    def clear(points: pd.DataFrame) -> bool:
        return ask is not None and is_clear(ask(points))

    def report(done: int, planned: int, running: list[str]) -> None:
        nonlocal seen
        now = f" · running {', '.join(running)}" if running else ""
        line.show(f"{name} {done}/{planned} runs{now} · {clock(line.elapsed)} elapsed", change=done != seen)
        seen = done

    try:
        return climb(ladder, spare, report, clear, lambda words: line.say(f"{name}: {words}"))
    finally:
        line.close()
