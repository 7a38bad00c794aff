"""The valleys of a ladder, loss over log2 learning rate, fitted together.

Every rung has its own optimum and every run of a seed its own level; the form is shared, up to a little freedom of
each rung's own:

    loss = level + A·z²·exp(½ρ·tanh(z/s)) / (1 + λ|z|),   z = log2 rate − optimum

A the curvature, ρ how much steeper the right side is, s how suddenly it becomes so (0: a kink at the optimum), λ how
soon the sides straighten. A grid an octave apart cannot tell a kink from a smooth bend, and the two put the optimum
a tenth of an octave apart; so the fit is made for several s, and weighted by their evidence.

Noise is Student's t, its scale taken from repeated seeds where there are any (else a prior keeps a form that goes
through all points from having none), growing with the rate as 2^(γz) where
the residuals say so; the form is trusted less, the higher a point lies. A diverged run is no point, but says that the
valley does not go on falling there.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import special
from scipy.optimize import brentq

from mutune.certificate.points import AXES, rung_index, rung_table

# What is believed before any run is seen. Calibrated in benchmarks/calibration.md.
SMOOTHNESS = {0.1: 0.2, 0.7: 0.1, 2.0: 0.1, 5.0: 0.1, 20.0: 0.5}  # s, octaves: prior weight; the last is an exponential
LOG_STEEPNESS = (float(np.log(1.5)), 0.7)  # ρ at 1.5 octaves from the optimum: mean, sd
LOG_STRAIGHTENING = (float(np.log(0.1)), 1.0)  # log λ: mean, sd
BEYOND = 2.0  # octaves past the tried rates that an optimum may well lie
OWN = 0.5  # sd of a rung's own log A and ρ around the shared ones
FREEDOM = 4.0  # of Student's t
TEMPER = 0.25  # power of the evidence for a smoothness: all are approximations
INFORMATION = 0.85  # of a residual, between Gaussian (1) and Student's t (0.71)
MISFIT, MISFIT_WEIGHT = 0.03, 6.0  # sd of the form's error as a share of the height; how many points that counts for
UNSEEN, UNSEEN_WEIGHT = 0.1, 1.0  # noise where hardly a rate was repeated, as a share of the heights; its weight
GROWTHS, GROWTH = (0.0, 0.15, 0.3, 0.45, 0.6, 0.8, 1.0), 0.4  # γ tried; its sd
REACH = 3.0  # octaves from the optimum up to which noise grows, and the form is believed
STEPS = 60


@dataclass(frozen=True)
class Fit:
    """The valleys for one smoothness.

    Attributes:
        smoothness: s.
        optima: (R,), log2 rate; covariance (R, R) without the factor of Student's t.
        freedom: degrees of freedom of the noise.
        noise: sd of a run at its optimum, nats per token.
        levels: (R,) loss at the optimum, mean over seeds; `level_errors` their standard errors.
        curvature, steepness: (R,) A and ρ. straightening: λ.
        evidence: log of the marginal likelihood, up to a constant.
    """

    smoothness: float
    optima: np.ndarray
    covariance: np.ndarray
    freedom: float
    noise: float
    levels: np.ndarray
    level_errors: np.ndarray
    curvature: np.ndarray
    steepness: np.ndarray
    straightening: float
    evidence: float

    def penalty(self, rung: int, offset: np.ndarray) -> np.ndarray:
        """Loss above the optimum's at `offset` octaves from it, nats per token.

        Past `REACH`, where hardly a run was made, a side bends no further.
        """
        near = np.clip(offset, -REACH, REACH)
        bend = np.exp(0.5 * self.steepness[rung] * np.tanh(near / self.smoothness))
        return np.asarray(self.curvature[rung] * offset**2 * bend / (1 + self.straightening * np.abs(offset)))

    def scaled(self, factor: float) -> "Fit":
        """With losses in another unit."""
        return replace(
            self,
            noise=factor * self.noise,
            levels=factor * self.levels,
            level_errors=factor * self.level_errors,
            curvature=factor * self.curvature,
        )


@dataclass(frozen=True)
class Valleys:
    """All valleys: `rungs` as `rung_table`, `edges` per rung, and a weighted fit per smoothness.

    Attributes:
        edges: `low` or `high` where the optimum lies at the first or last rate or beyond it, else None; `bounds` is
            that rate (log2), and the lowest for the others.
    """

    rungs: pd.DataFrame
    edges: tuple[str | None, ...]
    bounds: np.ndarray
    fits: tuple[Fit, ...]
    weights: np.ndarray

    @cached_property
    def grid(self) -> np.ndarray:
        """(R, axes) the rungs' values, in the order of `points.AXES`."""
        return self.rungs[list(AXES)].to_numpy(float)

    @property
    def optima(self) -> np.ndarray:
        """(R,) the optima's means, log2 rate."""
        return np.asarray(sum(w * fit.optima for w, fit in zip(self.weights, self.fits, strict=True)))

    @property
    def levels(self) -> np.ndarray:
        """(R,) losses at the optima, nats per token."""
        return np.asarray(sum(w * fit.levels for w, fit in zip(self.weights, self.fits, strict=True)))

    @property
    def level_errors(self) -> np.ndarray:
        """(R,) their standard errors, the spread between the fits included."""
        squares = [fit.level_errors**2 + (fit.levels - self.levels) ** 2 for fit in self.fits]
        return np.asarray(np.sqrt(sum(w * s for w, s in zip(self.weights, squares, strict=True))))

    def interval(self, rung: int, share: float = 0.9) -> tuple[float, float]:
        """Where the rung's optimum lies with probability `share`, from its own valley, log2 rate."""
        means = np.array([fit.optima[rung] for fit in self.fits])
        errors = np.array([fit.covariance[rung, rung] for fit in self.fits]) ** 0.5
        freedom = np.array([fit.freedom for fit in self.fits])
        tail = (1 - share) / 2
        return (
            mixture_quantile(self.weights, means, errors, freedom, tail),
            mixture_quantile(self.weights, means, errors, freedom, 1 - tail),
        )


def mixture_quantile(
    weights: np.ndarray, means: np.ndarray, errors: np.ndarray, freedom: np.ndarray, share: float
) -> float:
    """The quantile of a mixture of Student's t."""

    def above(value: float) -> float:
        return float(weights @ special.stdtr(freedom, (value - means) / errors)) - share

    low, high = float((means - 99 * errors).min()), float((means + 99 * errors).max())
    return float(brentq(above, low, high, xtol=1e-6))


def fit_valleys(points: pd.DataFrame) -> Valleys:
    """Fit every rung of `points` (columns of `points.COLUMNS`; diverged runs need no loss).

    Raises:
        ValueError: a rung without three finished rates, or a finished run without a finite loss.
    """
    rungs = rung_table(points)
    losses = points.loss[~points.diverged.to_numpy(bool)]
    scale = float(losses.max() - losses.min()) or 1.0  # no constant below is in nats
    data = _Data.of(points.assign(loss=points.loss / scale), rungs)
    fits = tuple(_Joint(data, smoothness).fit() for smoothness in SMOOTHNESS)
    fits = tuple(fit.scaled(scale) for fit in fits)
    scores = TEMPER * np.array([fit.evidence for fit in fits]) + np.log(list(SMOOTHNESS.values()))
    weights = np.exp(scores - scores.max())
    return Valleys(rungs, data.edges, data.bounds, fits, weights / weights.sum())


@dataclass(frozen=True)
class _Data:
    """The finished runs as arrays, sorted by level (a rung's seed), with what a first look at them says.

    Attributes:
        rate, loss, height: (n,); height is the loss above its rung's lowest, whatever the seed's level.
        rung, level: (n,) which. starts: where each level's runs begin. level_rung: each level's rung.
        start: (R,) first guess of the optima; curvature: first guess of A.
        middle, reach: (R,) of the tried rates, and how far they reach to either side of it, octaves.
        noise: sd of what rung, rate and seed do not explain, on `noise_freedom` degrees of freedom; 0 on none.
    """

    rate: np.ndarray
    loss: np.ndarray
    height: np.ndarray
    rung: np.ndarray
    level: np.ndarray
    starts: np.ndarray
    level_rung: np.ndarray
    edges: tuple[str | None, ...]
    bounds: np.ndarray
    start: np.ndarray
    middle: np.ndarray
    reach: np.ndarray
    curvature: float
    noise: float
    noise_freedom: int

    @staticmethod
    def of(points: pd.DataFrame, rungs: pd.DataFrame) -> "_Data":
        """Of points, as `points.COLUMNS`."""
        rung, diverged = rung_index(points, rungs), points.diverged.to_numpy(bool)
        rate = np.log2(points.learning_rate.to_numpy(float))
        looks = [_look(points[rung == i], rate[rung == i]) for i in range(len(rungs))]
        done = ~diverged
        labels = rung[done] * (points.seed.nunique() + 1) + pd.factorize(points.seed, sort=True)[0][done]
        order = np.argsort(labels, kind="stable")
        names, level = np.unique(labels[order], return_inverse=True)
        rate, rung, loss = rate[done][order], rung[done][order], points.loss.to_numpy(float)[done][order]
        starts = np.searchsorted(level, np.arange(len(names)))
        residuals, freedom = _repeats(rate, loss, rung, level)
        common = pd.Series(loss).groupby([rung, rate]).transform("median")  # of all seeds at that rate
        own = pd.Series(loss - common).groupby(level).transform("median").to_numpy()  # a seed's own level
        height = np.maximum(0.0, loss - own - np.array([look.lowest for look in looks])[rung])
        curvatures = [look.curvature for look in looks if look.curvature > 0]
        fallback = max(1e-6, float(height.max()) / 8)
        return _Data(
            rate=rate,
            loss=loss,
            height=height,
            rung=rung,
            level=level,
            starts=starts,
            level_rung=rung[starts],
            edges=tuple(look.edge for look in looks),
            bounds=np.array([look.bound for look in looks]),
            start=np.array([look.optimum for look in looks]),
            middle=np.array([(rate[rung == i].max() + rate[rung == i].min()) / 2 for i in range(len(rungs))]),
            reach=np.array([np.ptp(rate[rung == i]) / 2 for i in range(len(rungs))]),
            curvature=float(np.median(curvatures)) if curvatures else fallback,
            noise=_scale(residuals, freedom),
            noise_freedom=freedom if freedom >= 4 else 0,
        )


@dataclass(frozen=True)
class _Look:
    """A first look at a rung: the parabola through the lowest rate (median over seeds) and its neighbours."""

    optimum: float
    curvature: float
    lowest: float
    edge: str | None
    bound: float


def _look(points: pd.DataFrame, rates: np.ndarray) -> _Look:
    finished = ~points.diverged.to_numpy(bool)
    losses = points.loss.to_numpy(float)[finished]
    if not np.isfinite(losses).all():
        raise ValueError("a finished run has no finite loss")
    x, which = np.unique(rates[finished], return_inverse=True)
    if len(x) < 3:
        raise ValueError("a valley needs at least three finished rates")
    y = np.array([np.median(losses[which == i]) for i in range(len(x))])
    j = int(np.argmin(y))
    diverged_above = bool((rates[~finished] > x[-1]).any())
    edge = "low" if j == 0 else "high" if j == len(x) - 1 and not diverged_above else None
    if j in (0, len(x) - 1):
        return _Look(float(x[j]), 0.0, float(y[j]), edge, float(x[j]))
    left, right = (y[j] - y[j - 1]) / (x[j] - x[j - 1]), (y[j + 1] - y[j]) / (x[j + 1] - x[j])
    curvature = (right - left) / (x[j + 1] - x[j - 1])
    if curvature <= 0:
        return _Look(float(x[j]), 0.0, float(y[j]), edge, float(x[j]))
    slope = left + curvature * (x[j] - x[j - 1])
    optimum = float(np.clip(x[j] - slope / (2 * curvature), x[j - 1], x[j + 1]))
    return _Look(optimum, float(curvature), float(y[j]), edge, float(x[j]))


def _repeats(rate: np.ndarray, loss: np.ndarray, rung: np.ndarray, level: np.ndarray) -> tuple[np.ndarray, int]:
    """What rung × rate and seed do not explain, scaled to the noise, and its degrees of freedom."""
    found, freedom = [], 0
    for i in range(rung.max() + 1):
        mine = rung == i
        x, which_rate = np.unique(rate[mine], return_inverse=True)
        _, which_seed = np.unique(level[mine], return_inverse=True)
        columns = len(x) + which_seed.max()
        left = int(mine.sum()) - columns
        if left <= 0:
            continue
        design = np.zeros((mine.sum(), columns))
        design[np.arange(mine.sum()), which_rate] = 1
        later = which_seed > 0
        design[np.flatnonzero(later), len(x) + which_seed[later] - 1] = 1
        solution, _, rank, _ = np.linalg.lstsq(design, loss[mine])
        left = int(mine.sum()) - int(rank)
        if left > 0:
            found.append((loss[mine] - design @ solution) * np.sqrt(mine.sum() / left))
            freedom += left
    return (np.concatenate(found) if found else np.zeros(0)), freedom


def _scale(residuals: np.ndarray, freedom: int) -> float:
    if freedom < 4:
        return 0.0
    robust = 1.4826 * float(np.median(np.abs(residuals)))
    return max(1e-7, robust if freedom >= 12 else float(np.sqrt(np.mean(residuals**2))))


class _Joint:
    """The fit for one smoothness: Gauss-Newton on optima and form, levels profiled out, noise re-estimated."""

    def __init__(self, data: _Data, smoothness: float) -> None:
        self.data, self.s = data, smoothness
        self.R = len(data.start)
        self.shared = slice(self.R, self.R + 3)  # log A, ρ, log λ
        self.own_a, self.own_rho = slice(self.R + 3, 2 * self.R + 3), slice(2 * self.R + 3, 3 * self.R + 3)
        share = np.tanh(1.5 / smoothness)  # of ρ that is seen 1.5 octaves from the optimum
        size = 3 * self.R + 3
        self.prior, deviation = np.zeros(size), np.full(size, np.inf)
        self.prior[: self.R], deviation[: self.R] = data.middle, data.reach + BEYOND
        self.prior[self.R + 1], deviation[self.R + 1] = LOG_STEEPNESS[0] / share, LOG_STEEPNESS[1] / share
        self.prior[self.R + 2], deviation[self.R + 2] = LOG_STRAIGHTENING
        deviation[self.own_a], deviation[self.own_rho] = OWN, OWN / share
        self.precision = 1 / deviation**2
        self.theta = self.prior.copy()
        self.theta[: self.R], self.theta[self.R] = data.start, np.log(data.curvature)
        heights = data.height[data.height > 0]
        self.typical = float(np.median(heights)) if len(heights) else 1e-4
        self.noise = data.noise or 0.05 * self.typical
        self.growth, self.misfit, self.damping = 0.0, MISFIT, 1e-3
        self.held = 0.0  # parameters that their priors decide, each counted by the prior's share

    def fit(self) -> Fit:
        """Alternate between a step and the noise until both stand still."""
        for step in range(STEPS):
            moved, noise = self._step(), self.noise
            self._update_noise()
            if step > 5 and step % 3 == 0:
                self._update_growth()
            if step > 12 and moved < 1e-3 and abs(np.log(self.noise / noise)) < 0.005:
                break
        return self._result()

    def _curve(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """z and the height of the form at every run."""
        rung = self.data.rung
        z = self.data.rate - theta[: self.R][rung]
        log_a = theta[self.R] + theta[self.own_a][rung]
        rho = theta[self.R + 1] + theta[self.own_rho][rung]
        bend = np.exp(log_a + 0.5 * rho * np.tanh(z / self.s))
        return z, bend * z * z / (1 + np.exp(theta[self.R + 2]) * np.abs(z))

    def _jacobian(self, theta: np.ndarray, z: np.ndarray, g: np.ndarray) -> np.ndarray:
        """(n, parameters): how the form's height changes."""
        rung, rows = self.data.rung, np.arange(len(z))
        lam, tanh = np.exp(theta[self.R + 2]), np.tanh(z / self.s)
        rho = theta[self.R + 1] + theta[self.own_rho][rung]
        log_a = theta[self.R] + theta[self.own_a][rung]
        bend, straight = np.exp(log_a + 0.5 * rho * tanh), 1 + lam * np.abs(z)
        by_z = bend * z * (1 + straight) / straight**2 + g * 0.5 * rho * (1 - tanh**2) / self.s
        jacobian = np.zeros((len(z), len(theta)))
        jacobian[rows, rung] = -by_z
        jacobian[:, self.R], jacobian[rows, self.R + 3 + rung] = g, g
        jacobian[:, self.R + 1], jacobian[rows, 2 * self.R + 3 + rung] = 0.5 * tanh * g, 0.5 * tanh * g
        jacobian[:, self.R + 2] = -bend * np.abs(z) ** 3 / straight**2 * lam
        return jacobian

    def _means(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Each level's weighted mean of `values`."""
        w = weights.reshape(-1, *[1] * (values.ndim - 1))
        return np.asarray(np.add.reduceat(w * values, self.data.starts) / np.add.reduceat(w, self.data.starts))

    def _centred(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return values - self._means(values, weights)[self.data.level]

    def _variance(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of every run: all of it, and the noise's part."""
        noise = (self.noise * np.exp2(self.growth * np.clip(z, -REACH, REACH))) ** 2
        return noise + (self.misfit * self.data.height) ** 2 + 1e-14, noise

    def _weigh(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """z, height, residual, weight and variance of every run."""
        z, g = self._curve(theta)
        variance, _ = self._variance(z)
        weights = 1 / variance
        for _ in range(2):  # the level and the weights depend on each other
            residual = self._centred(self.data.loss - g, weights)
            weights = (FREEDOM + 1) / (FREEDOM + residual**2 / variance) / variance
        return z, g, residual, weights, variance

    def _step(self) -> float:
        """One damped step; returns how far the furthest optimum moved, octaves."""
        theta = self.theta
        z, g, residual, weights, _ = self._weigh(theta)
        jacobian = self._centred(self._jacobian(theta, z, g), weights)
        hessian = (jacobian * weights[:, None]).T @ jacobian + np.diag(self.precision)
        self.held = float(np.diag(np.linalg.inv(hessian + 1e-9 * np.eye(len(theta)))) @ self.precision)
        gradient = jacobian.T @ (weights * residual) - self.precision * (theta - self.prior)
        before = self._cost(theta, weights)
        for _ in range(8):
            damped = hessian + np.diag(self.damping * np.diag(hessian) + 1e-12)
            move = np.clip(np.linalg.solve(damped, gradient), -1, 1)
            if self._cost(theta + move, weights) <= before + 1e-12:
                self.theta, self.damping = theta + move, max(self.damping / 5, 1e-6)
                return float(np.abs(move[: self.R]).max())
            self.damping = min(10 * self.damping, 1e6)
        return 0.0

    def _cost(self, theta: np.ndarray, weights: np.ndarray) -> float:
        residual = self._centred(self.data.loss - self._curve(theta)[1], weights)
        return float(weights @ residual**2 + self.precision @ (theta - self.prior) ** 2)

    @property
    def _freedom(self) -> float:
        """Runs less levels and what the form takes: parameters count by how far the runs, not priors, decide them."""
        return max(0.5, len(self.data.loss) - len(self.data.starts) - len(self.theta) + self.held)

    def _update_noise(self) -> None:
        """Scale of the noise and of the form's error, by their shares of the weighted residuals."""
        z, _, residual, weights, variance = self._weigh(self.theta)
        _, noise = self._variance(z)
        share, squares = noise / variance, weights * variance * residual**2
        n, freedom = len(z), self._freedom
        fitted = float(np.sum(share * squares / (noise / self.noise**2)) / max(share.sum() * freedom / n, 1e-9))
        if repeats := self.data.noise_freedom:
            known, rest = self.data.noise**2, max(freedom - repeats, 0.5)
            fitted = (repeats * known + rest * min(fitted, 4 * known)) / (repeats + rest)
        else:
            fitted = (freedom * fitted + UNSEEN_WEIGHT * (UNSEEN * self.typical) ** 2) / (freedom + UNSEEN_WEIGHT)
        high = self.data.height > 3 * self.noise
        errors = (1 - share) * squares / np.maximum(self.data.height, 1e-12) ** 2
        self.noise = float(np.sqrt(np.clip(fitted, self.noise**2 / 4, 4 * self.noise**2)))
        counted = (1 - share)[high].sum() * freedom / n
        misfit = (MISFIT_WEIGHT * MISFIT**2 + errors[high].sum()) / (MISFIT_WEIGHT + counted)
        self.misfit = float(np.sqrt(np.clip(misfit, 0.01**2, 0.5**2)))

    def _update_growth(self) -> None:
        """γ of the largest posterior among those tried, half way to it."""
        z, _, residual, _, variance = self._weigh(self.theta)
        used = self._variance(z)[1] / variance > 0.3
        if used.sum() < 8:
            return
        r, reach = residual[used], np.clip(z[used], -REACH, REACH)
        scores = []
        for growth in GROWTHS:
            shape = np.exp2(2 * growth * reach)
            scale = float(np.mean(r**2 / shape)) + 1e-18
            fit = (FREEDOM + 1) * np.log1p(r**2 / shape / scale / FREEDOM) + np.log(shape * scale)
            scores.append(0.5 * float(fit.sum()) + 0.5 * (growth / GROWTH) ** 2)
        self.growth = 0.5 * (self.growth + GROWTHS[int(np.argmin(scores))])

    def _result(self) -> Fit:
        theta, R = self.theta, self.R
        z, g, residual, weights, variance = self._weigh(theta)
        raw, plain = self._jacobian(theta, z, g), INFORMATION / variance
        jacobian = self._centred(raw, plain)
        hessian = (jacobian * plain[:, None]).T @ jacobian + np.diag(self.precision)
        covariance = np.linalg.pinv(hessian, hermitian=True)
        proper = self.precision > 0
        evidence = -0.5 * float(np.sum((FREEDOM + 1) * np.log1p(residual**2 / variance / FREEDOM) + np.log(variance)))
        evidence -= 0.5 * float(self.precision @ (theta - self.prior) ** 2)
        evidence += 0.5 * float(np.log(self.precision[proper]).sum() - np.linalg.slogdet(hessian)[1])
        levels = self._means(self.data.loss - g, weights)
        slopes = self._means(raw, plain)
        exact = 1 / np.add.reduceat(plain, self.data.starts) + np.einsum("lp,pq,lq->l", slopes, covariance, slopes)
        mean, error = np.zeros(R), np.zeros(R)
        for i in range(R):
            mine = self.data.level_rung == i
            count = int(mine.sum())
            spread = float(np.var(levels[mine], ddof=1)) if count > 1 else self.noise**2
            mean[i], error[i] = levels[mine].mean(), np.sqrt(max(spread / count, float(exact[mine].mean()) / count))
        return Fit(
            smoothness=self.s,
            optima=theta[:R],
            covariance=covariance[:R, :R],
            freedom=max(2.0, self._freedom + (0.0 if self.data.noise_freedom else UNSEEN_WEIGHT)),
            noise=self.noise,
            levels=mean,
            level_errors=error,
            curvature=np.exp(theta[R] + theta[self.own_a]),
            steepness=theta[R + 1] + theta[self.own_rho],
            straightening=float(np.exp(theta[R + 2])),
            evidence=evidence,
        )
