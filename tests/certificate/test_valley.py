"""Valleys and drift, against parabolas whose bottoms are written down."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.certificate.valley import expected_optimum, fit_drift, fit_valley


@given(
    bottom=st.floats(-7.9, -4.1),
    depth=st.floats(2.0, 6.0),
    curvature=st.floats(0.05, 2.0),
    grid=st.sampled_from([(-8, -7, -6, -5, -4), (-8, -7.5, -6, -5.2, -4), (-4, -8, -6)]),
)
@settings(max_examples=100, deadline=None)
def test_the_bottom_of_a_parabola_is_found(
    bottom: float, depth: float, curvature: float, grid: tuple[float, ...]
) -> None:
    valley = fit_valley(grid, [depth + curvature / 2 * (x - bottom) ** 2 for x in grid])
    if valley.edge is None:
        assert valley.optimum == pytest.approx(bottom, abs=1e-6)
        assert valley.loss == pytest.approx(depth, abs=1e-6)
        assert valley.curvature == pytest.approx(curvature, rel=1e-5)


def test_only_the_lowest_point_and_its_neighbours_count() -> None:
    near = fit_valley([-8, -7, -6, -5, -4], [9.0, 4.5, 4.0, 4.5, 5.0])
    far = fit_valley([-8, -7, -6, -5, -4], [5.0, 4.5, 4.0, 4.5, 99.0])
    assert near.optimum == far.optimum == -6.0


@pytest.mark.parametrize(("losses", "edge", "optimum"), [([1.0, 2.0, 3.0], "low", -8), ([3.0, 2.0, 1.0], "high", -6)])
def test_a_minimum_at_the_edge_is_only_a_bound(losses: list[float], edge: str, optimum: float) -> None:
    valley = fit_valley([-8, -7, -6], losses)
    assert (valley.edge, valley.optimum, valley.curvature) == (edge, optimum, 0.0)


@pytest.mark.parametrize("rates", [[-8, -7], [-8, -8, -7]])
def test_fewer_than_three_distinct_rates_are_no_valley(rates: list[float]) -> None:
    with pytest.raises(ValueError, match="at least three distinct rates"):
        fit_valley(rates, [1.0] * len(rates))


def test_drift_is_octaves_per_doubling_with_its_spread_over_seeds() -> None:
    drift = fit_drift({0: {32: -6.0, 64: -6.5, 128: -7.0}, 1: {32: -6.0, 64: -6.25, 128: -6.5}})
    assert drift.octaves_per_doubling == pytest.approx(-0.375)
    assert drift.spread == pytest.approx(math.sqrt(2) / 8)  # of -0.5 and -0.25
    assert drift.total == pytest.approx(-0.75)
    assert drift.range == pytest.approx(0.75)
    assert drift.residual == pytest.approx(0.0, abs=1e-12)


def test_one_seed_has_no_spread() -> None:
    assert math.isnan(fit_drift({0: {32: -6.0, 64: -6.5}}).spread)
    assert math.isnan(expected_optimum({0: {32: -6.0, 64: -6.5}}, 128)[1])


def test_the_residual_is_the_furthest_that_an_optimum_lies_from_the_line() -> None:
    bent = fit_drift({0: {32: -5.0, 64: -7.0, 128: -5.0}})
    assert bent.octaves_per_doubling == pytest.approx(0.0, abs=1e-12)
    assert bent.residual == pytest.approx(4 / 3)  # the line is at -17/3


def test_the_expected_optimum_is_where_the_lines_of_the_seeds_meet_the_width() -> None:
    optima = {0: {32: -6.0, 64: -6.5, 128: -7.0}, 1: {32: -5.0, 64: -5.0, 128: -5.0}}
    mean, spread = expected_optimum(optima, 256)
    assert mean == pytest.approx((-7.5 - 5.0) / 2)
    assert spread == pytest.approx(2.5 / math.sqrt(2))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_no_point_of_a_valley(loss: float) -> None:
    with pytest.raises(ValueError, match="finite losses"):
        fit_valley([-8, -7, -6], [3.0, loss, 2.0])
