"""Ladders of several tables side by side: which transfers best, and which trains best. They need not be the same."""

from typing import Any

import numpy as np

from mutune.certificate.assessment import Assessment


def compare(assessments: dict[str, Assessment]) -> list[dict[str, Any]]:
    """One row per table, the best-transferring first.

    `distance` and its 90 % interval in octaves at the target, `regret` of the transferred rate there, `loss` and
    `loss_error` of the largest rung at its own optimum, and `loss_transferred` there at the transferred rate, nats per
    token. Tables without a drift come last.
    """
    rows = [_row(table, assessment) for table, assessment in assessments.items()]
    return sorted(rows, key=lambda row: np.inf if row["regret"] is None else row["regret"])


def comparison(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The certificate's part."""
    return {"comparison": rows, "comparison_words": in_words(rows)}


def _row(table: str, assessment: Assessment) -> dict[str, Any]:
    valleys, widest = assessment.valleys, assessment.nearest("width")
    offset = assessment.log2_rate - valleys.optima[widest]
    penalties = [fit.penalty(widest, np.array([offset]))[0] for fit in valleys.fits]
    row: dict[str, Any] = {
        "table": table,
        "width": float(valleys.rungs["width"].iloc[widest]),
        "loss": float(valleys.levels[widest]),
        "loss_error": float(valleys.level_errors[widest]),
        "loss_transferred": float(valleys.levels[widest] + valleys.weights @ penalties),
        "distance": None,
        "low": None,
        "high": None,
        "regret": None,
    }
    if (drift := assessment.drift) and assessment.regret:
        low, middle, high = drift.quantiles(assessment.distance)
        row |= {"distance": middle, "low": low, "high": high, "regret": assessment.regret.transferred}
    return row


def in_words(rows: list[dict[str, Any]]) -> list[str]:
    """A line per table, and the two answers."""
    lines = []
    for row in rows:
        moved = "no drift measured"
        if row["distance"] is not None:
            moved = (
                f"{row['distance']:+.2f} octaves ({row['low']:+.2f} to {row['high']:+.2f}), regret {row['regret']:.4f}"
            )
        lines.append(
            f"{row['table']:<12} {moved}; at width {row['width']:g} it trains to {row['loss']:.4f} ± "
            f"{row['loss_error']:.4f} at its own best rate, {row['loss_transferred']:.4f} at the transferred one"
        )
    measured = [row for row in rows if row["distance"] is not None]
    if measured:
        lines.append(f"transfers best: {min(measured, key=lambda row: abs(row['distance']))['table']}")
    best = min(rows, key=lambda row: float(row["loss"]))
    near = [
        r["table"]
        for r in rows
        if r is not best and r["loss"] - best["loss"] < 2 * np.hypot(r["loss_error"], best["loss_error"])
    ]
    tie = f", not distinguishable from {', '.join(near)}" if near else ""
    lines.append(f"trains best, each at its own best rate: {best['table']}{tie}")
    return lines
