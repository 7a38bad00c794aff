"""How the optimum moves along the ladder's axes, and where that leaves it at the target.

The optimum's log2 rate is a straight line in the doublings of every axis, plus a bend where the axis has three values,
plus a scatter of each rung's own (arXiv:2203.03466 shows valleys that keep still; nothing says how they move). Each
part has a Gaussian prior, so that all that is asked for has a closed form, given the sizes of bend and scatter, which
are summed over a grid by their evidence. A bend is as likely as the slope is steep.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import special

from mutune.certificate.points import AXES
from mutune.certificate.valleys import Fit, Valleys

# What is believed before any run is seen, in octaves. Calibrated in benchmarks/calibration.md.
FLAT = 100.0  # variance of the level, octaves²: nothing is believed of it
SLOPE = 0.7  # sd of the slope per doubling of an axis without a law of its own
SCATTERS, SCATTER = np.array([0.0, 0.03, 0.06, 0.1, 0.15, 0.22, 0.32, 0.5, 0.8]), 0.07  # of a rung: tried; scale
BENDS = {0.0: 0.25, 0.5: 0.35, 1.5: 0.4}  # in units of the next: prior weight
BEND, BEND_OF_SLOPE = 0.02, 0.35  # per doubling²: of itself, and for each octave of slope
DRAWS = 4000
EDGE = 0.25  # octaves within which an optimum at the grid's edge is taken to lie beyond it
EFFECTIVE = 200.0  # draws at least that the bounds leave; where they contradict the rest, they are taken less sharply
MAX_DOUBLINGS = 2.0  # of an axis from the ladder to the target: as far as the intervals were calibrated
MIN_RUNGS = 1  # with an optimum inside their rates


@dataclass(frozen=True)
class Slope:
    """What is believed of an axis' slope before it is measured, octaves per doubling: a law, or nothing."""

    mean: float = 0.0
    sd: float = SLOPE


@dataclass(frozen=True)
class Drift:
    """Draws of the optima, weighted, all of them log2 rates.

    Attributes:
        base: the row of the rung that the rate comes from.
        optima: (draws, R) the rungs'. target: (draws,). slopes: (draws, axes), octaves per doubling.
        form: (draws,) which of the valleys' fits each comes from.
        weights: (draws,), which sum to 1.
    """

    base: int
    optima: np.ndarray
    target: np.ndarray
    slopes: np.ndarray
    form: np.ndarray
    weights: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """(draws,) octaves from the base's optimum to the target's."""
        return np.asarray(self.target - self.optima[:, self.base])

    def quantiles(self, values: np.ndarray, shares: tuple[float, ...] = (0.05, 0.5, 0.95)) -> list[float]:
        """Weighted quantiles of one value per draw."""
        order = np.argsort(values)
        return [float(v) for v in np.interp(shares, np.cumsum(self.weights[order]), values[order])]

    def chance(self, event: np.ndarray) -> float:
        """Probability of an event, one truth value per draw."""
        return float(self.weights[event].sum())


def extrapolate(
    valleys: Valleys, base: int, target: Mapping[str, float], slopes: Mapping[str, Slope] | None = None
) -> Drift | None:
    """Draws of the optimum at `target` (a value of every axis); None with fewer than `MIN_RUNGS` optima to go by.

    Args:
        base: row of the rung that rates are counted from.
        slopes: what a law says of an axis; a measured axis corrects it.
    """
    measured = np.array([edge is None for edge in valleys.edges])
    if measured.sum() < MIN_RUNGS:
        return None
    origin = valleys.grid[base]
    rungs = np.log2(valleys.grid / origin)
    end = np.log2(np.array([target[axis] for axis in AXES]) / origin)
    laws = [(slopes or {}).get(axis, Slope()) for axis in AXES]
    model = _Model(rungs, end, laws, measured)
    parts = [part for i, fit in enumerate(valleys.fits) for part in model.parts(fit, i, float(valleys.weights[i]))]
    return _draw(parts, model, valleys, base)


@dataclass(frozen=True)
class _Part:
    """The posterior for one form, scatter and bend: means and covariance of optima, target's optimum and slopes."""

    form: int
    freedom: float
    score: float
    mean: np.ndarray
    covariance: np.ndarray


class _Model:
    """The straight line with bends and scatter, as a linear map from independent Gaussians."""

    def __init__(self, rungs: np.ndarray, end: np.ndarray, laws: list[Slope], measured: np.ndarray) -> None:
        self.k = np.flatnonzero(measured)
        self.R, self.A = rungs.shape
        centre = rungs[self.k].mean(axis=0)
        self.u = np.vstack([rungs, end]) - centre  # (R + 1, A)
        self.law = np.array([law.mean for law in laws])
        self.slope_sd = np.array([law.sd for law in laws])
        self.bends = np.array([len(np.unique(rungs[self.k, a].round(6))) >= 3 for a in range(self.A)])

    def parts(self, fit: Fit, form: int, weight: float) -> list[_Part]:
        """The posterior of one form, of this weight, for every size of scatter and bend."""
        if weight < 1e-3:
            return []
        k, observed = self.k, fit.optima[self.k]
        noise = fit.covariance[np.ix_(k, k)]
        slope = self._slope(observed, np.diag(noise))
        scatters, bends = (grid.ravel() for grid in np.meshgrid(SCATTERS, list(BENDS), indexing="ij"))
        sizes = bends[:, None] * (BEND + BEND_OF_SLOPE * np.abs(slope)) * self.bends
        scores, means, covariances = self._posteriors(observed, noise, scatters, sizes)
        scores += np.log(np.outer(np.gradient(SCATTERS), list(BENDS.values())).ravel() * weight)
        scores -= 2 * np.log1p((scatters / SCATTER) ** 2 / 3)  # half of Student's t with 3 degrees of freedom
        return [
            _Part(form, fit.freedom, float(score), mean, covariance)
            for score, mean, covariance in zip(scores, means, covariances, strict=True)
        ]

    def _slope(self, observed: np.ndarray, variance: np.ndarray) -> np.ndarray:
        """A first guess of every axis' slope, drawn to its law."""
        u, w = self.u[self.k], 1 / (variance + 0.05**2)
        y = observed - np.average(observed, weights=w)
        precision = np.diag(1 / self.slope_sd**2)
        return np.asarray(
            np.linalg.solve((u * w[:, None]).T @ u + precision, u.T @ (w * y) + self.law / self.slope_sd**2)
        )

    def _posteriors(
        self, observed: np.ndarray, noise: np.ndarray, scatters: np.ndarray, bends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Log evidence (S,), mean (S, n) and covariance (S, n, n) of (optima, target, slopes).

        Args:
            scatters: (S,). bends: (S, axes).
        """
        R, A, k, u, S = self.R, self.A, self.k, self.u, len(scatters)
        design = np.hstack([np.ones((R + 1, 1)), u, u**2, np.eye(R + 1)])
        design = np.vstack([design, np.hstack([np.zeros((A, 1)), np.eye(A), np.zeros((A, A + R + 1))])])
        flat, scattered = np.full((S, 1), FLAT), np.repeat(scatters[:, None] ** 2, R + 1, axis=1)
        variance = np.hstack([flat, np.tile(self.slope_sd**2, (S, 1)), bends**2, scattered])
        level = float(np.mean(observed - u[k] @ self.law))
        prior = np.concatenate([level + u @ self.law, self.law])
        mixed = design * variance[:, None, :]
        spread = mixed @ design[k].T
        inner = spread[:, k] + noise
        gap = observed - prior[k]
        gain = np.swapaxes(np.linalg.solve(inner, np.swapaxes(spread, 1, 2)), 1, 2)
        fits = np.linalg.solve(inner, np.broadcast_to(gap[:, None], (S, len(k), 1)))[..., 0]
        scores = -0.5 * (fits @ gap + np.linalg.slogdet(inner)[1])
        return scores, prior + gain @ gap, mixed @ design.T - gain @ np.swapaxes(spread, 1, 2)


def _draw(parts: list[_Part], model: _Model, valleys: Valleys, base: int) -> Drift:
    """Draws from the mixture, then weighed by the optima that are only bounded."""
    scores = np.array([part.score for part in parts])
    shares = np.exp(scores - scores.max())
    counts = np.diff(np.round(np.cumsum(shares / shares.sum()) * DRAWS).astype(int), prepend=0)
    parts = [part for part, count in zip(parts, counts, strict=True) if count > 0]
    values, vectors = np.linalg.eigh(np.array([part.covariance for part in parts]))
    roots = np.sqrt(np.maximum(values, 0))[:, :, None] * np.swapaxes(vectors, 1, 2)
    generator, which = np.random.default_rng(0), np.repeat(np.arange(len(parts)), counts[counts > 0])
    normal = generator.normal(size=(DRAWS, model.R + 1 + model.A))
    freedom = np.array([part.freedom for part in parts])[which]
    tails = np.sqrt(freedom / generator.chisquare(freedom))
    moves = np.einsum("di,dij->dj", normal, roots[which])
    draws = np.array([part.mean for part in parts])[which] + tails[:, None] * moves
    form = np.array([part.form for part in parts])[which]
    R = model.R
    weights = _bounded(draws[:, :R], valleys)
    return Drift(base, draws[:, :R], draws[:, R], draws[:, R + 1 :], form, weights)


def _bounded(optima: np.ndarray, valleys: Valleys) -> np.ndarray:
    """(draws,) weights by the optima that lie at an edge of their rates or beyond it; they sum to 1."""
    edges = [i for i, edge in enumerate(valleys.edges) if edge is not None]
    sides = np.array([1.0 if valleys.edges[i] == "low" else -1.0 for i in edges])
    past = sides * (valleys.bounds[edges] - optima[:, edges])
    tolerance = EDGE
    while True:
        logs = special.log_ndtr(past / tolerance).sum(axis=1)
        weights = np.exp(logs - logs.max())
        weights /= weights.sum()
        if not 1 / np.sum(weights**2) < EFFECTIVE:
            return weights
        tolerance *= 2
