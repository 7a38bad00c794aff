"""Which rung decided a verdict, and which one more would settle it, if it came out where the ladder expects it."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from mutune.certificate.assessment import Assessment
from mutune.certificate.drift import extrapolate
from mutune.certificate.points import AXES
from mutune.certificate.valleys import Fit, Valleys

SETTLED_SEEDS = 2


def settling_rung(assessment: Assessment, settled: Callable[[Assessment], bool]) -> str:
    """The cheapest wider rung after which `settled` holds, in words with its price; empty where none does."""
    rungs = assessment.valleys.rungs
    widest, target = float(rungs["width"].max()), assessment.target["width"]
    base = rungs.iloc[assessment.base]
    rates = int(assessment.points.groupby(list(AXES)).learning_rate.nunique().median())
    for half_doublings in range(1, 1 + math.floor(2 * math.log2(target / widest))) if target > widest else []:
        rung = {axis: float(base[axis]) for axis in AXES} | {"width": float(round(widest * 2 ** (half_doublings / 2)))}
        if settled(what_if(assessment, rung)):
            runs = rates * SETTLED_SEEDS
            share = runs * cost(rung) / cost(assessment.target)
            if share >= 1:  # the target itself would be cheaper
                return ""
            return (
                f"one rung at width {rung['width']:,.0f}, {SETTLED_SEEDS} seeds and {rates} rates ({runs} runs, about "
                f"{share:.2g} of the target's FLOPs), if its optimum is where this ladder expects it"
            )
    return ""


def deciding_rung(assessment: Assessment) -> tuple[dict[str, float], float] | None:
    """The rung without which the target's optimum would be expected furthest from where it is, and by how many octaves.

    None with fewer than two rungs besides the base.
    """
    valleys, drift = assessment.valleys, assessment.drift
    others = [i for i in range(len(valleys.rungs)) if i != assessment.base]
    if drift is None or len(others) < 2:
        return None
    middle, shifts = drift.quantiles(assessment.distance)[1], {}
    for i in others:
        base = assessment.base - (i < assessment.base)
        rest = extrapolate(_without(valleys, i), base, assessment.target, assessment.slopes)
        if rest is not None:
            shifts[i] = rest.quantiles(rest.target - assessment.log2_rate)[1] - middle
    if not shifts:
        return None
    found = max(shifts, key=lambda i: abs(shifts[i]))
    return {axis: float(valleys.rungs[axis].iloc[found]) for axis in AXES}, shifts[found]


def cost(rung: dict[str, float]) -> float:
    """Of one run, up to a factor: parameters inside the blocks, which go as width² × depth, times tokens."""
    return rung["width"] ** 2 * rung["depth"] * rung["tokens"]


def what_if(assessment: Assessment, rung: dict[str, float]) -> Assessment:
    """The assessment with one rung more, as well measured as the others are, at its expected optimum."""
    before = assessment.valleys
    expected = extrapolate(before, assessment.base, rung)
    assert expected is not None
    optimum = expected.quantiles(expected.target)[1]
    valleys = Valleys(
        rungs=pd.concat([before.rungs, pd.DataFrame([rung])], ignore_index=True),
        edges=(*before.edges, None),
        bounds=np.append(before.bounds, optimum),
        fits=tuple(_with_rung(fit, optimum) for fit in before.fits),
        weights=before.weights,
    )
    drift = extrapolate(valleys, assessment.base, assessment.target, assessment.slopes)
    return replace(assessment, valleys=valleys, drift=drift)


def _without(valleys: Valleys, i: int) -> Valleys:
    """The valleys without one rung, whose share in the common form stays."""
    keep = np.arange(len(valleys.rungs)) != i
    fits = tuple(
        replace(fit, optima=fit.optima[keep], covariance=fit.covariance[np.ix_(keep, keep)]) for fit in valleys.fits
    )
    edges = tuple(edge for edge, kept in zip(valleys.edges, keep, strict=True) if kept)
    rungs = valleys.rungs[keep].reset_index(drop=True)
    return Valleys(rungs, edges, valleys.bounds[keep], fits, valleys.weights)


def _with_rung(fit: Fit, optimum: float) -> Fit:
    size = len(fit.optima)
    covariance = np.zeros((size + 1, size + 1))
    covariance[:size, :size] = fit.covariance
    covariance[size, size] = np.median(np.diag(fit.covariance))
    return replace(fit, optima=np.append(fit.optima, optimum), covariance=covariance)
