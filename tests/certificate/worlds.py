"""Made-up worlds: the loss of any run on a ladder, of any rate and seed, where the truth is known."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from mutune.certificate.design import Design, Next, next_runs
from mutune.certificate.points import AXES, COLUMNS
from tests.certificate.families import Family, height

BASE = {"width": 32, "depth": 4, "tokens": 4096, "batch": 512}
LIMIT = 2.5  # octaves above the optimum from which runs diverge


@dataclass(frozen=True)
class World:
    """The truth behind a ladder.

    Attributes:
        family: its valleys and noise. number: which world of the family.
        slopes: octaves per doubling of an axis.
        studied: octaves from the base's optimum to the study's rate, at most.
    """

    family: Family
    number: int
    slopes: dict[str, float]
    studied: float = 0.75

    def optimum(self, place: Iterable[float]) -> float:
        """log2 of the best rate at a place: a value of every axis."""
        place = tuple(place)
        moved = sum(self.slopes.get(a, 0.0) * np.log2(v / BASE[a]) for a, v in zip(AXES, place, strict=True))
        return float(-7 + moved + self._random(*place).normal() * self.family.scatter)

    @property
    def log2_rate(self) -> float:
        """The study's best."""
        return self.optimum(BASE.values()) + float(self._random(1).uniform(-self.studied, self.studied))

    def run(self, place: Iterable[float], log2_rate: float, seed: int) -> tuple[float, bool]:
        """The loss of a run, and whether it diverged."""
        place = tuple(place)
        z, family = log2_rate - self.optimum(place), self.family
        if z > LIMIT:
            return 7.0, True
        curvature = np.exp(self._random(2, *place).normal() * family.own)
        spread = family.noise * np.exp2(family.growth * max(z, -2.0))
        level = self._random(3, *place, seed).normal() * family.noise
        noise = self._random(4, *place, seed, round(1e4 * (log2_rate + 99))).normal() * spread
        bottom = 2.5 + 1.5 * (place[0] / BASE["width"]) ** -0.3 * (place[2] / BASE["tokens"]) ** -0.2
        return float(bottom + curvature * height(family, np.array(z)) + level + noise), False

    def points(self, design: Design, runs: Iterable[Next]) -> pd.DataFrame:
        """The finished runs as a table."""
        rows = []
        for run in runs:
            place, rate = [int(v) for v in design.rungs.iloc[run.rung]], design.log2_rate + run.offset
            rows.append((*place, 2.0**rate, run.seed, *self.run(place, rate, run.seed)))
        return pd.DataFrame(rows, columns=COLUMNS)

    def _random(self, *labels: float) -> np.random.Generator:
        return np.random.default_rng([self.number, *(int(label) for label in labels)])


def star(slopes: dict[str, float], family: Family, number: int) -> tuple[World, Design, np.ndarray]:
    """A world with a ladder over widths 32 to 128 and tokens ½ to 4×, its target, and its runs' cost."""
    world = World(family, number, slopes)
    places = [dict(BASE)]
    places += [{**BASE, "width": width} for width in (64, 128)]
    places += [{**BASE, "tokens": tokens} for tokens in (2048, 8192, 16384)]
    rungs = pd.DataFrame(places)[list(AXES)]
    target = {**BASE, "width": 256, "tokens": 32768}
    cost = ((rungs.width / 32) ** 1.5 * rungs.tokens / 4096).to_numpy(float)
    return world, Design(rungs, 0, target, world.log2_rate), cost


def play(
    world: World,
    design: Design,
    cost: np.ndarray,
    budget: float,
    clear: Callable[[pd.DataFrame], bool] = lambda points: False,
) -> tuple[pd.DataFrame, float]:
    """The points of an adaptive ladder, and what it cost."""
    points, spent = world.points(design, []), 0.0
    while runs := next_runs(points, design, cost, budget - spent, clear).runs:
        points = pd.concat([points, world.points(design, runs)], ignore_index=True)
        spent += sum(cost[run.rung] for run in runs)
    return points, spent


def grid(design: Design, offsets: Iterable[float], seeds: int) -> list[Next]:
    """The fixed grid."""
    return [Next(r, offset, s) for r in range(len(design.rungs)) for offset in offsets for s in range(seeds)]


__all__ = ["BASE", "World", "grid", "play", "replace", "star"]
