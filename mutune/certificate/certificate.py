"""The certificate: `certificate.json` for programs, `certificate.md` for people."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mutune.certificate.adviser import Advice
from mutune.certificate.assessment import Assessment
from mutune.certificate.band import LEVEL
from mutune.certificate.config import Prediction
from mutune.certificate.differences import Difference
from mutune.certificate.laws import law_words
from mutune.certificate.points import AXES
from mutune.certificate.verdict import FAR_OCTAVES, Verdict
from mutune.files import write_json, write_text
from mutune.training.result import SMOOTHED

BOUNDS = {"low": "≤ ", "high": "≥ ", None: ""}  # of an optimum at the edge of the tried rates, or beyond


def certificate(
    target: Mapping[str, Any],
    learning_rate: float,
    table: str | None,
    verdict: Verdict,
    differences: list[Difference],
    assessment: Assessment | None,
    price: Mapping[str, Any] | None = None,
    advice: Sequence[Advice] = (),
) -> dict[str, Any]:
    """Everything the certificate says, as plain data.

    Losses are in nats per token, rates are base learning rates, positions and distances are in octaves of them;
    intervals hold 90 %. There is no regret where the target is further from the ladder than intervals were calibrated.

    Args:
        price: what wins the regret back, as `regret.price_of`, with `currency` and `tokens_source`.
    """
    known = assessment if assessment and assessment.drift else None
    return {
        "verdict": verdict.verdict,
        "reasons": verdict.reasons,
        "settle": verdict.settle,
        "target": dict(target),
        "learning_rate": learning_rate,
        "table": table,
        "rungs": [_rung(assessment, i) for i in range(len(assessment.valleys.rungs))] if assessment else [],
        "drift": _drift(known) if known else None,
        "regret": _regret(known, price or {}) if known and known.is_calibrated else None,
        "differences": [asdict(difference) for difference in differences],
        "advice": [asdict(each) for each in advice],
    }


def write_certificate(directory: Path, data: dict[str, Any]) -> None:
    """Write both forms."""
    write_json(directory / "certificate.json", data)
    write_text(directory / "certificate.md", markdown(data))


def markdown(data: dict[str, Any]) -> str:
    """The certificate in words and tables."""
    table = f", table `{_plain(data['table'])}`" if data["table"] else ""
    lines = [f"# {data['verdict']}", "", f"Target {_target(data['target'])}{table}, "]
    lines[-1] += f"base learning rate {data['learning_rate']:.5g}."
    lines += ["", "## Reasons", "", *(f"- {reason}" for reason in data["reasons"])]
    if data["settle"]:
        lines += ["", "What would settle it:", "", *(f"- {cure}" for cure in data["settle"])]
    if data.get("prediction"):
        said = Prediction(**data["prediction"])
        lines += ["", "## Prediction of the target's loss", "", f"{said}", *_on_the_way(said)]
    if data["rungs"]:
        lines += _ladder(data["rungs"])
    if data.get("notes"):
        lines += ["", *(f"- {_plain(note)}" for note in data["notes"])]
    if data.get("comparison_words"):
        lines += ["", "## Tables compared", "", *(f"- {_plain(line)}" for line in data["comparison_words"])]
    if data["drift"]:
        lines += _at_the_target(data)
    if data.get("laws"):
        lines += law_words(data["laws"])
    if data["differences"]:
        lines += ["", "## How proxy and target differ", "", "| axis | proxy | target | ratio | measured to |"]
        lines.append("|---|---|---|---|---|")
        lines += [_difference_row(difference) for difference in data["differences"]]
    if data.get("advice"):
        lines += ["", "## Advice", "", "| severity | axis | finding | cure | source |", "|---|---|---|---|---|"]
        keys = ("severity", "axis", "finding", "cure", "source")
        lines += [f"| {' | '.join(advice[key] for key in keys)} |" for advice in data["advice"]]
    return "\n".join(lines) + "\n"


def spoken(data: Mapping[str, Any]) -> list[str]:
    """What the command says of it: rungs, verdict, reasons, and what follows."""
    axes = [axis for axis in AXES if len({rung[axis] for rung in data["rungs"]}) > 1] or ["width"]
    lines = [f"note       {note}" for note in data.get("notes", [])]
    for rung in data["rungs"]:
        where, (low, high) = ", ".join(f"{axis} {rung[axis]:,}" for axis in axes), rung["interval_log2"]
        lines.append(
            f"{where}: optimum {BOUNDS[rung['edge']]}2^{rung['optimum_log2']:.2f} ({low:.2f} to {high:.2f}), "
            f"{rung['octaves_from_base']:+.2f} octaves from the base, "
            f"loss {rung['loss']:.4f} ± {rung['loss_error']:.4f}"
        )
    lines += [f"diverged   {line}" for line in _diverged(data["rungs"], axes)]
    lines.append(f"verdict    {data['verdict']}")
    lines += [f"           - {reason}" for reason in data["reasons"]]
    lines += [f"settles it {cure}" for cure in data["settle"]]
    lines += [f"compared   {line}" for line in data.get("comparison_words", [])]
    if cost := data["regret"]:
        lines.append(
            f"regret     {cost['transferred']:.4f} nats per token expected at the transferred rate "
            f"({cost['low']:.4f} to {cost['high']:.4f}); least at {cost['recommended_learning_rate']:.4g}: "
            f"{cost['recommended']:.4f}"
        )
        if price := _price(cost):
            lines.append(f"price      {price}")
    if data.get("prediction"):
        lines.append(f"prediction {Prediction(**data['prediction'])}")
    return lines


def _on_the_way(prediction: Prediction) -> list[str]:
    """The first, middle and last of the band, in words; none where there is no band."""
    if not (band := prediction.band):
        return []
    shown = [band[0], band[len(band) // 2], band[-1]]
    said = [f"{middle:.3f} ({low:.3f}-{high:.3f}) after {share:.0%}" for share, low, middle, high in shown]
    words = f"Training loss on the way, smoothed over {SMOOTHED:.0%} of the run, {LEVEL:.0%} intervals"
    return ["", f"{words}: {', '.join(said)} of it. More: `prediction.band` in certificate.json."]


def _diverged(rungs: list[dict[str, Any]], axes: list[str]) -> list[str]:
    """The runs that diverged, a line for each rung that has any."""
    lines = []
    for rung in rungs:
        rates = [point["learning_rate"] for point in rung["points"] if point["diverged"]]
        if rates:
            where = ", ".join(f"{axis} {rung[axis]:,}" for axis in axes)
            lines.append(
                f"{where}: {len(rates)} of {len(rung['points'])} runs, the lowest at 2^{math.log2(min(rates)):.2f}"
            )
    return lines


def _price(regret: Mapping[str, Any]) -> str:
    """What would win the regret back, in words; empty where that is not known."""
    if regret.get("tokens") is None:
        return ""
    parts, source = [f"{regret['tokens']:.3g} tokens more"], regret["tokens_source"]
    if regret["flops"] is not None:
        parts.append(f"{regret['flops']:.3g} FLOPs, {regret['gpu_hours']:,.3g} GPU-hours")
        parts.append(f"{regret['money']:,.2f} {regret['currency']}")
        source = f"{source}; at prices.*"
    return f"winning that back takes {', '.join(parts)} ({source})"


def _target(target: Mapping[str, Any]) -> str:
    if "name" in target:
        return f"`{target['name']}`"
    return ", ".join(f"{axis} {value:,.10g}" for axis, value in target.items() if value is not None)


def _rung(assessment: Assessment, i: int) -> dict[str, Any]:
    valleys = assessment.valleys
    rung = {axis: float(valleys.rungs[axis].iloc[i]) for axis in AXES}
    known = {axis: _whole(value) if axis in assessment.axes else None for axis, value in rung.items()}
    points = assessment.points
    mine = points[np.logical_and.reduce([points[axis] == value for axis, value in rung.items()])]
    low, high = valleys.interval(i)
    fit = valleys.fits[int(valleys.weights.argmax())]
    return {
        **known,
        "optimum_log2": float(valleys.optima[i]),
        "interval_log2": [low, high],
        "edge": valleys.edges[i],
        "octaves_from_base": float(valleys.optima[i] - valleys.optima[assessment.base]),
        "loss": float(valleys.levels[i]),
        "loss_error": float(valleys.level_errors[i]),
        "octave_down": float(fit.penalty(i, np.array([-1.0]))[0]),
        "octave_up": float(fit.penalty(i, np.array([1.0]))[0]),
        "seeds": int(mine.seed.nunique()),
        "points": [
            {
                "learning_rate": rate,
                "seed": _whole(seed),
                "loss": loss if math.isfinite(loss) else None,
                "diverged": bad,
            }
            for rate, seed, loss, bad in zip(
                mine.learning_rate.tolist(), mine.seed.tolist(), mine.loss.tolist(), mine.diverged.tolist(), strict=True
            )
        ],
    }


def _drift(assessment: Assessment) -> dict[str, Any]:
    drift = assessment.drift
    assert drift is not None
    slopes = {axis: drift.quantiles(drift.slopes[:, i]) for i, axis in enumerate(AXES)}
    low, middle, high = drift.quantiles(assessment.distance)
    return {
        "octaves_per_doubling": {
            axis: {"median": m, "interval": [a, b], "measured": assessment.measured(axis) > 1}
            for axis, (a, m, b) in slopes.items()
            if assessment.measured(axis) > 1 or assessment.beyond(axis) > 0
        },
        "distance": middle,
        "interval": [low, high],
        "chance_beyond_an_octave": drift.chance(abs(assessment.distance) > FAR_OCTAVES),
    }


def _regret(assessment: Assessment, price: Mapping[str, Any]) -> dict[str, Any]:
    regret = assessment.regret
    assert regret is not None
    return {
        **asdict(regret),
        "recommended_learning_rate": float(2.0 ** (assessment.log2_rate + regret.offset)),
        **price,
    }


def _ladder(rungs: list[dict[str, Any]]) -> list[str]:
    """The rungs' table; an axis in which they all agree has no column."""
    axes = [axis for axis in AXES if len({rung[axis] for rung in rungs}) > 1] or ["width"]
    head = [*axes, "optimum, log2", "90 % interval", "octaves from the base", "loss", "an octave down", "up", "seeds"]
    lines = ["", "## Ladder", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for rung in rungs:
        mark = BOUNDS[rung["edge"]]
        low, high = rung["interval_log2"]
        cells = [*(f"{rung[axis]:,}" for axis in axes), f"{mark}{rung['optimum_log2']:.2f}", f"{low:.2f} to {high:.2f}"]
        cells += [f"{rung['octaves_from_base']:+.2f}", f"{rung['loss']:.4f} ± {rung['loss_error']:.4f}"]
        cells += [f"+{rung['octave_down']:.4f}", f"+{rung['octave_up']:.4f}", str(rung["seeds"])]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Optima in log2 of the base learning rate, losses in nats per token. A `≤` or `≥` marks a bound."]
    lost = _diverged(rungs, axes)
    return [*lines, "", "Diverged:", "", *(f"- {line}" for line in lost)] if lost else lines


def _at_the_target(data: dict[str, Any]) -> list[str]:
    drift, regret = data["drift"], data["regret"]
    low, high = drift["interval"]
    lines = ["", "## At the target", ""]
    lines.append(
        f"- The best base rate is expected {drift['distance']:+.2f} octaves from the transferred one "
        f"({low:+.2f} to {high:+.2f}); further than an octave with {100 * drift['chance_beyond_an_octave']:.0f} %."
    )
    if regret is None:
        return [*lines, "- It is too far from the ladder to say what the transferred rate costs there."]
    lines.append(
        f"- The transferred rate is expected to cost {regret['transferred']:.4f} nats per token "
        f"({regret['low']:.4f} to {regret['high']:.4f}); an octave lower {regret['octave_down']:.4f}, "
        f"an octave higher {regret['octave_up']:.4f}."
    )
    lines.append(
        f"- Least expected cost: base rate {regret['recommended_learning_rate']:.5g} "
        f"({regret['offset']:+.2f} octaves), {regret['recommended']:.4f} nats per token."
    )
    return [*lines, f"- {price[0].upper()}{price[1:]}."] if (price := _price(regret)) else lines


def _difference_row(difference: dict[str, Any]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "—"
        return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)

    return (
        "| " + " | ".join(cell(difference[key]) for key in ("axis", "proxy", "target", "ratio", "measured_to")) + " |"
    )


def _plain(words: str) -> str:
    """Somebody's words, which mean nothing to Markdown."""
    return re.sub(r"([|<>`])", r"\\\1", words)


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
