"""The certificate: `certificate.json` for programs, `certificate.md` for people."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mutune.certificate.adviser import Advice
from mutune.certificate.config import TransferFile
from mutune.certificate.ladder import Rung
from mutune.certificate.valley import Drift
from mutune.certificate.verdict import Difference, Verdict
from mutune.files import write_json, write_text


def certificate(
    transfer: TransferFile,
    verdict: Verdict,
    differences: list[Difference],
    rungs: list[Rung],
    drift: Drift | None,
    advice: list[Advice],
) -> dict[str, Any]:
    """Everything the certificate says, as plain data.

    `prediction` is null: mutune does not predict the target's loss yet. `regret` is what was measured: for each rung,
    the loss at the transferred rate minus the fitted minimum, nats per token, mean over seeds.
    """
    return {
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "target": asdict(transfer.target),
        "learning_rate": transfer.hyperparameters.learning_rate,
        "table": transfer.parametrization.table,
        "rungs": [_rung(rung, _base(rungs, transfer)) for rung in rungs],
        "drift": None if drift is None else {key: _finite(value) for key, value in asdict(drift).items()},
        "prediction": None,
        "regret": [{"width": rung.width, "nats_per_token": _regret(rung)} for rung in rungs] or None,
        "differences": [asdict(difference) for difference in differences],
        "advice": [asdict(each) for each in advice],
    }


def write_certificate(directory: Path, data: dict[str, Any]) -> None:
    """Write both forms."""
    write_json(directory / "certificate.json", data)
    write_text(directory / "certificate.md", markdown(data))


def markdown(data: dict[str, Any]) -> str:
    """The certificate in words and tables."""
    lines = [f"# {data['verdict']}", "", f"Target `{data['target']['name']}`, table `{data['table']}`, "]
    lines[-1] += f"base learning rate {data['learning_rate']:.5g}."
    lines += ["", "## Reasons", "", *(f"- {reason}" for reason in data["reasons"])]
    if data["rungs"]:
        lines += [
            "",
            "## Ladder",
            "",
            "| width | optimum, log2 | octaves from the base width | by seed | loss | regret |",
        ]
        lines.append("|---|---|---|---|---|---|")
        lines += [_rung_row(rung, regret) for rung, regret in zip(data["rungs"], data["regret"], strict=True)]
        lines += [
            "",
            "Optima in log2 of the base learning rate; losses and regret (at the transferred rate) in nats per",
        ]
        lines.append("token. A `<` or `>` marks a bound: the lowest loss was at the edge of the tried rates.")
    lines += ["", "## How proxy and target differ", "", "| axis | proxy | target | ratio | measured to |"]
    lines.append("|---|---|---|---|---|")
    lines += [_difference_row(difference) for difference in data["differences"]]
    if data["advice"]:
        lines += ["", "## Advice", "", "| severity | axis | finding | cure | source |", "|---|---|---|---|---|"]
        keys = ("severity", "axis", "finding", "cure", "source")
        lines += [f"| {' | '.join(advice[key] for key in keys)} |" for advice in data["advice"]]
    return "\n".join(lines) + "\n"


def _base(rungs: list[Rung], transfer: TransferFile) -> Rung:
    """The rung at the study's own width."""
    return next(rung for rung in rungs if rung.width == transfer.base.width)


def _rung(rung: Rung, base: Rung) -> dict[str, Any]:
    shifts = [valley.optimum - base.valleys[seed].optimum for seed, valley in rung.valleys.items()]
    return {
        "width": rung.width,
        "optimum_log2": _mean([valley.optimum for valley in rung.valleys.values()]),
        "octaves_from_base": _mean(shifts),
        "loss": _mean([valley.loss for valley in rung.valleys.values()]),
        "seeds": {str(seed): asdict(valley) for seed, valley in rung.valleys.items()},
        "points": [asdict(point) for point in rung.points],
    }


def _regret(rung: Rung) -> float | None:
    at_rate = {point.seed: point.value for point in rung.points if point.offset == 0.0}
    if at_rate.keys() != rung.valleys.keys():
        return None  # the transferred rate itself was not among the tried ones
    return _mean([max(0.0, at_rate[seed] - valley.loss) for seed, valley in rung.valleys.items()])


def _rung_row(rung: dict[str, Any], regret: dict[str, Any]) -> str:
    marks = {"low": "<", "high": ">", None: ""}
    seeds = ", ".join(f"{marks[v['edge']]}{v['optimum']:.2f}" for v in rung["seeds"].values())
    cost = "—" if regret["nats_per_token"] is None else f"{regret['nats_per_token']:.4f}"
    return (
        f"| {rung['width']} | {rung['optimum_log2']:.2f} | {rung['octaves_from_base']:+.2f} | {seeds} "
        f"| {rung['loss']:.4f} | {cost} |"
    )


def _difference_row(difference: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "—"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

    return (
        "| " + " | ".join(cell(difference[key]) for key in ("axis", "proxy", "target", "ratio", "measured_to")) + " |"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
