"""Which runs a ladder makes next: few rates around the predicted optimum, then more where they tell most.

Rungs close to the base come first, so that what they say places the rates of the next ones. Each has four rates, and a
second seed at the middle one; where the lowest loss lies at an edge, there is a rate beyond it. What is left of the
budget goes, a few runs at a time, to the rates and seeds that narrow the target's optimum most for their cost.

The answer depends on the finished runs alone, in whatever order and however often interrupted they were made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd

from mutune.certificate.drift import Slope, extrapolate
from mutune.certificate.points import AXES, doublings, rung_index
from mutune.certificate.valleys import Valleys, fit_valleys
from mutune.certificate.worth import Worth

# In octaves. Chosen on made-up ladders: benchmarks/design.md.
FIRST = ((-2.0, -1.0, 0.0, 1.0), (0.0,))  # a rung's first rates by seed, around its predicted optimum
STEP = 1.0  # where the first rates are placed, counted from the study's: so that its own is among them
LATTICE = 0.5  # further rates are multiples of it
BEYOND = 1.0  # from the edge to the rate beyond it
SAME = 0.125  # rates closer than this are one
FURTHER = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)  # further rates, around a rung's fitted optimum
NEAR = (-2.25, 1.75)  # rates that a further seed is run at, around it

MIN_RATES, FIRST_SEEDS = 3, len(FIRST)
MAX_RATES = 7  # of a rung; an optimum at the edge then stays a bound
AT_ONCE = 8  # further runs chosen together, so that workers have something to do
LEAST_GAIN = 0.003  # share of the target's variance that further runs have to take away


class Next(NamedTuple):
    """A run to make. `rung` is a row of the design; `offset` is in octaves from the study's rate."""

    rung: int
    offset: float
    seed: int


@dataclass(frozen=True)
class Design:
    """What a ladder may consist of.

    Attributes:
        rungs: (R, AXES), the base among them.
        base: its row.
        target: a value of every axis.
        log2_rate: log2 of the study's best base learning rate.
        seed: the first one; further ones count up, to `max_seeds`.
        slopes: what laws say of the axes.
    """

    rungs: pd.DataFrame
    base: int
    target: Mapping[str, float]
    log2_rate: float
    seed: int = 0
    max_seeds: int = 8
    slopes: Mapping[str, Slope] = field(default_factory=dict)

    def place(self, rung: int) -> dict[str, float]:
        """A rung's value of every axis."""
        return {axis: float(self.rungs[axis].iloc[rung]) for axis in AXES}

    @property
    def levels(self) -> list[list[int]]:
        """Rows of the rungs by how many steps along the axes they are away from the base; the base first."""
        places = doublings(self.rungs, self.place(self.base)).round(6)
        steps = np.zeros(len(places), int)
        for side in (1, -1):
            for away in np.maximum(0, side * places).T:
                steps += np.searchsorted(np.unique(away), away)
        return [[int(rung) for rung in np.flatnonzero(steps == step)] for step in np.unique(steps)]


@dataclass(frozen=True)
class Plan:
    """What to do next.

    Attributes:
        runs: to make now; none when the ladder is done.
        left_out: rows of the rungs that the budget has no room for.
        early: whether there are none because the verdict is clear.
    """

    runs: list[Next]
    left_out: list[int]
    early: bool = False


def next_runs(
    points: pd.DataFrame,
    design: Design,
    cost: np.ndarray,
    left: float,
    clear: Callable[[pd.DataFrame], bool] = lambda points: False,
) -> Plan:
    """The runs to make now that `points` are finished.

    Args:
        points: as `points.COLUMNS`, of rungs of the design.
        cost: (R,) of one run. left: what all further runs together may cost.
        clear: whether these points, of rungs with three finished rates and the base among them, settle the verdict, so
            that no further rates and seeds are needed.
    """
    left_out: list[int] = []
    for number, level in enumerate(design.levels):
        runs: list[Next] = []
        for rung in level:
            wanted = _wanted(points, design, rung, design.levels[:number])
            price = cost[rung] * len(wanted)
            if price > left:
                left_out.append(rung)
                continue
            left -= price
            runs += wanted
        if runs:
            return Plan(runs, left_out)
    known = measurable(points)
    if known.empty:
        return Plan([], left_out)
    further = _further(known, design, cost, left)
    early = bool(further) and not _of(known, design, design.base).empty and clear(known)
    return Plan([] if early else further, left_out, early)


def grid_runs(design: Design, offsets: Sequence[Sequence[float]], cost: np.ndarray, left: float) -> Plan:
    """Every rung at each seed's rates, the cheapest rungs first, as far as the budget goes."""
    plan = Plan([], [])
    for rung in np.argsort(cost, kind="stable"):
        runs = [Next(int(rung), x, seed) for seed, rates in enumerate(offsets, design.seed) for x in rates]
        if cost[rung] * len(runs) > left:
            plan.left_out.append(int(rung))
            continue
        left -= cost[rung] * len(runs)
        plan.runs.extend(runs)
    return plan


def first_offsets(max_seeds: int) -> tuple[tuple[float, ...], ...]:
    """A rung's first rates by seed, around its predicted optimum, with at most so many seeds."""
    return FIRST[:max_seeds]


def measurable(points: pd.DataFrame) -> pd.DataFrame:
    """The points of rungs with at least three finished rates."""
    finished = points[~points.diverged.astype(bool)]
    rates = finished.groupby(list(AXES)).learning_rate.nunique()
    enough = rates[rates >= MIN_RATES].index
    return points[points.set_index(list(AXES)).index.isin(enough)].reset_index(drop=True)


def _wanted(points: pd.DataFrame, design: Design, rung: int, before: list[list[int]]) -> list[Next]:
    """What the rung still lacks of its first rates and of those beyond an edge."""
    mine = _of(points, design, rung)
    if rung == design.base or mine.empty:
        centre = 0.0 if rung == design.base else _predicted(points, design, rung, before)
        first = [[centre + offset for offset in offsets] for offsets in first_offsets(design.max_seeds)]
        if lacking := _lacking(mine, design, rung, first):
            return lacking
    beyond = _beyond(mine)
    return [] if beyond is None else _lacking(mine, design, rung, [[beyond]])


def _lacking(mine: pd.DataFrame, design: Design, rung: int, offsets: Sequence[Sequence[float]]) -> list[Next]:
    """The runs of each seed's rates that were not made."""
    return [
        Next(rung, offset, seed)
        for seed, rates in enumerate(offsets, design.seed)
        for offset in rates
        if not (np.abs(mine.offset[mine.seed == seed] - offset) < SAME).any()
    ]


def _beyond(mine: pd.DataFrame) -> float | None:
    """The rate beyond the edge at which the lowest loss lies, or below where too few runs have finished."""
    finished = mine[~mine.diverged]
    if len(np.unique(mine.offset)) >= MAX_RATES:
        return None
    medians = finished.groupby("offset").loss.median()
    if len(medians) < MIN_RATES:
        return float(mine.offset.min()) - BEYOND
    lowest = float(medians.index[int(medians.to_numpy().argmin())])
    if lowest == mine.offset.min():
        return lowest - BEYOND
    return lowest + BEYOND if lowest == mine.offset.max() else None


def _predicted(points: pd.DataFrame, design: Design, rung: int, before: list[list[int]]) -> float:
    """Where the rungs before expect the optimum of this one: whole steps from the study's rate."""
    known = measurable(
        points[np.isin(rung_index(points, design.rungs), [other for level in before for other in level])]
    )
    if known.empty:
        return 0.0
    valleys = fit_valleys(known)
    drift = extrapolate(valleys, _row(valleys, design), design.place(rung), design.slopes)
    expected = float(valleys.optima.mean()) if drift is None else float(drift.weights @ drift.target)
    return round((expected - design.log2_rate) / STEP) * STEP


def _further(points: pd.DataFrame, design: Design, cost: np.ndarray, left: float) -> list[Next]:
    """Further rates and seeds, each where it narrows the target most for its cost."""
    valleys = fit_valleys(points)
    worth = Worth(valleys, design.target, design.slopes)
    rows = rung_index(valleys.rungs, design.rungs)
    made = [
        Next(i, float(offset), int(seed))
        for i, mine in enumerate(_of(points, design, row) for row in rows)
        for offset, seed in zip(mine.offset, mine.seed, strict=True)
    ]
    runs: list[Next] = []
    while len(runs) < AT_ONCE:
        now, best, score = _variance(worth, made, design), [], 0.0
        for bundle in _bundles(made, valleys, design):
            price = cost[rows[bundle[0].rung]] * len(bundle)
            if price > left:
                continue
            gain = 1 - _variance(worth, made + bundle, design) / now
            if gain >= LEAST_GAIN and gain / price > score:
                best, score = bundle, gain / price
        if not best:
            break
        made += best
        runs += [run._replace(rung=int(rows[run.rung])) for run in best]
        left -= sum(cost[rows[run.rung]] for run in best)
    return runs


def _variance(worth: Worth, runs: list[Next], design: Design) -> float:
    rung, offset, seed = (np.array(column) for column in zip(*runs, strict=True))
    return worth.variance(rung.astype(int), offset + design.log2_rate, seed)


def _bundles(made: list[Next], valleys: Valleys, design: Design) -> list[list[Next]]:
    """What may be added to a rung: a rate, with its first seeds, or a seed, at its rates near the optimum."""
    bundles = []
    for i in range(len(valleys.rungs)):
        mine = [run for run in made if run.rung == i]
        offsets, seeds = sorted({run.offset for run in mine}), sorted({run.seed for run in mine})
        optimum = float(valleys.optima[i]) - design.log2_rate
        for step in FURTHER if len(offsets) < MAX_RATES else ():
            offset = round((optimum + step) / LATTICE) * LATTICE
            if min(abs(offset - other) for other in offsets) > SAME:
                bundles.append([Next(i, offset, seed) for seed in seeds[:FIRST_SEEDS]])
        if len(seeds) < design.max_seeds:
            near = [offset for offset in offsets if NEAR[0] <= offset - optimum <= NEAR[1]]
            bundles.append([Next(i, offset, seeds[-1] + 1) for offset in near[:MAX_RATES] or offsets[:MAX_RATES]])
    return bundles


def _of(points: pd.DataFrame, design: Design, rung: int) -> pd.DataFrame:
    """The points of a rung, with their `offset`."""
    mine = points[(points[list(AXES)] == design.rungs.iloc[rung]).all(axis=1)]
    offset = (np.log2(mine.learning_rate.astype(float)) - design.log2_rate).round(6)
    return mine.assign(offset=offset, diverged=mine.diverged.astype(bool))


def _row(valleys: Valleys, design: Design) -> int:
    """The base's row among the fitted valleys."""
    base = design.rungs.iloc[design.base]
    found = np.flatnonzero((valleys.rungs == base).all(axis=1))
    return int(found[0]) if len(found) else 0
