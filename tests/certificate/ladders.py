"""Simulated ladders whose target is known: what the prediction's intervals are calibrated on."""

import math
from dataclasses import dataclass

import numpy as np

NOISES = (0.002, 0.01)  # nats, of one run
DISTANCES = (1, 2)  # doublings from the widest rung to the target
SEEDS = 2


@dataclass(frozen=True)
class Family:
    """Ladders of one kind: five to eight rungs over two to four doublings, all else drawn.

    Attributes:
        exponent: α; None draws it from 0.1-1, even in log α.
        floor: whether E is in 1-3.5 and a in 1-3; else E is 0 and a in 4-6.
        outlier: whether one rung (both seeds) lies ten times one run's noise too high.
        bend: factor of α beyond `bend_at`, a share of the ladder's length.
    """

    exponent: float | None = None
    floor: bool = True
    outlier: bool = False
    bend: float = 1.0
    bend_at: float = 0.5


FAMILIES = {
    "α = 0.1": Family(0.1),
    "α = 0.3": Family(0.3),
    "α = 0.6": Family(0.6),
    "α = 1": Family(1.0),
    "E = 0": Family(floor=False),
    "E = 0, α = 0.1": Family(0.1, floor=False),
    "outlier": Family(outlier=True),
    "α × 0.7 from the middle": Family(bend=0.7),
    "α × 1.4 from the middle": Family(bend=1.4),
    "α × 0.7 late": Family(bend=0.7, bend_at=0.8),
    "α × 0.7 past the last rung": Family(bend=0.7, bend_at=1.0),
}
CLEAN = ("α = 0.1", "α = 0.3", "α = 0.6", "α = 1")
UNSEEN = "α × 0.7 past the last rung"  # no ladder can know of it


@dataclass(frozen=True)
class Simulated:
    """A ladder as `predict` takes it, and one run of its target."""

    losses: dict[float, list[float]]
    size: float
    outcome: float


def simulate(family: Family, noise: float, distance: float, rng: np.random.Generator) -> Simulated:
    """One ladder of a family."""
    count, length = int(rng.integers(5, 9)), rng.uniform(2.0, 4.0)
    alpha = family.exponent or math.exp(rng.uniform(math.log(0.1), 0.0))
    floor, fall = (rng.uniform(1.0, 3.5), rng.uniform(1.0, 3.0)) if family.floor else (0.0, rng.uniform(4.0, 6.0))
    x = np.append(np.linspace(0.0, length, count), length + distance)
    bent = np.maximum(x - family.bend_at * length, 0.0)
    truth = floor + fall * 2.0 ** (-alpha * (x + (family.bend - 1.0) * bent))
    runs = truth[:-1, None] + noise * rng.standard_normal((count, SEEDS))
    if family.outlier:
        runs[rng.integers(count)] += 10 * noise
    sizes = 32 * 2.0**x
    losses = {float(size): [float(run) for run in row] for size, row in zip(sizes, runs, strict=False)}
    return Simulated(losses, float(sizes[-1]), float(truth[-1] + noise * rng.standard_normal()))
