"""The certificate of somebody's finished runs, and the drift statement of somebody's optima. Nothing is trained."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from mutune.certificate.assessment import Assessment, assess
from mutune.certificate.certificate import certificate
from mutune.certificate.comparison import compare, comparison
from mutune.certificate.config import PriceConfig
from mutune.certificate.drift import extrapolate
from mutune.certificate.laws import law_slopes, rate_rows
from mutune.certificate.points import AXES
from mutune.certificate.prediction import predict_at
from mutune.certificate.table import Table
from mutune.certificate.valleys import Fit, Valleys
from mutune.certificate.verdict import Case, Verdict, judge
from mutune.errors import require
from mutune.scaling.horizon import HorizonConfig, Scale

FLOPS_PER_PARAMETER = 6.0  # of training, per token and parameter without embeddings (arXiv:2001.08361, section 2.1)
EXAMPLES = {"depth": 24, "tokens": "1e9", "batch": 65536}  # of a column
OPTIMUM_ERROR = 0.25  # octaves: what an optimum that comes without its runs is taken to be known to


@dataclass(frozen=True)
class Asked:
    """What is asked of a table of runs.

    Attributes:
        target: the axes that are asked about; else twice the largest width, and the largest of the others.
        learning_rate: the transferred base rate; None takes the optimum of the narrowest width.
        parameters: of the target, without embeddings; None leaves its FLOPs out.
        prices: for the regret.
        horizon: laws for an axis that the runs do not vary and the target differs in.
    """

    target: dict[str, float] = field(default_factory=dict)
    learning_rate: float | None = None
    parameters: float | None = None
    prices: PriceConfig = field(default_factory=PriceConfig)
    horizon: HorizonConfig = field(default_factory=HorizonConfig)


def from_runs(tables: dict[str, Table], asked: Asked, source: str) -> dict[str, Any]:
    """The certificate of the table of runs; of several parametrizations, that of the best-transferring, compared."""
    used = {name: table for name, table in tables.items() if len(table.points) > 0}
    left_out = [note for table in tables.values() for note in table.dropped]
    require(
        bool(used), f"runs={source} has no width with three finished rates ({'; '.join(left_out)}); add rates to them."
    )
    _check_columns(used, asked, source)
    largest = {axis: max(float(table.points[axis].max()) for table in used.values()) for axis in AXES}
    assessments = {name: _assess(table, asked, largest) for name, table in used.items()}
    rows = compare(assessments)
    best = rows[0]["table"]
    assessment = assessments[best]
    verdict = judge(Case([], assessment, None))
    price = assessment.price(asked.parameters and FLOPS_PER_PARAMETER * asked.parameters, asked.prices)
    target = {axis: assessment.target[axis] for axis in assessment.axes}
    target |= {"parameters": asked.parameters} if asked.parameters else {}
    data = certificate(target, 2.0**assessment.log2_rate, best or None, verdict, [], assessment, price)
    data["prediction"] = asdict(predict_at(assessment, assessment.target))
    if laws := _laws(assessment, asked):
        data["laws"] = laws
    data["notes"] = [f"left out: {note}" for note in left_out]
    if len(used) > 1:
        told = sum(row["regret"] is not None for row in rows)
        why = f"which transfers best of {told}" if told else "not told from the others"
        why = "whose runs alone come near enough to the target to say how it transfers" if told == 1 else why
        data["notes"].insert(0, f"the verdict is that of table {best}, {why}")
        data |= comparison(rows)
    return data


def _laws(assessment: Assessment, asked: Asked) -> dict[str, Any]:
    """The laws of tokens and batch side by side, where no run varies one and the target differs in it; else nothing."""
    if not {"tokens", "batch"} & {*assessment.unmeasured}:
        return {}
    base, target = assessment.valleys.rungs.iloc[assessment.base].to_dict(), assessment.target
    size = int(asked.parameters or 1)  # the same at both: their tables take care of the width
    ours, theirs = (Scale(int(place["tokens"]), int(place["batch"]), size) for place in (base, target))
    measured = [axis for axis in AXES if assessment.measured(axis) > 1]
    return {"measured": measured, "rate": rate_rows(asked.horizon, ours, theirs), "decay": []}


def _check_columns(tables: dict[str, Table], asked: Asked, source: str) -> None:
    """What is asked about must be a column."""
    for axis in [*asked.target, *(["tokens"] if asked.parameters else [])]:
        key = f"target_{axis}" if axis in asked.target else "target_parameters"
        require(
            all(axis in table.axes for table in tables.values()),
            f"{key}= asks about {axis}, and runs={source} has no column {axis}; add it, for example with "
            f"{EXAMPLES.get(axis)} in every row, or leave {key} out.",
        )


def runs_hash(data: dict[str, Any]) -> str:
    """Of the runs or optima that a certificate is of, whatever their file is called."""
    rungs = [{key: rung[key] for key in (*AXES, "points")} for rung in data["rungs"]]
    found = [rungs, data.get("optima"), data.get("comparison")]
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]


def _assess(table: Table, asked: Asked, largest: dict[str, float]) -> Assessment:
    """A table's; `largest` of every axis among all tables, which are asked about the same target."""
    points = table.points
    base = dict(zip(AXES, map(float, points[list(AXES)].sort_values(list(AXES)).iloc[0]), strict=True))
    target = largest | {"width": 2 * largest["width"]} | asked.target
    laws = law_slopes(asked.horizon, [axis for axis in AXES if points[axis].nunique() > 1])
    return assess(points, base, target, asked.learning_rate, laws, table.axes)


def from_optima(optima: dict[float, float], asked: Asked, source: str) -> dict[str, Any]:
    """How far the optima move, NOT CERTIFIED: without the runs nobody knows how sure they are."""
    widths = np.array(list(optima), float)
    rungs = pd.DataFrame({axis: widths if axis == "width" else np.ones(len(widths)) for axis in AXES})
    rates = np.log2(list(optima.values()))
    none = np.zeros(len(widths))
    covariance = OPTIMUM_ERROR**2 * np.eye(len(widths))
    fit = Fit(1.0, rates, covariance, 30.0, 0.0, none, none, none, none, 0.0, 0.0)
    valleys = Valleys(rungs, (None,) * len(widths), rates, (fit,), np.ones(1))
    target = dict.fromkeys(AXES, 1.0) | {"width": 2 * float(widths.max())} | asked.target
    log2_rate = float(rates[0] if asked.learning_rate is None else np.log2(asked.learning_rate))
    drift = extrapolate(valleys, 0, target)
    points = pd.DataFrame({"seed": [], "loss": [], **{axis: [] for axis in AXES}})
    assessment = Assessment(points, ("width",), target, 0, log2_rate, None, valleys, drift, None)
    assert drift is not None
    low, middle, high = drift.quantiles(drift.slopes[:, 0])
    near = drift.quantiles(assessment.distance)
    verdict = Verdict(
        "NOT CERTIFIED",
        [
            f"optima alone do not say how sure they are; each is taken as known to {OPTIMUM_ERROR:g} octaves",
            f"over widths {widths.min():g}-{widths.max():g} the optimum moves {middle:+.2f} ({low:+.2f} to "
            f"{high:+.2f}) octaves per doubling; at width {target['width']:g} it is expected {near[1]:+.2f} "
            f"({near[0]:+.2f} to {near[2]:+.2f}) octaves from {2.0**log2_rate:.4g}",
        ],
        ["the runs behind the optima: python -m mutune.transfer runs=<file with width,lr,loss,seed>"],
    )
    data = certificate({"width": target["width"]}, 2.0**log2_rate, None, verdict, [], None)
    return {**data, "source": source, "optima": [{"width": w, "learning_rate": r} for w, r in optima.items()]}
