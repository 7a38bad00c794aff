"""What a ladder may cost: a share of the target's FLOPs, or minutes on this machine. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from mutune.certificate.config import BudgetConfig
from mutune.training.config import RunSpec
from mutune.training.price import price

DEFAULT_TRIALS = 112  # what a ladder costs where nothing is said, in trials of the study
ROOM = 1.25  # of what listed rungs cost, for rates beyond an edge and further seeds
ASSUMED_SPEED = 1e10  # FLOPs per second of a worker, before any run is timed
BUSY = 0.85  # share of the time in which a worker trains: not while it starts, nor at the end of a round


@dataclass(frozen=True)
class Timed:
    """A finished run and its wall time."""

    spec: RunSpec
    seconds: float


@dataclass(frozen=True)
class Budget:
    """Of all runs of a ladder together.

    Attributes:
        flops: FLOPs; infinite where only time is limited.
        seconds: of workers, added up; infinite where only FLOPs are.
        trials: the study's, which tell how fast this machine is before the ladder's own runs do.
    """

    flops: float
    seconds: float
    trials: tuple[Timed, ...] = ()

    def shares(self, specs: Sequence[RunSpec], finished: Sequence[Timed]) -> np.ndarray:
        """What one run of each costs, as a share of the budget; the tighter limit counts."""
        speeds = _Speeds([*self.trials, *finished])
        flops = np.array([price(spec).flops for spec in specs], float)
        seconds = np.array([speeds.seconds(spec) for spec in specs])
        return np.asarray(np.maximum(flops / self.flops, seconds / self.seconds))

    def left(self, finished: Sequence[Timed]) -> float:
        """The share that is left after these runs."""
        flops = sum(price(run.spec).flops for run in finished)
        seconds = sum(run.seconds for run in finished)
        return 1.0 - max(flops / self.flops, seconds / self.seconds)

    def minutes(self, workers: int) -> float:
        """How long so many workers may take."""
        return self.seconds / 60 / workers / BUSY

    def seconds_of(self, specs: Sequence[RunSpec]) -> float:
        """How long a worker takes for these runs, as far as the study's trials tell."""
        speeds = _Speeds(self.trials)
        return sum(speeds.seconds(spec) for spec in specs)


def budget_of(
    limits: BudgetConfig, proxy: RunSpec, target: RunSpec, workers: int, trials: Sequence[Timed], listed: float
) -> Budget:
    """The budget that is asked for.

    Args:
        listed: FLOPs of the first runs of all listed rungs, for which there is room where no budget is given.
    """
    if limits.budget_fraction is None and limits.budget_minutes is None:
        flops = max(DEFAULT_TRIALS * price(proxy).flops, ROOM * listed)
    else:
        flops = math.inf if limits.budget_fraction is None else limits.budget_fraction * price(target).flops
    seconds = math.inf if limits.budget_minutes is None else 60 * limits.budget_minutes * workers * BUSY
    return Budget(flops, seconds, tuple(trials))


class _Speeds:
    """How long runs take, by those that were timed: FLOPs over the speed of the run that is most like them."""

    def __init__(self, timed: Sequence[Timed]) -> None:
        speeds: dict[float, list[float]] = {}
        for run in timed:
            speeds.setdefault(_size(run.spec), []).append(price(run.spec).flops / max(run.seconds, 1e-3))
        self.speeds = {size: median(found) for size, found in speeds.items()} or {1.0: ASSUMED_SPEED}

    def seconds(self, spec: RunSpec) -> float:
        nearest = min(self.speeds, key=lambda size: (abs(math.log(size / _size(spec))), size))
        return price(spec).flops / self.speeds[nearest]


def _size(spec: RunSpec) -> float:
    """FLOPs per step, on which the speed hangs."""
    return price(spec).flops / spec.num_steps
