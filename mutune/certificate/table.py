"""Anyone's sweep: finished runs from a CSV file, as a ladder's points. No torch, no model."""

import csv
import io
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from mutune.certificate.points import AXES, COLUMNS
from mutune.errors import Refusal, first_line, require
from mutune.folders import CONFIG

#: Column of a file → what it is here; `lr` is how most people call it.
NAMES = {"lr": "learning_rate", "learning_rate": "learning_rate", "val_loss": "loss"}
REQUIRED = ("width", "learning_rate", "loss")
OPTIMA = "for example a file with the columns width,optimum"
EXAMPLE = "for example a file with the columns width,lr,loss,seed"
DIVERGED = {"true": True, "yes": True, "false": False, "no": False, "": False}
MAX_RUNGS = 50  # that are fitted together in a few seconds
MOST_OF_AN_AXIS = 1e18
MOST = 1e12  # of a loss, in whatever unit


@dataclass(frozen=True)
class Table:
    """Points of a file.

    Attributes:
        points: as `points.COLUMNS`; an axis that the file does not have is 1 everywhere.
        axes: those that it has.
        dropped: what was left out, a sentence each.
    """

    points: pd.DataFrame
    axes: tuple[str, ...]
    dropped: tuple[str, ...] = ()


def read_tables(path: str) -> dict[str, Table]:
    """Read `runs=<path>`: parametrization → its points, by the column `table`; "" where there is none.

    A run without a loss, or with one that is not finite, diverged. Rungs with fewer than three finished rates are left
    out.

    Raises:
        Refusal: the file does not serve; one sentence.
    """
    return to_tables(_read(path), f"runs={path}")


def to_tables(frame: pd.DataFrame, key: str, *, independent: bool = False) -> dict[str, Table]:
    """As `read_tables`, from a frame.

    Args:
        key: names it in a refusal.
        independent: whether rows that agree in everything but the loss are runs of their own, not copies.
    """
    frame = frame.rename(columns=lambda name: str(name).strip().lower())
    if "table" not in frame.columns:
        return {"": to_table(frame, key, independent=independent)}
    tables = frame["table"].fillna("").astype(str).str.strip()
    require(bool((tables != "").all()), f"{key} has rows without a table; fill the column, or leave it out.")
    found = {}
    for name in sorted(set(tables)):
        table = to_table(frame[tables == name].reset_index(drop=True), key, independent=independent)
        found[name] = replace(table, dropped=tuple(f"table {name}, {why}" for why in table.dropped))
    return found


def to_table(frame: pd.DataFrame, key: str, *, independent: bool = False) -> Table:
    """Points from any frame with the columns of `REQUIRED` and perhaps others; arguments as for `to_tables`."""
    frame = frame.rename(columns=lambda name: NAMES.get(str(name).strip().lower(), str(name).strip().lower()))
    missing = [name for name in REQUIRED if name not in frame.columns]
    require(not missing, f"{key} has no column {' and '.join(_shown(m) for m in missing)}; {EXAMPLE}.")
    doubled = sorted({str(name) for name in frame.columns[frame.columns.duplicated()]} & {*COLUMNS})
    require(not doubled, f"{key} has the column {' and '.join(map(_shown, doubled))} twice; {EXAMPLE}.")
    require(len(frame) > 0, f"{key} has no rows; {EXAMPLE}.")
    axes = tuple(axis for axis in AXES if axis in frame.columns)
    for name in (*axes, "learning_rate"):
        frame[name] = _positive(frame[name], name, key)
    frame["seed"] = pd.factorize(frame["seed"])[0] if "seed" in frame.columns else 0
    losses = pd.to_numeric(frame["loss"], errors="coerce").replace([np.inf, -np.inf], math.nan)
    words = frame["loss"].notna() & losses.isna() & ~frame["loss"].astype(str).str.lower().str.contains("nan|inf|div")
    if words.any():
        raise Refusal(f"{key} has the loss {frame['loss'][words].iloc[0]!r}, which is no number; {EXAMPLE}.")
    huge = losses.abs() > MOST
    if huge.any():
        raise Refusal(
            f"{key} has the loss {losses[huge].iloc[0]:g}, which is none; where a run diverged, leave it empty."
        )
    told = _diverged(frame["diverged"], key) if "diverged" in frame.columns else False
    points = frame.assign(loss=losses, diverged=losses.isna() | told)
    points.loc[points.diverged, "loss"] = math.nan
    for axis in AXES:
        if axis not in axes:
            points[axis] = 1.0
    points = points[list(COLUMNS)].reset_index(drop=True)
    if points.groupby([*AXES, "seed"]).size().max() == 1:  # every run has a seed of its own, which compares nothing
        points, independent = points.assign(seed=0), True
    if not independent:
        _check_repeats(points, key)
    _check_copies(points, key)
    table = _usable(points, axes, key)
    count = len(table.points[list(AXES)].drop_duplicates())
    require(
        count <= MAX_RUNGS,
        f"{key} has {count} rungs, and {MAX_RUNGS} can be fitted together; leave rows out, for example widths that lie "
        "close to others.",
    )
    return table


def _diverged(column: pd.Series, key: str) -> pd.Series:
    """Truth values, however they are written."""
    words = column.astype("string").fillna("").str.strip().str.lower()
    numbers = pd.to_numeric(column, errors="coerce")
    known = words.map(DIVERGED)
    odd = known.isna() & numbers.isna()
    if odd.any():
        raise Refusal(f"{key} has diverged={column[odd].iloc[0]}, which is not understood; for example true or false.")
    return known.where(known.notna(), numbers != 0).astype(bool)


def read_optima(path: str) -> dict[float, float]:
    """`optima=<path>`: width → best learning rate."""
    key, example = f"optima={path}", OPTIMA
    frame = _read(path, "optima").rename(columns=lambda name: str(name).strip().lower())
    missing = [name for name in ("width", "optimum") if name not in frame.columns]
    require(not missing, f"{key} has no column {' and '.join(missing)}; {example}.")
    widths, rates = (_positive(frame[name], name, key) for name in ("width", "optimum"))
    require(not widths.duplicated().any(), f"{key} gives width {widths[widths.duplicated()].min():g} twice; {example}.")
    require(
        len(widths) >= 2, f"{key} has {len(widths)} width{'' if len(widths) == 1 else 's'}; it takes two, {example}."
    )
    return dict(sorted(zip(widths.tolist(), rates.tolist(), strict=True)))


def _read(path: str, key: str = "runs") -> pd.DataFrame:
    example = EXAMPLE if key == "runs" else OPTIMA
    try:
        _check_no_study(Path(path), key)
        text = Path(path).read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        mark = next((mark for mark in (",", ";", "\t") if mark in head), ",")
        header, *rows = list(csv.reader(io.StringIO(text), delimiter=mark, skipinitialspace=True)) or [[]]
        while header and not header[-1].strip():
            header.pop()
        names = [name.strip().lower() for name in header]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"{key}={path} has the column {' and '.join(twice)} twice; {example}.")
        for number, row in enumerate(rows, 1):
            require(
                not any(field.strip() for field in row[len(header) :]),
                f"{key}={path} has more fields than its header in row {number} of the data; {example}.",
            )
        return pd.read_csv(
            io.StringIO(text),
            sep=mark,
            decimal="," if mark == ";" else ".",
            skipinitialspace=True,
            index_col=False,
            usecols=range(len(header)),
        )
    except FileNotFoundError:
        raise Refusal(f"{key}={path} does not exist; {example}.") from None
    except IsADirectoryError:
        raise Refusal(f"{key}={path} is a folder; {example}.") from None
    except pd.errors.EmptyDataError:
        raise Refusal(f"{key}={path} is empty; {example}.") from None
    except (OSError, UnicodeDecodeError, csv.Error, pd.errors.ParserError) as error:
        raise Refusal(f"{key}={path} cannot be read as CSV ({first_line(error)}); {example}.") from None


def _check_no_study(path: Path, key: str) -> None:
    """Refuse a study's folder, or its storage, which `study=` reads."""
    folder = path.parent if path.suffix in (".db", ".journal") else path
    out = folder.parent.parent
    if folder.parent.name == "sweeps" and (folder / "trials").is_dir() and (folder / CONFIG).is_file():
        where = "" if out == Path("runs") else f" out={out}"
        raise Refusal(f"{key}={path} is of a study of mutune's own; ask with study={folder.name}{where} in its place.")


def _positive(column: pd.Series, name: str, key: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    most = math.inf if name in ("learning_rate", "optimum") else MOST_OF_AN_AXIS
    bad = ~(np.isfinite(numbers) & (numbers > 0) & (numbers <= most))
    shown = _shown(name)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        bounds = f"at most {most:g}" if numbers.iloc[row] > most else "above 0"
        works = 0.01 if name in ("learning_rate", "optimum") else 64
        raise Refusal(
            f"{key}: {shown} must be a number {bounds}, not {column.iloc[row]} (row {row + 1} of the data); for "
            f"example {works}."
        )
    return numbers.astype(float)


def _check_copies(points: pd.DataFrame, key: str) -> None:
    """Refuse a seed whose losses are those of another, one for one."""
    for rung, group in points[~points.diverged].groupby(list(AXES)):
        runs = {seed: frozenset(zip(g.learning_rate, g.loss, strict=True)) for seed, g in group.groupby("seed")}
        seen: set[frozenset[tuple[float, float]]] = set()
        for losses in runs.values():
            require(
                losses not in seen or len(losses) < 3 or len({loss for _, loss in losses}) < 3,
                f"{key} has seeds whose losses at width {rung[0]:g} are all the same, so that one is a copy; leave it "
                "out.",
            )
            seen.add(losses)


def _check_repeats(points: pd.DataFrame, key: str) -> None:
    same = points.duplicated([*AXES, "learning_rate", "seed"], keep=False)
    if same.any():
        row, again = points[same].iloc[0], points.duplicated([*AXES, "learning_rate", "seed"])
        raise Refusal(
            f"{key} has width {row.width:g} at lr {row.learning_rate:.10g} more than once with the same seed "
            f"({int(again.sum())} rows too many, the first is row {int(again.argmax()) + 1} of the data); keep one of "
            "each, or give them seeds of their own."
        )


def _usable(points: pd.DataFrame, axes: tuple[str, ...], key: str) -> Table:
    """Leave out the rungs that no valley can be fitted to."""
    finished = points[~points.diverged].groupby(list(AXES)).learning_rate.nunique()
    counts = points.groupby(list(AXES)).size().index.to_frame(index=False)
    counts["rates"] = [int(finished.get(tuple(row), 0)) for row in counts.itertuples(index=False)]
    thin = counts[counts.rates < 3]
    dropped = tuple(
        f"width {row.width:g} has {row.rates} finished rate{'' if row.rates == 1 else 's'}, of three needed"
        for row in thin.itertuples(index=False)
    )
    merged = points.merge(counts[counts.rates >= 3][list(AXES)], on=list(AXES))
    return Table(merged[list(COLUMNS)], axes, dropped)


def _shown(name: str) -> str:
    return "lr" if name == "learning_rate" else name
