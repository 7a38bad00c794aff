"""The table of benchmarks/design.md: `python -m tests.certificate.design_table`, twenty minutes on one core."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from mutune.certificate.assessment import assess
from mutune.certificate.design import Design
from tests.certificate.families import Family
from tests.certificate.worlds import BASE, World, grid, play, star

FAMILIES = {
    "kink, right side 1.5 times steeper": Family(ratio=1.5),
    "kink, 4 times": Family(ratio=4.0),
    "kink, 2 times, noise 0.015": Family(noise=0.015),
    "smooth, 3 times": Family(valley="smooth", ratio=3.0),
}
WORLDS = range(100, 110)  # the rule was chosen on worlds 0 to 5
GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)


def rows(name: str, number: int) -> Iterator[tuple[str, int, str, float, float, bool]]:
    """Family, world, kind of ladder, its cost over the grid's, width of the target's interval, whether it is inside."""
    random = np.random.default_rng(number)
    slopes = {"width": random.normal() * 0.25, "tokens": -0.3 + random.normal() * 0.15}
    world, design, cost = star(slopes, FAMILIES[name], number)
    whole = sum(cost[run.rung] for run in grid(design, GRID, 2))
    for seeds in (2, 1):
        points = world.points(design, grid(design, GRID, seeds))
        yield name, number, f"grid, {seeds} seeds", seeds / 2, *interval(points, world, design)
    for share in (1.0, 0.6):
        points, spent = play(world, design, cost, share * whole)
        yield name, number, f"by design, {share:g}", spent / whole, *interval(points, world, design)


def interval(points: pd.DataFrame, world: World, design: Design) -> tuple[float, bool]:
    """How wide the target's 90 % interval is, octaves, and whether the truth lies in it."""
    drift = assess(points, BASE, design.target, 2.0**design.log2_rate).drift
    assert drift is not None
    low, _, high = drift.quantiles(drift.target)
    return high - low, low <= world.optimum(design.target[axis] for axis in BASE) <= high


if __name__ == "__main__":
    found = [row for name in FAMILIES for number in WORLDS for row in rows(name, number)]
    table = pd.DataFrame(found, columns=["family", "world", "ladder", "cost", "width", "inside"])
    print(
        table.groupby("ladder")[["cost", "width", "inside"]]
        .mean()
        .assign(median=table.groupby("ladder").width.median())
    )
    print(table.pivot_table(index="family", columns="ladder", values="width"))
