"""What the notebooks in `analysis/` need besides frames and plots: where results are, and what to say without them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mutune.errors import Refusal


def runs_folder() -> Path:
    """The folder of results: `$MUTUNE_RUNS`, else `runs` in the current folder, else `../runs`."""
    if named := os.environ.get("MUTUNE_RUNS"):
        return Path(named)
    return Path("runs") if Path("runs").is_dir() else Path("../runs")


def benchmarks_folder() -> Path:
    """The folder of what long experiments measured: `benchmarks` in the current folder, else `../benchmarks`."""
    return Path("benchmarks") if Path("benchmarks").is_dir() else Path("../benchmarks")


@contextmanager
def results() -> Iterator[None]:
    """Run a cell that reads results; where they are missing, print the sentence that says which command makes them."""
    try:
        yield
    except Refusal as missing:
        print(missing)
