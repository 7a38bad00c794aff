"""Anyone's sweep: finished runs from a CSV file, as a ladder's points. No torch, no model."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mutune.certificate.points import AXES, COLUMNS
from mutune.errors import Refusal, require

#: Column of a file → what it is here; `lr` is how most people call it.
NAMES = {"lr": "learning_rate", "learning_rate": "learning_rate", "val_loss": "loss"}
REQUIRED = ("width", "learning_rate", "loss")
EXAMPLE = "for example a file with the columns width,lr,loss,seed"
TRUE = {"true", "1", "yes"}


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


def to_tables(frame: pd.DataFrame, key: str) -> dict[str, Table]:
    """As `read_tables`, from a frame; `key` names it in a refusal."""
    frame = frame.rename(columns=lambda name: str(name).strip().lower())
    if "table" not in frame.columns:
        return {"": to_table(frame, key)}
    tables = frame["table"].fillna("").astype(str).str.strip()
    require(bool((tables != "").all()), f"{key} has rows without a table; fill the column, or leave it out.")
    return {name: to_table(frame[tables == name].reset_index(drop=True), key) for name in sorted(set(tables))}


def to_table(frame: pd.DataFrame, key: str) -> Table:
    """Points from any frame with the columns of `REQUIRED` and perhaps others; `key` names it in a refusal."""
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
    told = frame["diverged"].astype(str).str.lower().isin(TRUE) if "diverged" in frame.columns else False
    points = frame.assign(loss=losses, diverged=losses.isna() | told)
    points.loc[points.diverged, "loss"] = math.nan
    for axis in AXES:
        if axis not in axes:
            points[axis] = 1.0
    points = points[list(COLUMNS)].reset_index(drop=True)
    _check_repeats(points, key)
    return _usable(points, axes, key)


def read_optima(path: str) -> dict[float, float]:
    """`optima=<path>`: width → best learning rate."""
    key, example = f"optima={path}", "for example a file with the columns width,optimum"
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
    try:
        return pd.read_csv(Path(path), skipinitialspace=True)
    except FileNotFoundError:
        raise Refusal(f"{key}={path} does not exist; {EXAMPLE}.") from None
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise Refusal(
            f"{key}={path} cannot be read as CSV ({str(error).strip().splitlines()[0]}); {EXAMPLE}."
        ) from None


def _positive(column: pd.Series, name: str, key: str) -> pd.Series:
    numbers = pd.to_numeric(column, errors="coerce")
    bad = ~(np.isfinite(numbers) & (numbers > 0))
    shown = _shown(name)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise Refusal(f"{key}: {shown} must be a number above 0, not {column.iloc[row]} (row {row + 1} of the data).")
    return numbers.astype(float)


def _check_repeats(points: pd.DataFrame, key: str) -> None:
    same = points.duplicated([*AXES, "learning_rate", "seed"], keep=False)
    if same.any():
        row = points[same].iloc[0]
        raise Refusal(
            f"{key} has width {row.width:g} at lr {row.learning_rate:g} more than once with the same seed "
            f"({int(same.sum())} such rows); keep one of each, or give them a column seed."
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
