"""Real runs, stored step by step: `python -m tests.certificate.store_losses FOLDER`, about half an hour on one core.

What a band is asked to foretell: clean runs at one rate by six seeds, and a hidden width; runs at other rates, of which
a ladder without repeats is made; and broken runs of the widest rung. All batches of a seed are the same at every width.
A loss is stored in thousandths of a nat. What is finished in the folder is not made again.
"""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd

from mutune.training.result import METRICS
from tests.certificate.real import HIDDEN, STORED, Work, train

NUM_STEPS, WIDTHS, SEEDS = 240, (16, 32, 48, 64, 96, 128), 6
WORDS = (f"run.num_steps={NUM_STEPS}",)
BROKEN = (6,)  # seeds of broken runs, which no clean one has
FILE = STORED / "training_losses.csv"
#: What is wrong → the rule it trains under, and octaves from the clean rate.
FAULTS = {
    "rate × 8": ("mup", 3.0),
    "rate × 2": ("mup", 1.0),
    "rate / 8": ("mup", -3.0),
    "hidden rate unscaled": ("hidden rate unscaled", 0.0),
    "hidden rate 1/m²": ("hidden rate 1/m²", 0.0),
    "output multiplier unscaled": ("output multiplier unscaled", 0.0),
}


def wanted(folder: str) -> Iterator[Work]:
    """Every run."""
    for width in WIDTHS:
        yield from (Work("mup", width, 0.0, seed, folder, WORDS) for seed in range(SEEDS))
        yield from (Work("mup", width, offset, 0, folder, WORDS) for offset in (-1.0, 1.0))
        yield Work("mup", width, -1.0, 1, folder, WORDS)
    yield from (Work(rule, WIDTHS[-1], offset, s, folder, WORDS) for rule, offset in FAULTS.values() for s in BROKEN)
    yield from (Work("mup", HIDDEN, 0.0, seed, folder, WORDS) for seed in range(2))


def followed(work: Work) -> dict[str, Any]:
    """Make a run; returns what it was, and its training losses."""
    name = "-".join(map(str, (work.rule, work.width, work.offset, work.seed, work.even, *work.words)))
    path = Path(work.folder) / name.replace("/", "-") / METRICS
    if not path.is_file() or len(path.read_text().splitlines()) < NUM_STEPS:
        train(work)
    losses = " ".join(f"{1000 * json.loads(line)['loss']:.0f}" for line in path.read_text().splitlines())
    return {"rule": work.rule, "width": work.width, "offset": work.offset, "seed": work.seed, "losses": losses}


def store(works: Iterable[Work], processes: int) -> None:
    """Make the runs and write them."""
    with ProcessPoolExecutor(processes) as pool:
        frame = pd.DataFrame(list(pool.map(followed, works)))
    frame.sort_values(["rule", "width", "offset", "seed"]).to_csv(FILE, index=False)


if __name__ == "__main__":
    store(wanted(sys.argv[1]), int(os.environ.get("PROCESSES", os.cpu_count() or 1)))
