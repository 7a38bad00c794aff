"""Loss over log2 learning rate: where each valley's bottom is, and how it moves with width."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, linear_regression, stdev

EDGES = ("low", "high")


@dataclass(frozen=True)
class Valley:
    """The fitted bottom of one valley.

    Attributes:
        optimum: log2 of the best learning rate. Where `edge` is set, only a bound.
        loss: fitted loss at the optimum, nats per token.
        curvature: second derivative of the loss, nats per octave²; 0 at an edge.
        edge: `low` or `high` where the lowest measured point is the first or last rate (the optimum lies at it or
            beyond it), else None.
    """

    optimum: float
    loss: float
    curvature: float
    edge: str | None = None


def fit_valley(log2_rates: Sequence[float], losses: Sequence[float]) -> Valley:
    """The parabola through the lowest point and its two neighbours.

    Args:
        log2_rates: distinct, in any order; at least three.
        losses: finite, nats per token; a diverged run counts with the value it was told as.

    Raises:
        ValueError: fewer than three rates, or repeated ones, or a loss that is not finite.
    """
    points = sorted(zip(log2_rates, losses, strict=True))
    if not all(math.isfinite(y) for _, y in points):
        raise ValueError(f"a valley needs finite losses, got {[y for _, y in points]}")
    if len(points) < 3 or len({x for x, _ in points}) < len(points):
        raise ValueError(f"a valley needs at least three distinct rates, got {[x for x, _ in points]}")
    lowest = min(range(len(points)), key=lambda i: points[i][1])
    if lowest in (0, len(points) - 1):
        return Valley(*points[lowest], 0.0, EDGES[0] if lowest == 0 else EDGES[1])
    return _parabola(points[lowest - 1], points[lowest], points[lowest + 1])


def _parabola(left: tuple[float, float], middle: tuple[float, float], right: tuple[float, float]) -> Valley:
    (x0, y0), (x1, y1), (x2, y2) = left, middle, right
    slope_left, slope_right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    half_curvature = (slope_right - slope_left) / (x2 - x0)
    if half_curvature == 0.0:  # a flat bottom: three equal losses
        return Valley(x1, y1, 0.0)
    slope = slope_left + half_curvature * (x1 - x0)  # at the middle point
    shift = -slope / (2 * half_curvature)
    return Valley(x1 + shift, y1 + slope * shift / 2, 2 * half_curvature)


@dataclass(frozen=True)
class Drift:
    """How the optimum moves over a ladder of widths, measured once per seed.

    Attributes:
        octaves_per_doubling: mean over seeds of the least-squares slope of the optimum on log2 width.
        spread: standard deviation of that slope over seeds; NaN with one seed.
        total: mean over seeds of the optimum at the widest minus the one at the narrowest rung, in octaves.
        range: largest minus smallest optimum over the rungs (means over seeds), in octaves.
        residual: the furthest that an optimum (mean over seeds) lies from the fitted line, in octaves.
        num_seeds: how many seeds were measured.
    """

    octaves_per_doubling: float
    spread: float
    total: float
    range: float
    residual: float
    num_seeds: int


def fit_drift(optima: dict[int, dict[int, float]]) -> Drift:
    """Drift from `optima[seed][width]`, log2 learning rates; every seed has the same widths, at least two."""
    widths = sorted(next(iter(optima.values())))
    slopes = [linear_regression(*_points(rates)).slope for rates in optima.values()]
    means = {w: fmean(rates[w] for rates in optima.values()) for w in widths}
    return Drift(
        octaves_per_doubling=fmean(slopes),
        spread=_spread(slopes),
        total=means[widths[-1]] - means[widths[0]],
        range=max(means.values()) - min(means.values()),
        residual=max(abs(mean - _line(means, width)) for width, mean in means.items()),
        num_seeds=len(slopes),
    )


def expected_optimum(optima: dict[int, dict[int, float]], width: float) -> tuple[float, float]:
    """Where each seed's fitted line is at `width`: the mean, and its standard deviation over seeds (NaN with one).

    Takes `optima` as `fit_drift` does; log2 learning rates.
    """
    ends = [_line(rates, width) for rates in optima.values()]
    return fmean(ends), _spread(ends)


def _line(rates: dict[int, float], width: float) -> float:
    """The least-squares line of the optimum on log2 width, at `width`."""
    fit = linear_regression(*_points(rates))
    return fit.intercept + fit.slope * math.log2(width)


def _points(rates: dict[int, float]) -> tuple[list[float], list[float]]:
    return [math.log2(width) for width in rates], list(rates.values())


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan
