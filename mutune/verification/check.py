"""A coordinate check from beginning to end: measure at every size and seed in worker processes, then judge.

Not called a test of transfer: a model that passes is parametrized as its table says; whether its optimum stays where it
is, a ladder measures.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mutune.errors import require, require_number
from mutune.files import csv_text
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.plan import Plan
from mutune.parametrization.rules import Table, get_table
from mutune.search.workers import run_all
from mutune.verification.coordinates import Subject, Training, measure
from mutune.verification.places import Coordinate, require_span
from mutune.verification.subjects import FamilySubject, Text, check_runs
from mutune.verification.verdict import DEPTH, WIDTH, Bound, Finding, Judgement, Slope, judge, slopes


@dataclass(frozen=True)
class Task:
    """One model to train for a few steps."""

    subject: Subject
    training: Training
    size: int
    seed: int

    def __str__(self) -> str:
        return f"size {self.size}, seed {self.seed}"


def measure_task(task: Task) -> list[Coordinate]:
    """A worker's whole job."""
    return measure(task.subject, task.size, task.seed, task.training)


def check(
    axis: str,
    subject: Subject,
    training: Training,
    sizes: Sequence[int],
    seeds: Sequence[int],
    workers: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Coordinate], Judgement]:
    """Measure and judge.

    Args:
        axis: `width` or `depth`: what `sizes` are.
        subject, training: what is built, and what it trains on; sent to worker processes.
        report: called with runs done and runs in all.

    Returns:
        Every coordinate, sorted, and the judgement.
    """
    tasks = [Task(subject, training, size, seed) for size in sorted(sizes, reverse=True) for seed in seeds]
    coordinates: list[Coordinate] = []
    for done, (_, found) in enumerate(run_all(measure_task, tasks, workers), start=1):
        coordinates += found
        report(done, len(tasks))
    coordinates.sort(key=lambda c: (c.size, c.seed))
    return coordinates, judge(axis, slopes(coordinates), plans_of(subject, sizes))


def coordinate_check(
    family: Family[Any],
    sizes: Sequence[int],
    *,
    shapes: Callable[[int], Any] | None = None,
    axis: str = WIDTH,
    table: str | Table = "mup",
    hyperparameters: BaseHyperparameters = BaseHyperparameters(learning_rate=2**-7, embedding_multiplier=12.5),
    training: Training | None = None,
    seeds: int = 3,
) -> Judgement:
    """The coordinate check of a user's own model, in this process: `print("\\n".join(as_words(judgement)))`.

    Args:
        family: the model at every shape.
        sizes: what is checked, three or more.
        shapes: size → the family's shape; None where its shapes are the sizes.
        axis: what they are, `width` or `depth`.
        table, hyperparameters: the theory, and its values at the family's base.
        training: steps and probe; by default 10 steps of 8×64 tokens of the default corpus.
        seeds: models per size.
    """
    require_span("sizes", sizes, [128, 256, 512])
    require_number("seeds", seeds, at_least=1, example=3, whole=True)
    require(axis in (WIDTH, DEPTH), f"axis={axis} is unknown; known: {WIDTH}, {DEPTH}.")
    theory = get_table(table) if isinstance(table, str) else table
    subject, text = FamilySubject(axis, family, shapes, theory, hyperparameters), training or Text()
    check_runs(subject, min(sizes), text.probe)
    runs = [measure(subject, size, seed, text) for size in sizes for seed in range(seeds)]
    return judge(axis, slopes(c for run in runs for c in run), plans_of(subject, sizes))


def plans_of(subject: Subject, sizes: Iterable[int]) -> dict[int, Plan]:
    """Size → plan."""
    return {size: subject.plan(size) for size in sizes}


def coordinates_csv(coordinates: Sequence[Coordinate]) -> str:
    """Every measured number, one row each."""
    return csv_text([asdict(c) for c in coordinates])


def slopes_csv(judgement: Judgement) -> str:
    """Every judged slope with its 95 % interval and its bound."""
    failed = {id(finding.slope) for finding in judgement.findings}
    return csv_text(
        [
            {
                **{k: v for k, v in asdict(slope).items() if k != "order"},
                "low": bound.low,
                "high": bound.high,
                "passed": id(slope) not in failed,
            }
            for slope, bound in judgement.judged
        ]
    )


def as_words(judgement: Judgement, most: int = 8) -> list[str]:
    """The judgement as lines of text: a table of what was judged, then what failed and why, the likely cause first."""
    lines = [f"{'quantity':<14} {'judged':>6}  {f'slope over log2 {judgement.axis}':<21} {'bounds':<23} failed"]
    for quantity in dict.fromkeys(slope.quantity for slope, _ in judgement.judged):
        rows = [(s, b) for s, b in judgement.judged if s.quantity == quantity]
        lines.append(_summary(quantity, rows, [f for f in judgement.findings if f.slope.quantity == quantity]))
    if not any(slope.quantity == "weight_update" for slope, _ in judgement.judged):
        lines.append("not judged     no update was seen: nothing moved at this rate; try learning_rate=0.0078125")
    causes = [finding for finding in judgement.findings if not finding.consequence] or judgement.findings
    for finding in causes[:most]:
        lines.append(f"{'likely cause':<14} {finding.diagnosis} {_interval(finding)}")
    if len(judgement.findings) > len(causes[:most]):
        lines.append(f"{'and':<14} {len(judgement.findings) - len(causes[:most])} more slopes out of bounds")
    return lines


def _summary(quantity: str, rows: list[tuple[Slope, Bound]], failed: list[Finding]) -> str:
    means = [slope.mean for slope, _ in rows]
    counts = Counter((bound.low, bound.high) for _, bound in rows)
    most = counts.most_common(1)[0][0]
    bounds = f"{most[0]:+.2f} … {most[1]:+.2f}" if math.isfinite(most[0]) else f"up to {most[1]:+.2f}"
    bounds = f"mostly {bounds}" if len(counts) > 1 else bounds  # logits may vanish at init, for example
    bounds = "by its ε" if quantity == "gradient" else bounds
    return f"{quantity:<14} {len(rows):>6}  {f'{min(means):+.2f} … {max(means):+.2f}':<21} {bounds:<23} {len(failed)}"


def _interval(finding: Finding) -> str:
    slope, bound = finding.slope, finding.bound
    spread = "" if math.isnan(slope.half_width) else f" ± {slope.half_width:.2f}"
    return f"[{slope.mean:+.2f}{spread}, bound {bound.low:+.2f} … {bound.high:+.2f}]"
