"""Real valleys, finely: `python -m tests.certificate.store_curves FOLDER`, half an hour on two cores.

Runs are those of `+sweep=valley`, at rates half an octave apart and by four seeds, so that the optimum of every width
is known better than to any ladder that is drawn from them (`families.redraw`): curves/fine.csv. The wide models that
such ladders are asked to foretell: curves/hidden.csv.
"""

import sys
from pathlib import Path

from tests.certificate.test_real_ladders import Work, trained

FINE = {  # table, width → the log2 rate around which its rates lie, ±2.5 octaves in halves, four seeds
    ("mup", 32): -5.5,
    ("mup", 64): -5.5,
    ("mup", 128): -5.5,
    ("sp", 32): -5.5,
    ("sp", 64): -6.0,
    ("sp", 128): -7.0,
}
HIDDEN = {("mup", 256): -6.0, ("sp", 256): -8.0}  # ±2 octaves in wholes, two seeds: what ladders are asked to foretell
FOLDER = Path(__file__).parent / "curves"


def store(name: str, centres: dict[tuple[str, int], float], octaves: list[float], seeds: int, records: str) -> None:
    """Make the runs and write curves/<name>.csv."""
    work = [
        Work(table, width, centre + x + 6, seed, records)
        for (table, width), centre in centres.items()
        for x in octaves
        for seed in range(seeds)
    ]
    work = sorted(work, key=lambda each: -each.width)
    points = trained(work).assign(table=[each.rule for each in work]).rename(columns={"learning_rate": "lr"})
    columns = ["table", "width", "lr", "seed", "loss"]
    points[columns].sort_values(columns[:-1]).to_csv(FOLDER / f"{name}.csv", index=False)


if __name__ == "__main__":
    store("fine", FINE, [0.5 * k for k in range(-5, 6)], 4, sys.argv[1])
    store("hidden", HIDDEN, [-2.0, -1.0, 0.0, 1.0, 2.0], 2, sys.argv[1])
