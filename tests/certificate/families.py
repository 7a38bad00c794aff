"""Made-up ladders whose truth is known: families of valleys, noise and drift, and real curves resampled."""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pandas as pd
from scipy.interpolate import CubicSpline, make_smoothing_spline

BASE, FIRST = 32, 4096  # narrowest width; tokens and the like stay the same


@dataclass(frozen=True)
class Family:
    """How ladders are made.

    Attributes:
        rungs, rates, seeds: how many. Rungs are a doubling of the width apart, rates `spacing` octaves.
        beyond: doublings of the width from the widest rung to the target.
        noise: sd of a run, and of a seed's level, nats per token. growth: noise grows as 2^(growth·z).
        valley: `kink` (two parabolas, the right one `ratio` times steeper), `arms` (straight far away, slopes in that
            ratio) or `smooth` (the right side grows exponentially).
        curvature: of the left side at the optimum, nats per octave².
        own: sd of each rung's own log curvature. scatter: sd of each rung's optimum around the drift, octaves.
        drift: `linear`, `saturating` or `accelerating` with the doublings of the width.
        total: octaves from the base's optimum to the target's, scatter aside; a range is drawn from.
        outliers: share of runs that end far too high. censored: share of runs far to the right that diverge.
        shifted: whether every rung's grid is placed anew, not around the same point.
    """

    rungs: int = 4
    rates: int = 5
    seeds: int = 3
    spacing: float = 1.0
    beyond: float = 2.0
    noise: float = 0.005
    growth: float = 0.0
    valley: str = "kink"
    ratio: float = 2.0
    curvature: float = 0.05
    own: float = 0.15
    scatter: float = 0.05
    drift: str = "linear"
    total: float | tuple[float, float] = 0.0
    outliers: float = 0.0
    censored: float = 0.0
    shifted: bool = False


@dataclass(frozen=True)
class Ladder:
    """A made-up ladder, and its truth: the rungs' optima (log2 rate), the target's, and the target."""

    points: pd.DataFrame
    optima: np.ndarray
    target_optimum: float
    target: dict[str, float]

    @property
    def moved(self) -> float:
        """Octaves from the base's optimum to the target's."""
        return float(self.target_optimum - self.optima[0])


def height(family: Family, z: np.ndarray) -> np.ndarray:
    """The loss above the valley's bottom at z octaves from it."""
    a, ratio = family.curvature, family.ratio
    if family.valley == "kink":
        return np.asarray(a * z**2 * np.where(z > 0, ratio, 1.0))
    if family.valley == "arms":
        left, right = 0.8, 0.8 * ratio
        scale, whole = 2 * a / (left * right), left + right
        return np.asarray(scale * np.logaddexp(np.log(left / whole) + right * z, np.log(right / whole) - left * z))
    bend = 0.5 * np.log(ratio)
    return np.asarray(2 * a * (np.exp(bend * z) - bend * z - 1) / bend**2)


def drift(kind: str, share: np.ndarray) -> np.ndarray:
    """The share of the drift that is over at `share` of the doublings."""
    if kind == "saturating":
        return np.asarray((1 - np.exp(-2 * share)) / (1 - np.exp(-2.0)))
    return np.asarray(share**2 if kind == "accelerating" else share)


def make_ladder(family: Family, seed: int) -> Ladder:
    """One ladder of the family."""
    rng = np.random.default_rng(seed)
    total = family.total
    if isinstance(total, tuple):
        total = float(rng.uniform(*total) * rng.choice([-1, 1]))
    u, end = np.arange(family.rungs, dtype=float), family.rungs - 1 + family.beyond
    optima = -7 + total * drift(family.drift, u / end) + rng.normal(0, 1, family.rungs) * family.scatter
    target = -7 + total + rng.normal() * family.scatter
    curvatures = np.exp(rng.normal(0, 1, family.rungs) * family.own)
    offset, rows = rng.uniform(-0.5, 0.5), []
    for i in range(family.rungs):
        if family.shifted:
            offset = rng.uniform(-0.5, 0.5)
        centre = round(optima[i] / family.spacing) * family.spacing + offset * family.spacing
        rates = centre + family.spacing * (np.arange(family.rates) - (family.rates - 1) / 2)
        z = rates - optima[i]
        for s in range(family.seeds):
            spread = family.noise * np.exp2(family.growth * np.clip(z, -2, None))
            loss = 2.5 + 1.5 * 2.0 ** (-0.3 * i) + curvatures[i] * height(family, z)
            loss = loss + rng.normal() * family.noise + rng.normal(size=len(z)) * spread
            loss = loss + (rng.random(len(z)) < family.outliers) * np.abs(rng.normal(size=len(z))) * 20 * family.noise
            diverged = (z > 1.6) & (rng.random(len(z)) < family.censored)
            rows += [(BASE * 2**i, 2.0**x, s, y, d) for x, y, d in zip(rates, loss, diverged, strict=True)]
    points = pd.DataFrame(rows, columns=["width", "learning_rate", "seed", "loss", "diverged"])
    points = points.assign(depth=4, tokens=FIRST, batch=512)
    place = {"width": BASE * 2.0**end, "depth": 4.0, "tokens": float(FIRST), "batch": 512.0}
    return Ladder(points, optima, float(target), place)


CURVES = {  # valleys of every shape, straight, saturating and accelerating drift
    f"{valley} {ratio:g}, {kind}": Family(valley=valley, ratio=ratio, drift=kind, total=(0.0, 1.5))
    for valley, ratio in (("kink", 1.0), ("kink", 1.5), ("kink", 4.0), ("arms", 2.0), ("smooth", 2.0), ("smooth", 4.0))
    for kind in ("linear", "saturating", "accelerating")
}
PLAIN = Family(total=(0.0, 1.0))
CONDITIONS = {
    "noise 0.001": replace(PLAIN, noise=0.001),
    "noise 0.01": replace(PLAIN, noise=0.01),
    "noise 0.02": replace(PLAIN, noise=0.02),
    "noise doubling every two octaves": replace(PLAIN, growth=0.5),
    "one run in twenty an outlier": replace(PLAIN, outliers=0.05),
    "diverging on the right": replace(PLAIN, censored=0.7, ratio=4.0),
    "grids placed anew": replace(PLAIN, shifted=True),
    "no scatter": replace(PLAIN, scatter=0.0),
    "scatter 0.15": replace(PLAIN, scatter=0.15),
    "one seed": replace(PLAIN, seeds=1),
    "two seeds": replace(PLAIN, seeds=2),
    "three rungs": replace(PLAIN, rungs=3, beyond=1.0),
    "five rungs": replace(PLAIN, rungs=5),
    "seven rates": replace(PLAIN, rates=7),
    "rates half an octave apart": replace(PLAIN, rates=7, spacing=0.5),
}


def redraw(points: pd.DataFrame, hidden: float, hidden_optimum: float, seed: int, first_runs: bool = False) -> Ladder:
    """A ladder drawn from finely stored runs (`store_curves`): of each width five rates an octave apart, three seeds.

    Or, as the `first_runs` of a ladder by design, four rates and a second seed at one of them.

    Nothing is added to the losses. Which of the two grids, and which seeds, is drawn for every width anew. A width's
    true optimum is that of the smoothing spline through the means of all its runs.
    """
    rng = np.random.default_rng(seed)
    rows, optima = [], []
    widths = sorted(points.width.unique().tolist())
    for width in widths:
        runs = points[points.width == width].assign(x=lambda f: np.log2(f.learning_rate).round(6))
        means = runs.groupby("x").loss.mean()
        optima.append(_smooth_bottom(tuple(means.index), tuple(means)))
        x, lowest = means.index.to_numpy(float), int(means.to_numpy().argmin())
        centre = int(np.clip(lowest + rng.integers(0, 2), 4, len(x) - 5))
        chosen = rng.choice(runs.seed.unique(), 3, replace=False)
        mine = runs[runs.x.isin(x[centre - 4 : centre + 5 : 2]) & runs.seed.isin(chosen)]
        if first_runs:
            lower, again = mine.x <= x[centre + 2], (mine.seed == chosen[1]) & (mine.x == x[centre])
            mine = mine[lower & (mine.seed == chosen[0]) | again]
        rows.append(mine[["width", "learning_rate", "seed", "loss"]])
    made = pd.concat(rows, ignore_index=True).assign(diverged=False, depth=4.0, tokens=FIRST, batch=512.0)
    place = {"width": float(hidden), "depth": 4.0, "tokens": float(FIRST), "batch": 512.0}
    return Ladder(made, np.array(optima), hidden_optimum, place)


@cache
def _smooth_bottom(x: tuple[float, ...], y: tuple[float, ...]) -> float:
    fine = np.linspace(x[0], x[-1], 2001)
    return float(fine[np.argmin(make_smoothing_spline(x, y)(fine))])


def resample(points: pd.DataFrame, hidden: float, seed: int, noise: float = 0.005) -> Ladder:
    """A ladder drawn from real curves: each width's losses as a spline, five rates on a grid placed anew, three seeds.

    Args:
        points: one run per width and rate, as `points.COLUMNS`.
        hidden: the width that is the target, and no rung.
    """
    rng = np.random.default_rng(seed)
    splines: dict[float, CubicSpline] = {}
    bottoms: dict[float, float] = {}
    for width in points.width.unique().tolist():
        runs = points[points.width == width].sort_values("learning_rate")
        x = np.log2(runs.learning_rate.to_numpy(float))
        spline = CubicSpline(x, runs.loss.to_numpy(float))
        fine = np.linspace(x[0], x[-1], 2001)
        splines[width], bottoms[width] = spline, float(fine[np.argmin(spline(fine))])
    rows, offset = [], rng.uniform(-0.5, 0.5)
    widths = sorted(width for width in splines if width != hidden)
    for width in widths:
        low, high = splines[width].x[[0, -1]]
        centre = np.clip(round(bottoms[width]) + offset, low + 2, high - 2)
        for s in range(3):
            losses = splines[width](centre + np.arange(-2, 3)) + rng.normal() * noise + rng.normal(size=5) * noise
            rows += [(width, 2.0 ** (centre + k), s, y, False) for k, y in zip(range(-2, 3), losses, strict=True)]
    made = pd.DataFrame(rows, columns=["width", "learning_rate", "seed", "loss", "diverged"])
    made = made.assign(depth=4.0, tokens=FIRST, batch=512.0)
    place = {"width": float(hidden), "depth": 4.0, "tokens": float(FIRST), "batch": 512.0}
    return Ladder(made, np.array([bottoms[width] for width in widths]), bottoms[hidden], place)
