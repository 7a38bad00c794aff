"""A ladder's points, assessed: valleys, drift to the target, and what the transferred rate costs there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mutune.certificate.config import PriceConfig
from mutune.certificate.dependence import chance_of_none
from mutune.certificate.drift import MAX_DOUBLINGS, Drift, Slope, extrapolate
from mutune.certificate.points import AXES, doublings
from mutune.certificate.regret import Regret, loss_per_doubling, price_of, regret
from mutune.certificate.valleys import Valleys, fit_valleys


@dataclass(frozen=True)
class Assessment:
    """What a ladder says of a target.

    Attributes:
        points: the finished runs, as `points.COLUMNS`.
        axes: those that are known; the others stand still.
        target: the value of every axis.
        base: the row of `valleys.rungs` that the transferred rate comes from.
        log2_rate: log2 of the transferred base learning rate.
        slopes: what laws say of the axes.
        valleys: fitted. drift, regret: None where too few optima were measured.
    """

    points: pd.DataFrame
    axes: tuple[str, ...]
    target: dict[str, float]
    base: int
    log2_rate: float
    slopes: Mapping[str, Slope] | None
    valleys: Valleys
    drift: Drift | None
    regret: Regret | None

    @property
    def distance(self) -> np.ndarray:
        """(draws,) octaves from the transferred rate to the target's optimum."""
        assert self.drift is not None
        return np.asarray(self.drift.target - self.log2_rate)

    @property
    def unmeasured(self) -> list[str]:
        """Axes in which the target differs from the base and no two rungs do: at most a law speaks of them."""
        rungs = self.valleys.rungs
        return [a for a in AXES if rungs[a].nunique() == 1 and self.target[a] != rungs[a].iloc[self.base]]

    def by_laws(self, axis: str) -> np.ndarray:
        """(draws,) the part of `distance` that lies on an unmeasured axis."""
        assert self.drift is not None
        away = math.log2(self.target[axis] / self.valleys.rungs[axis].iloc[self.base])
        return np.asarray(away * self.drift.slopes[:, AXES.index(axis)])

    def beyond(self, axis: str) -> float:
        """Doublings from the ladder's nearest value of `axis` to the target's; 0 inside its range."""
        values, value = self.valleys.grid[:, AXES.index(axis)], self.target[axis]
        return max(0.0, math.log2(value / values.max()), math.log2(values.min() / value))

    def within_reach(self) -> "Assessment":
        """As far towards the target as was measured: unmeasured axes stay, others go `reach` past the rungs."""
        reached = dict(self.target)
        for axis, values in zip(AXES, self.valleys.grid.T, strict=True):
            low, high = values.min() / 2 ** self.reach(axis), values.max() * 2 ** self.reach(axis)
            alone = values.min() == values.max()
            reached[axis] = float(values[self.base] if alone else min(max(self.target[axis], low), high))
        if reached == self.target:
            return self
        return replace(self, target=reached, drift=extrapolate(self.valleys, self.base, reached, self.slopes))

    def measured(self, axis: str) -> int:
        """How many values of `axis` have an optimum inside their rates, the other axes at the base's."""
        inside = np.array([edge is None for edge in self.valleys.edges])
        return int((self._alone(axis) & inside).sum())

    def nearest(self, axis: str) -> int:
        """The rung of `axis` nearest to the target, the other axes at the base's."""
        distance = np.abs(np.log2(self.valleys.grid[:, AXES.index(axis)] / self.target[axis]))
        return int(np.where(self._alone(axis), distance, np.inf).argmin())

    def nearest_values(self) -> dict[str, float]:
        """For each axis that the ladder measured, its value nearest to the target's."""
        rungs = self.valleys.rungs
        return {a: float(rungs[a].iloc[self.nearest(a)]) for a in AXES if self.measured(a) > 1}

    @cached_property
    def chance_of_none(self) -> float:
        """`dependence.chance_of_none` of the runs; 0 without any."""
        return chance_of_none(self.points) if len(self.points) else 0.0

    def reach(self, axis: str) -> float:
        """Doublings past the ladder up to which it says something: no more than it is long, nor than was calibrated.

        An axis that no two rungs differ in is left to laws.
        """
        values = self.valleys.grid[:, AXES.index(axis)]
        span = math.log2(values.max() / values.min())
        return min(MAX_DOUBLINGS, span) if span else MAX_DOUBLINGS

    @property
    def is_calibrated(self) -> bool:
        """Whether the target is as close to the ladder as what is said of it was calibrated."""
        return all(self.beyond(axis) <= self.reach(axis) + 1e-9 for axis in AXES)

    def price(self, flops_per_token: float | None, prices: PriceConfig) -> dict[str, Any]:
        """What wins the transferred rate's regret back, and where the exchange rate is from."""
        if self.regret is None or "tokens" not in self.axes:
            return {}
        rungs, levels, errors = self.valleys.rungs, self.valleys.levels, self.valleys.level_errors
        mine = self._alone("tokens")
        per_doubling, source = loss_per_doubling(
            float(levels[self.nearest("width")]), rungs["tokens"].to_numpy(float)[mine], levels[mine], errors[mine]
        )
        if per_doubling <= 0:  # a loss of 0 or below is no cross-entropy, of which a per cent could be taken
            return {}
        found = price_of(self.regret.transferred, self.target["tokens"], per_doubling, flops_per_token, prices)
        return {**found, "currency": prices.currency, "tokens_source": source}

    def _alone(self, axis: str) -> np.ndarray:
        others = np.delete(self.valleys.grid, AXES.index(axis), axis=1)
        return np.asarray((others == others[self.base]).all(axis=1))


def assess(
    points: pd.DataFrame,
    base: Mapping[str, float],
    target: Mapping[str, float],
    learning_rate: float | None = None,
    slopes: Mapping[str, Slope] | None = None,
    axes: tuple[str, ...] = AXES,
) -> Assessment:
    """Fit the ladder and carry its optimum to the target.

    Args:
        points: as `points.COLUMNS`; every rung has at least three finished rates.
        base, target: a value of every axis; the base is a rung.
        learning_rate: the transferred base rate; None takes the optimum at the base.
        slopes: what laws say of the axes.
        axes: those that are known; the others hold the same value everywhere.
    """
    valleys = fit_valleys(points)
    rungs = valleys.rungs
    row = int(np.flatnonzero((rungs[list(AXES)] == [base[axis] for axis in AXES]).all(axis=1))[0])
    log2_rate = math.log2(learning_rate) if learning_rate is not None else float(valleys.optima[row])
    drift = extrapolate(valleys, row, target, slopes)
    nearest = int(np.abs(doublings(rungs, dict(target))).sum(axis=1).argmin())
    cost = regret(valleys, drift, nearest, log2_rate) if drift else None
    return Assessment(points, axes, dict(target), row, log2_rate, slopes, valleys, drift, cost)
