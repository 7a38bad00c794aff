"""The runs that a ladder makes next, on made-up worlds whose truth is known."""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.assessment import assess
from mutune.certificate.design import BEYOND, FIRST, MAX_RATES, Design, Next, measurable, next_runs
from mutune.certificate.points import AXES
from mutune.certificate.valleys import fit_valleys
from mutune.certificate.verdict import Case, is_clear, verdict_of
from mutune.certificate.worth import Worth
from tests.certificate.design_table import GRID, interval
from tests.certificate.families import Family
from tests.certificate.worlds import BASE, World, grid, play, star
from tests.soak import record

SLOPES = {"width": 0.1, "tokens": -0.3}
FIRST_RUNS = sum(map(len, FIRST))


def rounds(world: World, design: Design, cost: np.ndarray, budget: float, most: int = 99) -> list[list[Next]]:
    """The runs of each round."""
    made: list[list[Next]] = []
    points = world.points(design, [])
    while len(made) < most:
        left = budget - sum(cost[run.rung] for runs in made for run in runs)
        if not (runs := next_runs(points, design, cost, left).runs):
            break
        made.append(runs)
        points = pd.concat([points, world.points(design, runs)], ignore_index=True)
    return made


def test_rungs_near_the_base_come_first_each_with_rates_on_both_sides_and_two_seeds() -> None:
    world, design, cost = star(SLOPES, Family(), 0)
    assert design.levels == [[0], [1, 3, 4], [2, 5]]
    first, second = rounds(world, design, cost, 1e9, most=2)
    assert {run.rung for run in first} == {0}
    assert {run.rung for run in second} == {1, 3, 4}
    for rung in (0, 1, 3, 4):
        mine = [run for run in first + second if run.rung == rung]
        assert len(mine) == FIRST_RUNS
        assert {run.seed for run in mine} == {0, 1}


def test_a_rung_s_rates_lie_around_where_smaller_rungs_expect_its_optimum() -> None:
    world, design, cost = star({"tokens": -1.0}, Family(noise=0.001, scatter=0.0), 1)
    runs = [run for some in rounds(world, design, cost, 1e9, most=4) for run in some if run.rung == 5]
    truth = world.optimum(design.rungs.iloc[5]) - design.log2_rate
    assert min(run.offset for run in runs) < truth < max(run.offset for run in runs)
    assert abs(np.median([run.offset for run in runs][:FIRST_RUNS]) - truth) < 1.0


@pytest.mark.parametrize(("shift", "side"), [(-4.0, -1), (3.0, 1)])
def test_an_optimum_at_the_edge_gets_a_rate_beyond_it_until_it_lies_inside(shift: float, side: int) -> None:
    world, design, cost = star({}, Family(noise=0.001), 2)
    off = Design(design.rungs, 0, design.target, design.log2_rate - shift)
    made = rounds(world, off, cost, 1e9, most=3)
    first, beyond = [run.offset for run in made[0]], [run.offset for run in made[1]]
    assert beyond == [(min(first) if side < 0 else max(first)) + side * BEYOND]
    points = world.points(off, [run for runs in rounds(world, off, cost, 200.0) for run in runs])
    assert fit_valleys(measurable(points)).edges[0] is None


def test_rates_that_diverge_are_replaced_by_lower_ones_and_not_for_ever() -> None:
    _, design, cost = star(SLOPES, Family(), 3)
    rate = design.log2_rate

    def points(runs: Iterable[Next], limit: float) -> pd.DataFrame:
        place = tuple(BASE[axis] for axis in AXES)
        rows = [(*place, 2.0 ** (rate + r.offset), r.seed, 3 + (r.offset + 3) ** 2, r.offset > limit) for r in runs]
        return pd.DataFrame(rows, columns=[*AXES, "learning_rate", "seed", "loss", "diverged"])

    made = next_runs(points([], 0), design, cost, 1e9).runs
    lower = next_runs(points(made, -1.5), design, cost, 1e9).runs
    assert [(run.rung, run.offset) for run in lower] == [(0, min(r.offset for r in made) - BEYOND)]
    while {run.rung for run in lower} == {0}:
        made += lower
        assert len({run.offset for run in made}) <= MAX_RATES
        lower = next_runs(points(made, -99.0), design, cost, 1e9).runs  # all diverge


def test_the_order_in_which_runs_finished_does_not_matter() -> None:
    world, design, cost = star(SLOPES, Family(), 4)
    made = [run for runs in rounds(world, design, cost, 80.0, most=4) for run in runs]
    points = world.points(design, made)
    for seed in range(3):
        assert next_runs(points.sample(frac=1, random_state=seed), design, cost, 40.0) == next_runs(
            points, design, cost, 40.0
        )


@pytest.mark.parametrize("budget", [12.0, 45.0, 90.0, 140.0])
def test_the_budget_is_never_exceeded_and_a_rung_is_begun_only_if_it_can_be_measured(budget: float) -> None:
    world, design, cost = star(SLOPES, Family(), 5)
    points, spent = play(world, design, cost, budget)
    assert 0.5 * budget < spent <= budget
    counts = points.groupby(list(AXES)).size()
    assert (counts >= FIRST_RUNS).all()
    left_out = next_runs(points, design, cost, budget - spent).left_out
    assert len(counts) + len(left_out) == len(design.rungs)


def test_a_clear_verdict_stops_a_ladder_but_not_before_every_rung_has_its_first_rates() -> None:
    world, design, cost = star(SLOPES, Family(), 6)
    made: list[Next] = []
    while runs := next_runs(world.points(design, made), design, cost, 1e9, clear=lambda points: True).runs:
        made += runs
    assert {run.rung for run in made} == set(range(len(design.rungs)))
    assert next_runs(world.points(design, made), design, cost, 1e9).runs  # it would have gone on


def test_points_of_the_study_stand_for_rates_that_are_near_them() -> None:
    world, design, cost = star(SLOPES, Family(), 7)
    planned = next_runs(world.points(design, []), design, cost, 1e9).runs
    paid = world.points(design, [Next(0, 0.0, 0), Next(0, -1.05, 0), Next(0, 0.4, 0)])
    rest = next_runs(paid, design, cost, 1e9).runs
    assert set(planned) - set(rest) == {Next(0, 0.0, 0), Next(0, -1.0, 0)}


def test_a_run_is_worth_more_where_it_tells_more() -> None:
    world, design, _ = star(SLOPES, Family(), 8)
    made = grid(design, (-1.0, 0.0, 1.0), 1)
    valleys = fit_valleys(world.points(design, made))
    worth = Worth(valleys, design.target, {})
    order = {tuple(row): i for i, row in enumerate(valleys.rungs.itertuples(index=False))}

    def variance(more: list[Next]) -> float:
        rungs = [order[tuple(design.rungs.iloc[run.rung])] for run in made + more]
        rates = [design.log2_rate + run.offset for run in made + more]
        return worth.variance(np.array(rungs), np.array(rates), np.array([run.seed for run in made + more]))

    now = variance([])
    assert variance([Next(5, 0.5, 0)]) < now
    assert variance([Next(2, x, 1) for x in (-1.0, 1.0)]) < variance([Next(2, x, 1) for x in (0.0, 0.1)])
    assert variance([Next(2, 0.0, 1)]) == pytest.approx(now)  # a seed at one rate has only its own level


def stopped(number: int) -> list[dict[str, Any]]:
    """A world's ladder with and without the early stop: its cost over the budget, its verdict, and the truth."""
    random = np.random.default_rng(number)
    slopes = {"width": float(random.normal() * 0.25), "tokens": float(random.normal() * 0.25)}
    world, design, cost = star(slopes, Family(), number)
    budget = sum(cost[run.rung] for run in grid(design, GRID, 2))
    truth = world.optimum(design.target[axis] for axis in AXES) - design.log2_rate

    def case(points: pd.DataFrame) -> Case:
        return Case([], assess(points, BASE, design.target, 2.0**design.log2_rate))

    found = []
    for rule in (lambda points: False, lambda points: is_clear(case(points))):
        points, spent = play(world, design, cost, budget, rule)
        verdict = verdict_of(case(points))
        found.append({"world": number, "cost": spent / budget, "verdict": verdict, "moved": abs(truth)})
    return found


@pytest.mark.soak
def test_soak_stopping_early_saves_runs_and_makes_no_more_false_verdicts() -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(stopped, range(200, 320)))
    rows = []
    for name, part in (("to the budget's end", 0), ("stopped when clear", 1)):
        frame = pd.DataFrame([pair[part] for pair in pairs])
        near, far = frame[frame.moved < 0.25], frame[frame.moved > 1]
        rows.append(
            {
                "ladder": name,
                "cost, mean": f"{frame.cost.mean():.2f}",
                "GO, NO-GO": f"{(frame.verdict == 'GO').sum()}, {(frame.verdict == 'NO-GO').sum()}",
                "far: GO": f"{(far.verdict == 'GO').sum()} of {len(far)}",
                "near: NO-GO": f"{(near.verdict == 'NO-GO').sum()} of {len(near)}",
            }
        )
    record("early_stop", "Stopping a ladder when its verdict is clear, on 120 made-up worlds", rows)
    kept, early = (pd.DataFrame([pair[part] for pair in pairs]) for part in (0, 1))
    assert early.cost.mean() < 0.95 * kept.cost.mean()
    for frame in (kept, early):
        assert (frame[frame.moved > 1].verdict == "GO").mean() <= 0.05


@pytest.mark.parametrize("family", [Family(ratio=4.0), Family(ratio=1.5)])
def test_where_the_optimum_leaves_the_grid_a_ladder_by_design_still_measures_it_at_the_same_cost(
    family: Family,
) -> None:
    """And where it does not, both are alike: benchmarks/design.md."""
    for slopes, narrower in (({"width": 0.6, "tokens": -0.9}, 0.6), ({"width": 0.1, "tokens": -0.2}, 1.4)):
        world, design, cost = star(slopes, family, 100)
        fixed = grid(design, GRID, 2)
        points, spent = play(world, design, cost, whole := sum(cost[run.rung] for run in fixed))
        assert spent <= whole
        width, _ = interval(points, world, design)
        assert width < narrower * interval(world.points(design, fixed), world, design)[0]
