"""Published laws of tokens and batch in a certificate: a prior where nothing was measured, and a table to read."""

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from mutune.certificate.drift import Slope
from mutune.scaling.horizon import RATE, HorizonConfig, Scale, axis_priors, decay_table, shifts
from mutune.training.config import RunSpec, total_tokens
from mutune.training.price import price


def law_slopes(config: HorizonConfig, measured: Collection[str]) -> dict[str, Slope]:
    """What the laws say of every axis that the ladder did not measure; their disagreement is in its sd."""
    return {prior.axis: Slope(prior.mean, prior.sd) for prior in axis_priors(config, measured)}


def law_table(config: HorizonConfig, proxy: RunSpec, target: RunSpec, measured: Collection[str]) -> dict[str, Any]:
    """Rate and decay at the target by each law, side by side, and which axes were measured instead."""
    ours, theirs = scale(proxy), scale(target)
    (mine, rate), (its, target_rate) = _decay(proxy), _decay(target)
    decays = decay_table(config, ours, theirs, proxy_rate_decay=mine * rate, target_rate=target_rate, target_decay=its)
    rates = rate_rows(config, ours, theirs)
    return {"measured": sorted(measured), "rate": rates, "decay": [asdict(row) for row in decays]}


def rate_rows(config: HorizonConfig, ours: Scale, theirs: Scale) -> list[dict[str, Any]]:
    """How far each law moves the best rate between two runs, in octaves."""
    return [
        {
            "law": shift.law.name,
            "formula": shift.law.formula,
            "source": shift.law.source,
            "octaves": shift.octaves,
            "silent_on": list(shift.silent_on),
        }
        for shift in shifts(config, RATE, ours, theirs)
    ]


def scale(spec: RunSpec) -> Scale:
    """Tokens, batch and parameters of a run; a batch that changes counts with its mean."""
    tokens = total_tokens(spec.stages)
    return Scale(tokens, tokens / spec.num_steps, price(spec).parameters)


def law_words(table: dict[str, Any]) -> list[str]:
    """The table as Markdown; none where nothing differs."""
    lines = []
    if any(row["octaves"] or row["silent_on"] for row in table["rate"]):
        lines += [
            "",
            "## Laws of tokens and batch",
            "",
            "| law | best rate at the target, octaves | silent on | source |",
        ]
        lines.append("|---|---|---|---|")
        for row in table["rate"]:
            silent = ", ".join(row["silent_on"]) or "—"
            lines.append(f"| {row['formula']} | {row['octaves']:+.2f} | {silent} | {row['source']} |")
        what = ", ".join(table["measured"])
        lines += [
            "",
            f"The ladder measured {what}, and the laws are not used for it." if what else "None was measured.",
        ]
    if len(table["decay"]) > 1:
        lines += [
            "",
            "| weight decay by | λ of a hidden matrix | octaves from the given | timescale, share of the run |",
        ]
        lines.append("|---|---|---|---|")
        lines += [
            f"| {row['law']} | {row['weight_decay']:.4g} | {row['octaves']:+.2f} | {row['timescale']:.3g} |"
            for row in table["decay"]
        ]
    return lines


def _decay(spec: RunSpec) -> tuple[float, float]:
    """λ and η of a hidden matrix, as the plan has them."""
    plan = spec.plan(spec.tokenizer.num_ids)
    hidden = next(row for row in plan.parameters.values() if row.role == "hidden")
    return hidden.weight_decay, hidden.peak_lr
