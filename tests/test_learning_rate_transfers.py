"""The product's claim, on real text: under μP the best learning rate stays with width, under SP it falls."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutune.reporting import drift, load_runs, optima, valleys
from tests import doors, soak

REDUCED = ["search.space.width.values=[128,32]", "search.space.seed.values=[1]"]


def fitted(out: Path) -> pd.DataFrame:
    return optima(valleys(load_runs(out / "sweeps/valley")))


def moved(frame: pd.DataFrame, table: str, seed: int) -> float:
    """Octaves from the narrowest to the widest model's optimum."""
    mine = frame[(frame.table == table) & (frame.seed == seed)].sort_values("width")
    return float(mine.optimum.iloc[-1] - mine.optimum.iloc[0])


def test_the_optimum_stays_under_mup_and_falls_under_sp(tmp_path: Path) -> None:
    """`+sweep=valley` reduced to widths 32 and 128 and one seed."""
    doors.run("sweep", "+sweep=valley", *REDUCED, f"out={tmp_path}")
    frame = fitted(tmp_path)
    assert abs(moved(frame, "mup", 1)) <= 0.5
    assert moved(frame, "sp", 1) <= -1.0


@pytest.mark.soak
def test_soak_the_whole_valley(tmp_path: Path) -> None:
    """Widths 32, 64, 128, two seeds: the README's figure."""
    started = time.monotonic()
    doors.run("sweep", "+sweep=valley", f"out={tmp_path}")
    seconds = time.monotonic() - started
    frame = fitted(tmp_path)
    rows: list[dict[str, Any]] = []
    for (table, seed), part in frame.sort_values("width").groupby(["table", "seed"]):
        by_width = zip(part.width.tolist(), part.optimum.round(2).tolist(), strict=True)
        rows.append({"table": table, "seed": seed, **{f"optimum at {w}, log2": x for w, x in by_width}})
    ranges = drift(frame).set_index("table")["range"]
    for row in rows:
        row["range of the means, octaves"] = round(float(ranges[row["table"]]), 2)
        row["wall, s"] = round(seconds)
    soak.record("valley", "+sweep=valley: fitted optima by table, seed and width", rows)
    assert ranges["mup"] <= 0.5
    for seed in (0, 1):
        assert moved(frame, "sp", seed) <= -1.0
