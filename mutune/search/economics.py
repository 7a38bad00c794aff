"""What a study's trials say of the search itself: how much each quantity matters, how sharply the loss rises around the
best, and what more trials could bring. All of it from finished trials; pruned ones never came to their final loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.search.config import Dimension
from mutune.search.proposals import distributions

NEAREST = 0.6  # share of the finished trials, the best of them, that the paraboloid is fitted to
SPARE = 4  # trials more than twice the quantities, and degrees of freedom of the noise at least
CURVATURE, CURVATURE_SD = 0.05, 0.1  # prior, nats per octave²: a paraboloid of few trials is drawn to it
SLOPE_SD = 0.2  # prior, nats per octave
NOISE, NOISE_WEIGHT = 0.02, 2.0  # prior of a trial's noise, nats, and how many trials it counts for
RISE = 0.02  # nats by which the loss has risen where `reach` ends
LEAST, MOST = 0.5, 4.0  # octaves, of `reach`
BOX = 1.0  # octaves around the best in which a better point is looked for
DRAWS, RESAMPLES = 2000, 40


@dataclass(frozen=True)
class Local:
    """The loss around the best trial: level + slope·x + curvature·x², x in octaves from it (of a linear range: in
    quarters of the range), without cross terms.

    Attributes:
        names: of the numeric quantities, in the order of the draws.
        slopes, curvatures: (DRAWS, names) of the posterior.
        trials: how many it was fitted to.
    """

    names: tuple[str, ...]
    slopes: np.ndarray
    curvatures: np.ndarray
    trials: int

    def curvature(self, name: str) -> tuple[float, float, float]:
        """5 %, 50 % and 95 % quantiles, nats per octave²."""
        low, middle, high = np.quantile(self.curvatures[:, self.names.index(name)], [0.05, 0.5, 0.95])
        return float(low), float(middle), float(high)

    def reach(self, name: str) -> float:
        """Octaves within which the loss surely rises by no more than `RISE`, and from `LEAST` to `MOST`."""
        low = self.curvature(name)[0]
        return float(np.clip(math.sqrt(RISE / low), LEAST, MOST)) if low > 0 else MOST

    @property
    def regret(self) -> float:
        """How far the best trial is expected above the lowest point within `BOX` of it, nats per token."""
        away = np.where(
            self.curvatures > 0,
            np.clip(-self.slopes / (2 * np.maximum(self.curvatures, 1e-9)), -BOX, BOX),
            -np.sign(self.slopes) * BOX,
        )
        gained = np.maximum(0.0, -(self.slopes * away + self.curvatures * away**2)).sum(axis=1)
        return float(gained.mean())


def local_model(space: Sequence[Dimension], trials: Sequence[FrozenTrial]) -> Local | None:
    """The paraboloid around the best of the finished trials; None with fewer of them than it has parameters."""
    numeric = [d for d in space if not d.values]
    done = sorted(
        (t for t in trials if t.state == TrialState.COMPLETE and not t.user_attrs["diverged"]),
        key=lambda t: t.value or 0.0,
    )
    least = 2 * len(numeric) + SPARE
    if not numeric or len(done) < least:
        return None
    used = done[: max(least, math.ceil(NEAREST * len(done)))]
    x = np.array([[_place(d, t) for d in numeric] for t in used])
    x -= x[0]
    y = np.array([t.value for t in used], float)
    size = len(numeric)
    design = np.hstack([np.ones((len(y), 1)), x, x**2])
    mean = np.concatenate([[y.min()], np.zeros(size), np.full(size, CURVATURE)])
    precision = np.concatenate([[1e-4], np.full(size, SLOPE_SD**-2), np.full(size, CURVATURE_SD**-2)])
    noise, freedom = float(y.std()) + NOISE, float(len(y))
    for _ in range(30):
        information = design.T @ design / noise**2 + np.diag(precision)
        covariance = np.linalg.inv(information)
        fitted = mean + covariance @ (design.T @ (y - design @ mean)) / noise**2
        held = float(np.diag(covariance) @ precision)  # parameters that the prior decides
        freedom = max(float(SPARE), len(y) - len(mean) + held)
        squares = float(np.sum((y - design @ fitted) ** 2)) + NOISE_WEIGHT * NOISE**2
        noise = math.sqrt(squares / (freedom + NOISE_WEIGHT))
    generator = np.random.default_rng(0)
    tails = np.sqrt(freedom / generator.chisquare(freedom, size=(DRAWS, 1)))
    draws = fitted + tails * (generator.normal(size=(DRAWS, len(mean))) @ np.linalg.cholesky(covariance).T)
    names = tuple(d.name for d in numeric)
    return Local(names, draws[:, 1 : 1 + size], draws[:, 1 + size :], len(used))


def _place(dimension: Dimension, trial: FrozenTrial) -> float:
    value = float(trial.params[dimension.name])
    if dimension.log:
        return math.log2(value)
    assert dimension.low is not None
    assert dimension.high is not None
    return 4 * value / (dimension.high - dimension.low)


def importance(
    space: Sequence[Dimension], trials: Sequence[FrozenTrial]
) -> Mapping[str, tuple[float, float, float]] | None:
    """Share of the loss's variation that is each quantity's (PED-ANOVA, arXiv:2304.10255) with a 90 % bootstrap
    interval: (5 %, whole study, 95 %); the largest first. None with fewer than ten finished trials.
    """
    done = [t for t in trials if t.state == TrialState.COMPLETE]
    if len(done) < 10 or len(space) < 2:
        return None
    generator = np.random.default_rng(0)
    whole = _importance(space, done)
    again = [
        _importance(space, [done[i] for i in generator.integers(0, len(done), len(done))]) for _ in range(RESAMPLES)
    ]
    return {
        name: (
            float(np.quantile([each.get(name, 0.0) for each in again], 0.05)),
            share,
            float(np.quantile([each.get(name, 0.0) for each in again], 0.95)),
        )
        for name, share in sorted(whole.items(), key=lambda item: -item[1])
    }


def _importance(space: Sequence[Dimension], trials: Sequence[FrozenTrial]) -> dict[str, float]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials(
        [
            create_trial(params=t.params, distributions=distributions(space), value=t.value, state=TrialState.COMPLETE)
            for t in trials
        ]
    )
    return dict(optuna.importance.get_param_importances(study))


def economics_lines(space: Sequence[Dimension], trials: Sequence[FrozenTrial]) -> list[str]:
    """What a study's trials say of the search, in words."""
    lines, local, shares = [], local_model(space, trials), importance(space, trials)
    if shares is not None:
        words = [f"{name} {share:.2f} ({low:.2f} to {high:.2f})" for name, (low, share, high) in shares.items()]
        lines.append(f"importance {', '.join(words)}: shares of the variation (PED-ANOVA), with 90 % intervals")
    if local is not None:
        words = [f"{n} {m:.3f} ({low:.3f} to {high:.3f})" for n in local.names for low, m, high in [local.curvature(n)]]
        lines.append(f"curvature  {', '.join(words)} nats per octave², around the best of {local.trials} trials")
        lines.append(f"regret     the best trial is expected {local.regret:.4f} nats above the lowest point near it")
    return lines
