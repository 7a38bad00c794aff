"""How often the certificate is right: coverage of its intervals, false verdicts and power, family by family."""

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mutune.certificate.assessment import assess
from mutune.certificate.table import Table, read_tables
from mutune.certificate.valleys import fit_valleys
from mutune.certificate.verdict import Case, verdict_of
from tests.certificate.families import CONDITIONS, CURVES, Family, Ladder, make_ladder, redraw, resample
from tests.soak import record

FAMILIES = {**CURVES, **CONDITIONS}
NEAR, FAR = 0.25, 1.0  # octaves of true drift at the target
DRIFTS = ((0.0, NEAR), (NEAR, FAR), (FAR, 3.0))  # a third of the ladders each
STORED = Path(__file__).parent / "curves"
#: What the quick tests measure, 201 ladders each.
QUICK = ("kink 1, linear", "kink 1.5, saturating", "kink 4, accelerating", "arms 2, linear", "noise 0.01", "five rungs")


def outcome(ladder: Ladder) -> dict[str, Any]:
    """What the certificate says of a ladder whose truth is known, and whether that holds."""
    base = {axis: float(ladder.points[axis].min()) for axis in ("width", "depth", "tokens", "batch")}
    found = assess(ladder.points, base, ladder.target)
    inside = [
        low <= truth <= high
        for i, truth in enumerate(ladder.optima)
        if found.valleys.edges[i] is None
        for low, high in [found.valleys.interval(i)]
    ]
    covered, half = False, float("nan")
    if found.drift:
        low, _, high = found.drift.quantiles(found.drift.moved)
        covered, half = low <= ladder.moved <= high, (high - low) / 2
    said = verdict_of(Case([], found))
    return {"moved": ladder.moved, "rungs": inside, "target": covered, "half": half, "verdict": said}


def outcomes(family: Family, seeds: range) -> list[dict[str, Any]]:
    """Outcomes of ladders made from seeds; a third of them moves little, a third more, a third far."""
    return [outcome(make_ladder(replace(family, total=DRIFTS[seed % 3]), seed)) for seed in seeds]


def measured(pool: ProcessPoolExecutor, family: Family, count: int) -> list[dict[str, Any]]:
    """Outcomes of so many ladders, on all cores."""
    parts = pool.map(partial(outcomes, family), [range(k, count, 6) for k in range(6)])
    return [row for part in parts for row in part]


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of one family."""
    frame = pd.DataFrame(found)
    near, far = frame[frame.moved.abs() < NEAR], frame[frame.moved.abs() > FAR]
    rungs = [inside for row in frame.rungs for inside in row]
    return {
        "rung": sum(rungs) / len(rungs),
        "target": frame.target.mean(),
        "half-width": frame.half.median(),
        "near: GO": (near.verdict == "GO").mean(),
        "GO or CARE": near.verdict.isin(["GO", "GO WITH CARE"]).mean(),
        "false NO-GO": (near.verdict == "NO-GO").mean(),
        "far: NO-GO": (far.verdict == "NO-GO").mean(),
        "false GO": (far.verdict == "GO").mean(),
    }


@pytest.mark.parametrize("name", QUICK)
def test_intervals_cover_and_verdicts_are_right(name: str) -> None:
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shares = summary(measured(pool, FAMILIES[name], 201))
    assert shares["rung"] > 0.83
    assert shares["target"] > 0.83
    assert shares["false GO"] <= 0.03
    assert shares["false NO-GO"] <= 0.07
    assert shares["GO or CARE"] >= 0.8
    assert shares["far: NO-GO"] >= 0.8


@pytest.mark.parametrize("table", ["mup", "sp"])
def test_real_curves_are_judged_by_their_hidden_width(table: str) -> None:
    found = _stored("bytes", table)
    assert verdict_of(Case([], found)) == {"mup": "GO", "sp": "NO-GO"}[table]


def test_real_curves_tuned_on_the_default_corpus_are_judged_so_too() -> None:
    assert verdict_of(Case([], _stored("sotu", "mup"))) in ("GO", "GO WITH CARE")
    assert verdict_of(Case([], _stored("sotu", "sp"))) == "NO-GO"


@pytest.mark.parametrize("first_runs", [False, True])
@pytest.mark.parametrize("table", ["mup", "sp"])
def test_intervals_hold_the_optima_of_real_runs(table: str, first_runs: bool) -> None:
    """The runs are stored half an octave apart by four seeds; ladders take an octave and three, or hardly a repeat."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        shares = summary(list(pool.map(outcome, _redrawn(table, 60, first_runs), chunksize=10)))
    assert shares["rung"] >= 0.85
    assert shares["target"] >= 0.85


def _stored(name: str, table: str) -> Any:
    points = read_tables(str(STORED / f"{name}.csv"))[table].points
    points = points[points.width <= 128]  # 256 is hidden
    base = {axis: float(points[axis].min()) for axis in ("width", "depth", "tokens", "batch")}
    return assess(points, base, {**base, "width": 256.0})


@pytest.mark.soak
def test_calibration_of_every_family() -> None:
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for name, family in FAMILIES.items():
            rows.append({"family": name, **summary(measured(pool, family, 1002))})
        for name, ladders in _resampled():
            rows.append({"family": name, **summary(list(pool.map(outcome, ladders, chunksize=20)))})
    shown = [{key: value if key == "family" else f"{value:.3f}" for key, value in row.items()} for row in rows]
    record("calibration", "How often the certificate is right, 1,002 made-up ladders a family", shown)
    frame = pd.DataFrame(rows)
    made = frame[frame.family.isin(list(FAMILIES))]
    assert made["false GO"].max() <= 0.02 or made["false GO"].mean() <= 0.02
    assert made["false NO-GO"].mean() <= 0.05
    assert made["target"].min() > 0.8


def _resampled() -> Iterator[tuple[str, list[Ladder]]]:
    """Real curves up to width 128, and the hidden 256: stored finely, or a run an octave with fresh grids and noise."""
    for table in ("mup", "sp"):
        yield f"real runs stored finely, {table}", _redrawn(table, 1002)
        yield f"the same, first runs by design, {table}", _redrawn(table, 1002, first_runs=True)
    for table, entry in read_tables(str(STORED / "bytes.csv")).items():
        assert isinstance(entry, Table)
        yield f"splines of a run an octave, {table}", [resample(entry.points, 256, seed) for seed in range(1002)]


def _redrawn(table: str, count: int, first_runs: bool = False) -> list[Ladder]:
    fine, hidden = (read_tables(str(STORED / f"{name}.csv"))[table].points for name in ("fine", "hidden"))
    (optimum,) = fit_valleys(hidden).optima
    return [redraw(fine, 256, float(optimum), seed, first_runs) for seed in range(count)]
