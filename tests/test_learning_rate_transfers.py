"""The product's claim, on real text: under μP the best learning rate stays with width, under SP it falls."""

import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutune.reporting import drift, load_runs, optima, valleys
from tests import doors, soak

REDUCED = ["search.space.width.values=[128,32]", "search.space.seed.values=[1]", "run.num_steps=120"]


def measured(out: Path) -> pd.DataFrame:
    return drift(valleys(load_runs(out / "sweeps/valley"))).set_index("table")


def test_the_optimum_stays_under_mup_and_falls_under_sp(tmp_path: Path) -> None:
    """`+sweep=valley` reduced to widths 32 and 128, one seed and three quarters of the steps."""
    doors.run("sweep", "+sweep=valley", *REDUCED, f"out={tmp_path}")
    moved = measured(tmp_path).total
    assert abs(moved["mup"]) <= 0.5
    assert moved["sp"] <= -1.0


@pytest.mark.soak
def test_soak_the_whole_valley(tmp_path: Path) -> None:
    """Widths 32, 64, 128, two seeds: the README's figure."""
    started = time.monotonic()
    doors.run("sweep", "+sweep=valley", f"out={tmp_path}")
    seconds = time.monotonic() - started
    points, moved = valleys(load_runs(tmp_path / "sweeps/valley")), measured(tmp_path)
    rows: list[dict[str, Any]] = []
    for table, part in optima(points).groupby("table"):
        found = {f"optimum at {r['width']}, log2": _shown(r, "optimum") for r in part.to_dict("records")}
        row = moved.loc[table].to_dict()
        rows.append(
            {
                "table": table,
                **found,
                "octaves per doubling": _shown(row, "octaves_per_doubling"),
                "range, octaves": f"{row['range']:.2f}",
                "wall, s": round(seconds),
            }
        )
    soak.record("valley", "+sweep=valley: optima of two seeds with their 90 % intervals", rows)
    assert moved.range["mup"] <= 0.5
    assert moved.total["sp"] <= -1.0


def _shown(row: dict[Any, Any], key: str) -> str:
    return f"{row[key]:.2f} ({row['low']:.2f} to {row['high']:.2f})"
