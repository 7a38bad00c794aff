"""Real valleys, finely: `python -m tests.certificate.store_curves FOLDER` writes curves/fine.csv, 15 minutes, 2 cores.

Runs are those of `+sweep=valley`, at rates half an octave apart and by four seeds, so that the optimum of every width
is known better than to any ladder that is drawn from them (`families.redraw`).
"""

import sys
from pathlib import Path

from tests.certificate.test_real_ladders import Work, trained

SEEDS = 4
#: Table, width → the octave (log2 rate) around which its rates lie, ±2.5 octaves.
CENTRES = {("mup", 32): -5.5, ("mup", 64): -5.5, ("mup", 128): -5.5, ("sp", 64): -6.0, ("sp", 128): -7.0}
STORED = Path(__file__).parent / "curves" / "fine.csv"


def runs(folder: str) -> list[Work]:
    """What is stored."""
    octaves = [0.5 * k for k in range(-5, 6)]
    return [
        Work(table, width, centre + x + 6, seed, folder)
        for (table, width), centre in CENTRES.items()
        for x in octaves
        for seed in range(SEEDS)
    ]


if __name__ == "__main__":
    work = sorted(runs(sys.argv[1]), key=lambda work: -work.width)
    points = trained(work).assign(table=[each.rule for each in work])
    points = points.sort_values(["table", "width", "learning_rate", "seed"])
    points[["table", "width", "learning_rate", "seed", "loss"]].to_csv(STORED, index=False)
