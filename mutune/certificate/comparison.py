"""Ladders of several tables side by side: which transfers best, and which trains best. They need not be the same."""

from typing import Any

import numpy as np

from mutune.certificate.assessment import Assessment
from mutune.certificate.points import AXES


def compare(assessments: dict[str, Assessment]) -> list[dict[str, Any]]:
    """One row per table, the best-transferring first: that of the least expected regret.

    `distance` and its 90 % interval in octaves at the target, `regret` of the transferred rate there and its interval;
    `loss` and `loss_error` of the widest rung that all tables have, at its own optimum, and `loss_transferred` there at
    the transferred rate, nats per token. Tables without a drift come last.
    """
    common = set.intersection(*(_places(assessment) for assessment in assessments.values()))
    widest = max(common, default=None)  # the width comes first
    rows = [_row(table, assessment, widest) for table, assessment in assessments.items()]
    return sorted(rows, key=lambda row: np.inf if row["regret"] is None else row["regret"])


def _places(assessment: Assessment) -> set[tuple[float, ...]]:
    """The rungs that differ from the base in the width alone, and the base."""
    rungs = assessment.valleys.rungs
    others = [axis for axis in AXES if axis != "width"]
    alone = (rungs[others] == rungs[others].iloc[assessment.base]).all(axis=1)
    return {tuple(map(float, row)) for row in rungs.loc[alone, list(AXES)].itertuples(index=False)}


def comparison(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The certificate's part."""
    return {"comparison": rows, "comparison_words": in_words(rows)}


def _row(table: str, assessment: Assessment, widest: tuple[float, ...] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"table": table} | dict.fromkeys(
        ("width", "loss", "loss_error", "loss_transferred", "distance", "low", "high", "regret")
    )
    row |= {"regret_low": None, "regret_high": None}
    if widest is not None:
        valleys = assessment.valleys
        i = int(np.flatnonzero((valleys.rungs[list(AXES)] == list(widest)).all(axis=1))[0])
        penalties = [fit.penalty(i, np.array([assessment.log2_rate - valleys.optima[i]]))[0] for fit in valleys.fits]
        row |= {"width": widest[0], "loss": float(valleys.levels[i]), "loss_error": float(valleys.level_errors[i])}
        row["loss_transferred"] = float(valleys.levels[i] + valleys.weights @ penalties)
    if (drift := assessment.drift) and (cost := assessment.regret):
        low, middle, high = drift.quantiles(assessment.distance)
        row |= {"distance": middle, "low": low, "high": high}
    if drift and cost and assessment.is_calibrated:
        row |= {"regret": cost.transferred, "regret_low": cost.low, "regret_high": cost.high}
    return row


def in_words(rows: list[dict[str, Any]]) -> list[str]:
    """A line per table, and the two answers."""
    lines = []
    for row in rows:
        words = "no drift measured"
        if row["distance"] is not None:
            words = f"{row['distance']:+.2f} octaves ({row['low']:+.2f} to {row['high']:+.2f})"
        if row["regret"] is not None:
            words += f", regret {row['regret']:.4f} ({row['regret_low']:.4f} to {row['regret_high']:.4f})"
        if row["loss"] is not None:
            words += (
                f"; at width {row['width']:g} it trains to {row['loss']:.4f} ± {row['loss_error']:.4f} at its own best "
                f"rate, {row['loss_transferred']:.4f} at the transferred one"
            )
        lines.append(f"{row['table']:<12} {words}")
    measured = [row for row in rows if row["regret"] is not None]
    if len(measured) == 1 < len(rows):
        lines.append(
            f"which transfers best is not said: only {measured[0]['table']} was measured near enough to the target"
        )
    elif measured:
        near = [row["table"] for row in measured[1:] if row["regret_low"] <= measured[0]["regret_high"]]
        lines.append(f"transfers best, by expected regret: {measured[0]['table']}{_tie(near)}")
    else:
        lines.append("which transfers best is not said: the target is too far from what was measured")
    if rows[0]["loss"] is None:
        return [*lines, "which trains best is not said: the tables have no width in common"]
    best = min(rows, key=lambda row: float(row["loss"]))
    near = [
        row["table"]
        for row in rows
        if row is not best and row["loss"] - best["loss"] < 2 * np.hypot(row["loss_error"], best["loss_error"])
    ]
    return [*lines, f"trains best at width {best['width']:g}, each at its own best rate: {best['table']}{_tie(near)}"]


def _tie(near: list[str]) -> str:
    return f", not distinguishable from {', '.join(near)}" if near else ""
