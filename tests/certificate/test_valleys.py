"""Valleys fitted together, drift and regret, on ladders whose truth is known."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.assessment import assess
from mutune.certificate.config import PriceConfig
from mutune.certificate.drift import Slope, extrapolate
from mutune.certificate.points import AXES
from mutune.certificate.regret import loss_per_doubling, price_of
from mutune.certificate.valleys import REACH, fit_valleys
from tests.certificate.families import BASE, FIRST, Family, make_ladder

EXACT = Family(noise=1e-5, scatter=0.0, own=0.0, valley="kink", ratio=1.0)
ORIGIN = {"width": float(BASE), "depth": 4.0, "tokens": float(FIRST), "batch": 512.0}


@pytest.mark.parametrize("ratio", [1.0, 1.5, 4.0])
def test_the_optima_of_nearly_noiseless_valleys_are_found(ratio: float) -> None:
    ladder = make_ladder(replace(EXACT, ratio=ratio, rates=9, spacing=0.5, total=1.0), 3)
    valleys = fit_valleys(ladder.points)
    assert valleys.optima == pytest.approx(ladder.optima, abs=0.05)
    assert valleys.levels == pytest.approx([2.5 + 1.5 * 2.0 ** (-0.3 * i) for i in range(4)], abs=0.005)


def test_a_parabola_through_three_points_is_pulled_by_a_steep_side_and_the_joint_fit_less() -> None:
    ladder = make_ladder(replace(EXACT, ratio=4.0, shifted=True), 1)
    symmetric = []
    for width, points in ladder.points.groupby("width"):
        means = points.groupby("learning_rate").loss.mean()
        j = int(means.to_numpy().argmin())
        x, y = np.log2(means.index.to_numpy()), means.to_numpy()
        a, b, _ = np.polyfit(x[j - 1 : j + 2], y[j - 1 : j + 2], 2)
        symmetric.append(-b / (2 * a) - ladder.optima[int(np.log2(float(str(width)) / BASE))])
    joint = fit_valleys(ladder.points).optima - ladder.optima
    assert np.abs(joint).max() < 0.06
    assert np.abs(symmetric).max() > 0.15


def test_the_order_of_rows_and_the_names_of_seeds_do_not_matter() -> None:
    points = make_ladder(Family(), 5).points
    shuffled = points.sample(frac=1, random_state=0).assign(seed=lambda p: p.seed * 7 + 100)
    assert fit_valleys(shuffled).optima == pytest.approx(fit_valleys(points).optima, abs=1e-3)


def test_other_units_of_the_rate_move_the_optima_and_nothing_else() -> None:
    points = make_ladder(Family(), 5).points
    moved = fit_valleys(points.assign(learning_rate=points.learning_rate * 8))
    assert moved.optima - 3 == pytest.approx(fit_valleys(points).optima, abs=1e-3)


def test_a_seed_that_is_worse_everywhere_moves_no_optimum() -> None:
    points = make_ladder(Family(seeds=2), 5).points
    worse = points.assign(loss=points.loss + 0.5 * (points.seed == 1))
    assert fit_valleys(worse).optima == pytest.approx(fit_valleys(points).optima, abs=0.01)


def test_a_wild_run_hardly_moves_an_optimum() -> None:
    points = make_ladder(Family(), 5).points
    wild = points.copy()
    wild["loss"] += np.where(wild.index == 7, 1.0, 0.0)
    assert fit_valleys(wild).optima == pytest.approx(fit_valleys(points).optima, abs=0.05)


@pytest.mark.parametrize(("slope", "edge"), [(1.0, "low"), (-1.0, "high")])
def test_a_lowest_loss_at_the_first_or_last_rate_is_a_bound(slope: float, edge: str) -> None:
    points = make_ladder(Family(), 5).points
    widest = points.width == points.width.max()
    points["loss"] = points.loss.where(~widest, 3 + 0.1 * slope * np.log2(points.learning_rate))
    assert fit_valleys(points).edges == (None, None, None, edge)


def test_a_rate_that_diverges_above_the_lowest_one_closes_the_valley() -> None:
    points = make_ladder(Family(rates=3), 5).points
    highest = points.groupby("width").learning_rate.transform("max")
    top = points.learning_rate == highest
    points.loc[top, "loss"] = points.loss.min() - 0.01
    assert fit_valleys(points).edges == ("high",) * 4
    closed = pd.concat([points, points[top].assign(learning_rate=2 * highest[top], loss=np.nan, diverged=True)])
    assert fit_valleys(closed.reset_index(drop=True)).edges == (None,) * 4


def test_too_few_rates_are_an_error() -> None:
    points = make_ladder(Family(rates=3), 5).points
    with pytest.raises(ValueError, match="at least three"):
        fit_valleys(points[points.learning_rate != points.learning_rate.min()])


def test_the_same_ladder_gives_the_same_draws() -> None:
    ladder = make_ladder(Family(), 5)
    first, second = (extrapolate(fit_valleys(ladder.points), 0, ladder.target) for _ in range(2))
    assert first is not None
    assert second is not None
    assert (first.target == second.target).all()


def test_further_targets_are_less_sure_and_a_target_on_the_ladder_is_sure() -> None:
    ladder = make_ladder(Family(), 5)
    valleys, widths = fit_valleys(ladder.points), []
    for doublings in (3, 4, 5, 6):
        drift = extrapolate(valleys, 0, {**ladder.target, "width": BASE * 2.0**doublings})
        assert drift is not None
        low, _, high = drift.quantiles(drift.moved)
        widths.append(high - low)
    assert widths == sorted(widths)
    assert widths[0] < 0.4 < widths[-1]


def test_a_law_says_where_an_unmeasured_axis_leads_and_a_measured_one_corrects_it() -> None:
    ladder = make_ladder(Family(), 5)
    further = {**ladder.target, "width": float(BASE), "tokens": 4.0 * FIRST}
    law = {"tokens": Slope(-0.5, 0.05)}
    alone = extrapolate(fit_valleys(ladder.points), 0, further, law)
    assert alone is not None
    assert alone.quantiles(alone.moved)[1] == pytest.approx(-1, abs=0.1)
    base = ladder.points[ladder.points.width == BASE]
    steady = [base.assign(tokens=FIRST * 2**k) for k in (1, 2)]  # the optimum stays whatever the tokens
    both = pd.concat([ladder.points, *steady], ignore_index=True)
    corrected = extrapolate(fit_valleys(both), 0, further, {"tokens": Slope(-0.5, 0.3)})
    assert corrected is not None
    assert abs(corrected.quantiles(corrected.moved)[1]) < 0.15


def test_the_regret_is_the_valleys_height_and_errs_low_where_too_high_costs_more() -> None:
    ladder = make_ladder(replace(EXACT, rates=9, spacing=0.5, ratio=4.0, noise=0.002), 3)
    at_best = assess(ladder.points, ORIGIN, {**ORIGIN, "width": 64.0})
    off = assess(ladder.points, ORIGIN, {**ORIGIN, "width": 64.0}, 2.0 ** (at_best.log2_rate - 2))
    assert at_best.regret is not None
    assert off.regret is not None
    assert off.regret.transferred == pytest.approx(0.05 * 4, rel=0.15)
    assert at_best.regret.octave_up > 2 * at_best.regret.octave_down
    assert at_best.regret.offset < at_best.regret.transferred < 0.01
    assert at_best.regret.recommended <= at_best.regret.transferred


def test_an_unsure_optimum_costs_more_than_a_sure_one() -> None:
    ladder = make_ladder(Family(), 5)
    near, far = (assess(ladder.points, ORIGIN, {**ORIGIN, "width": w}).regret for w in (64.0, 2048.0))
    assert near is not None
    assert far is not None
    assert near.transferred < far.transferred


def test_tokens_flops_hours_and_money_follow_from_one_another() -> None:
    tokens = np.array([4.0, 1.0, 2.0])
    per_doubling, source = loss_per_doubling(3.0, tokens, np.array([2.7, 3.1, 2.9]), np.full(3, 0.01))
    assert (per_doubling, source) == (pytest.approx(0.2), "measured on the ladder's two longest runs")
    price = price_of(0.2, 1e9, per_doubling, 6e9, PriceConfig(flops_per_gpu_second=1e15, gpu_hour=3.0))
    assert price == {
        "tokens": pytest.approx(1e9),
        "flops": pytest.approx(6e18),
        "gpu_hours": pytest.approx(6e18 / 1e15 / 3600),
        "money": pytest.approx(6e18 / 1e15 / 3600 * 3),
    }
    general = pytest.approx(0.03 / np.log2(1.25))
    assert loss_per_doubling(3.0, np.array([1.0]), np.array([3.1]), np.array([0.01]))[0] == general
    assert loss_per_doubling(3.0, tokens, np.array([2.7, 3.1, 2.9]), np.full(3, 0.1))[0] == general  # within errors


def test_the_axes_are_those_of_the_table() -> None:
    assert tuple(ORIGIN) == AXES


def test_past_the_rates_that_are_tried_a_side_bends_no_further() -> None:
    """An exponential side would make the expected cost that of a few draws far away."""
    valleys = fit_valleys(make_ladder(Family(valley="smooth", ratio=4.0), 3).points)
    for fit in valleys.fits:
        for side in (-1.0, 1.0):
            near, far = fit.penalty(0, np.array([side * REACH, side * 4 * REACH]))
            assert near < far <= 16 * near
