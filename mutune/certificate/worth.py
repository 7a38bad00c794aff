"""What further runs would be worth: how much surer of the target's optimum, before they are made.

The fitted valleys and the straight line of the drift, both linearised where they were found. What a run tells does
not depend on its loss then, and so the variance of the target's optimum with it is known beforehand.
"""

from collections.abc import Mapping

import numpy as np

from mutune.certificate.drift import SCATTER, Slope
from mutune.certificate.points import AXES, doublings
from mutune.certificate.valleys import LOG_STEEPNESS, LOG_STRAIGHTENING, MISFIT, OWN, Fit, Valleys

HALF = 1e-3  # of the differences that stand for derivatives
LIKELY = 0.1  # forms less likely than this do not count
FLAT = 1e-4  # precision of what nothing is known of


class Worth:
    """The variance of the target's optimum for any set of runs.

    Args:
        valleys: as fitted now. target: a value of every axis. slopes: what laws say of the axes.
    """

    def __init__(self, valleys: Valleys, target: Mapping[str, float], slopes: Mapping[str, Slope]) -> None:
        self.fits = [(w, fit) for w, fit in zip(valleys.weights, valleys.fits, strict=True) if w >= LIKELY]
        self.places = doublings(valleys.rungs, target)
        self.slopes = np.array([slopes.get(axis, Slope()).sd ** -2 for axis in AXES])

    def variance(self, rung: np.ndarray, rate: np.ndarray, seed: np.ndarray) -> float:
        """Octaves², with runs of these rungs (rows of the valleys), rates (log2) and seeds."""
        _, level = np.unique(np.stack([rung, seed]), axis=1, return_inverse=True)
        found = [w * self._at_target(self._optima(fit, rung, rate, level.ravel())) for w, fit in self.fits]
        return float(sum(found) / sum(w for w, _ in self.fits))

    def _at_target(self, optima: np.ndarray) -> float:
        """Of a straight line through optima of this covariance, each with its scatter."""
        lines = np.hstack([np.ones((len(optima), 1)), self.places])
        weight = np.linalg.inv(optima + SCATTER**2 * np.eye(len(optima)))
        return float(np.linalg.inv(lines.T @ weight @ lines + np.diag([FLAT, *self.slopes]))[0, 0])

    def _optima(self, fit: Fit, rung: np.ndarray, rate: np.ndarray, level: np.ndarray) -> np.ndarray:
        """(R, R) covariance of the optima, every level unknown."""
        count, z = len(fit.optima), rate - fit.optima[rung]
        jacobian = np.zeros((len(z), 3 * count + 1))
        for part, change in enumerate(np.eye(4) * HALF):
            slope = (_height(fit, rung, z, change) - _height(fit, rung, z, -change)) / (2 * HALF)
            jacobian[np.arange(len(z)), 3 * count if part == 3 else part * count + rung] = slope
        weight = 1 / (fit.noise**2 + (MISFIT * _height(fit, rung, z, np.zeros(4))) ** 2)
        sums = np.zeros((level.max() + 1, jacobian.shape[1]))
        np.add.at(sums, level, weight[:, None] * jacobian)
        information = jacobian.T @ (weight[:, None] * jacobian) - sums.T @ (sums / np.bincount(level, weight)[:, None])
        return np.asarray(np.linalg.inv(information + _prior(fit, count))[:count, :count])


def _height(fit: Fit, rung: np.ndarray, z: np.ndarray, change: np.ndarray) -> np.ndarray:
    """The form with a change of (optimum, log A, ρ, log λ)."""
    z = z - change[0]
    bend = np.exp(change[1] + 0.5 * (fit.steepness[rung] + change[2]) * np.tanh(z / fit.smoothness))
    return np.asarray(fit.curvature[rung] * z**2 * bend / (1 + np.exp(change[3]) * fit.straightening * np.abs(z)))


def _prior(fit: Fit, count: int) -> np.ndarray:
    """Precision of (optima, log A, ρ, log λ): shared forms, each rung's a little of its own."""
    share = np.tanh(1.5 / fit.smoothness)
    own = np.eye(count) - np.full((count, count), 1 / count)
    mean = np.full((count, count), 1 / count**2)
    precision = np.zeros((3 * count + 1, 3 * count + 1))
    a, rho = slice(count, 2 * count), slice(2 * count, 3 * count)
    precision[a, a] = own / OWN**2 + FLAT * mean
    precision[rho, rho] = own * (share / OWN) ** 2 + mean * (share / LOG_STEEPNESS[1]) ** 2
    precision[-1, -1] = LOG_STRAIGHTENING[1] ** -2
    return precision + 1e-9 * np.eye(len(precision))
