"""Real runs, stored: `python -m tests.certificate.store_curves FOLDER [SET ...]`, about two hours on two cores.

`fine`: rates half an octave apart and by four seeds, so that the optimum of every width is known better than to any
ladder that is drawn from them (`families.redraw`); `hidden`: the wide models that such ladders are asked to foretell;
`ladder`: five rungs, five rates, two seeds, and the hidden width; `broken`: ladders under broken rules; `long`: of one
that short runs do not show, and of none; `losses`: long runs at one rate, with the slopes of ALiBi and with even ones.
"""

import sys
from collections.abc import Callable

import pandas as pd

from tests.certificate.real import BROKEN, HIDDEN, LADDER, MUST_FAIL, OFFSETS, STORED, Work, trained

FINE = {  # table, width → the log2 rate around which its rates lie, ±2.5 octaves in halves, four seeds
    ("mup", 32): -5.5,
    ("mup", 64): -5.5,
    ("mup", 128): -5.5,
    ("sp", 32): -5.5,
    ("sp", 64): -6.0,
    ("sp", 128): -7.0,
}
FAR = {("mup", 256): -6.0, ("sp", 256): -8.0}  # ±2 octaves in wholes, two seeds
LONG = ("run.num_steps=480",)  # seeds differ by half of what they do at 160 steps
SLOPES = {"ALiBi's": 8, "even at any number of heads": 4}  # seeds


def around(centres: dict[tuple[str, int], float], octaves: list[float], seeds: int, folder: str) -> pd.DataFrame:
    """Valleys around these rates."""
    return trained(
        Work(table, width, centre + x + 6, seed, folder)
        for (table, width), centre in centres.items()
        for x in octaves
        for seed in range(seeds)
    )


def broken(folder: str) -> pd.DataFrame:
    """Those that must fail on the ladder that power is asked of (4 rungs, 3 seeds), the others on 3 rungs, 2 seeds."""
    shapes = {rule: ((32, 64, 96, 128), 3) if rule in MUST_FAIL else ((32, 64, 128), 2) for rule in BROKEN}
    return trained(
        Work(rule, width, offset, seed, folder)
        for rule, (widths, seeds) in shapes.items()
        for width in widths
        for offset in OFFSETS
        for seed in range(seeds)
    )


def long(folder: str) -> pd.DataFrame:
    """Three times as long, at four rates and by two seeds."""
    return trained(
        Work(rule, width, offset, seed, folder, LONG)
        for rule in ("mup", MUST_FAIL[2])
        for width in (32, 64, 128)
        for offset in (-1, 0, 1, 2)
        for seed in range(2)
    )


def losses(folder: str) -> pd.DataFrame:
    """At the rate 2^-6, by as many seeds as `SLOPES` says; the hidden width by two."""
    parts = []
    for slopes, seeds in SLOPES.items():
        shapes, even = {**dict.fromkeys(LADDER, seeds), HIDDEN: 2}, slopes != "ALiBi's"
        runs = trained(
            Work("mup", width, 0, seed, folder, LONG, even) for width in shapes for seed in range(shapes[width])
        )
        parts.append(runs.assign(table=slopes))
    return pd.concat(parts)


SETS: dict[str, Callable[[str], pd.DataFrame]] = {
    "fine": lambda folder: around(FINE, [0.5 * k for k in range(-5, 6)], 4, folder),
    "hidden": lambda folder: around(FAR, [-2.0, -1.0, 0.0, 1.0, 2.0], 2, folder),
    "ladder": lambda folder: around(
        dict.fromkeys([("mup", w) for w in (*LADDER, HIDDEN)], -6.0), [*OFFSETS], 2, folder
    ),
    "broken": broken,
    "long": long,
    "losses": losses,
}


def store(name: str, folder: str) -> None:
    """Make the runs of a set and write curves/<name>.csv."""
    points = SETS[name](folder).rename(columns={"learning_rate": "lr"})
    columns = ["table", "width", "lr", "seed", "loss"]
    points[columns].sort_values(columns[:-1]).to_csv(STORED / f"{name}.csv", index=False)


if __name__ == "__main__":
    for chosen in sys.argv[2:] or SETS:
        store(chosen, sys.argv[1])
