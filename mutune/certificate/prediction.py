"""The target's loss, predicted from the ladder before the target runs, and compared with the outcome after.

The ladder changes the width alone, at the same data and steps, so that L(w) = E + a·w^-α. Size is the width: at fixed
depth and feed-forward ratio the parameters without embeddings go as w² and would give the same curve with half the
exponent, while all parameters, and FLOPs, hold the vocabulary's share, which falls with w.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np
import pandas as pd

from mutune.certificate.config import Prediction
from mutune.certificate.rungs import place
from mutune.compose import plain
from mutune.files import write_json
from mutune.scaling.power_law import Forecast, forecast
from mutune.training.config import RunSpec

PUBLISHED = Prediction("published values come without a ladder")
MIN_RUNGS = 5
MAX_DOUBLINGS = 2.0  # past the widest rung, and no further than the ladder is long; calibrated up to there
LEVEL = 0.9
LEAST_ERROR = 1e-4  # nats; seeds that agree by chance do not make a loss exact
RISE = 3.0  # standard errors by which the widest rung may lie above the narrowest
#: Of the loop, what a held-out loss hangs on.
LOOP = ("clip_norm", "heldout_windows")


def predict_target(proxy: RunSpec, target: RunSpec, points: pd.DataFrame) -> Prediction:
    """The prediction for a target of a ladder, or why there is none.

    Args:
        proxy: the study's run at the transferred values.
        points: the ladder's, as `points.COLUMNS`; those that differ from the proxy's run in width, rate and seed alone
            count.
    """
    if differing := unmodelled(proxy, target):
        return Prediction(
            f"the ladder measured the width alone, and the target also differs in {', '.join(differing)}: its loss is "
            "another quantity"
        )
    here = place(proxy)
    alike = np.logical_and.reduce([points[axis] == here[axis] for axis in ("depth", "tokens", "batch")])
    at_rate = np.isclose(np.log2(points.learning_rate / proxy.hyperparameters.learning_rate), 0.0, atol=1e-6)
    losses: dict[float, list[float]] = {}
    for width in sorted(points.width[alike].unique().tolist()):
        mine = points[alike & at_rate & (points.width == width)].sort_values("seed")
        if mine.empty:
            return Prediction(f"width {width:g} was not run at the transferred rate; put 0 into ladder.offsets")
        if mine.diverged.any():
            return Prediction(f"a run of width {width:g} at the transferred rate diverged")
        losses[width] = mine.loss.tolist()
    fewest = min(map(len, losses.values()))  # an adaptive ladder has more seeds where they pay
    return predict({width: found[:fewest] for width, found in losses.items()}, target.model.width)


def predict(losses: Mapping[float, Sequence[float]], size: float) -> Prediction:
    """The loss of one new run at `size`, from finite losses by size and seed, at one rate; or why there is none.

    The noise is the spread over seeds, pooled over the rungs.
    """
    if reason := _too_little(losses, size):
        return Prediction(reason)
    future = _Ladder.of(losses).forecast(size)
    largest = max(losses)
    rest = _Ladder.of(losses, without=largest).forecast(largest, runs=len(losses[largest]))
    left_out = fmean(losses[largest])
    return Prediction(
        loss=future.quantile(0.5),
        low=future.quantile(0.5 - LEVEL / 2),
        high=future.quantile(0.5 + LEVEL / 2),
        level=LEVEL,
        exponent=future.exponent,
        floor=future.floor,
        left_out=left_out - rest.quantile(0.5),
        left_out_inside=rest.quantile(0.5 - LEVEL / 2) <= left_out <= rest.quantile(0.5 + LEVEL / 2),
    )


def unmodelled(proxy: RunSpec, target: RunSpec) -> list[str]:
    """Everything but the width in which the target's run differs from the ladder's, as far as it moves the loss."""
    wide = replace(proxy.model, width=target.model.width, num_heads=1).ffn
    family = proxy.model.ffn_width_at(target.model.width) or wide
    found = [
        f"model.{name}"
        for name in ("depth", "positions", "activation", "tied")
        if getattr(proxy.model, name) != getattr(target.model, name)
    ]
    found += ["the head size"] if proxy.model.size_per_head != target.model.size_per_head else []
    found += ["the feed-forward ratio"] if abs(family - target.model.ffn) > 1 else []
    for part in ("data", "tokenizer", "schedule", "hyperparameters", "parametrization", "base"):
        found += _differing(part, plain(getattr(proxy, part)), plain(getattr(target, part)))
    if proxy.stages != target.stages:
        found.append(f"its stages ({_stages(proxy)} → {_stages(target)})")
    return found + [f"loop.{name}" for name in LOOP if getattr(proxy.loop, name) != getattr(target.loop, name)]


@dataclass(frozen=True)
class Outcome:
    """A prediction beside what a run lost.

    Attributes:
        run: the run's folder.
        seed: its seed.
        measured: its held-out loss at the end.
        inside: whether it lies in the interval; None where no number was given.
    """

    run: str
    seed: int
    prediction: Prediction
    measured: float
    inside: bool | None

    def __str__(self) -> str:
        said = self.prediction
        if said.loss is None:
            return f"nothing ({said.reason}), measured {self.measured:.4f}"
        where = "inside" if self.inside else "outside"
        return f"{said.loss:.4f} ({said.low:.4f}-{said.high:.4f}), measured {self.measured:.4f}: {where}"


def compare(prediction: Prediction, measured: float, run: str, seed: int) -> Outcome:
    """Hold a run's loss against what was predicted of it."""
    inside = None
    if prediction.low is not None and prediction.high is not None:
        inside = prediction.low <= measured <= prediction.high
    return Outcome(run, seed, prediction, measured, inside)


def outcomes(certificate: Path, seal: str) -> list[Any] | None:
    """What `outcome` of a certificate holds; None where it is gone, damaged, or not that of this seal."""
    try:
        data = json.loads(certificate.read_text())
        return list(data["outcome"]) if data["seal"] == seal else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def append_outcome(certificate: Path, seal: str, outcome: Outcome) -> bool:
    """Add an outcome to the certificate of this seal, in place of an earlier one of the same run; whether it is there.

    A certificate that is not that of the transfer file which the run was trained from is left alone.
    """
    if (known := outcomes(certificate, seal)) is None:
        return False
    new = {key: getattr(outcome, key) for key in ("run", "seed", "measured", "inside")}
    others = [other for other in known if not (isinstance(other, dict) and other.get("run") == outcome.run)]
    write_json(certificate, {**json.loads(certificate.read_text()), "outcome": [*others, new]})
    return True


@dataclass(frozen=True)
class _Ladder:
    """Mean losses by size, and the noise of one run with its degrees of freedom."""

    means: dict[float, float]
    run_error: float
    freedom: int
    seeds: int

    @classmethod
    def of(cls, losses: Mapping[float, Sequence[float]], without: float | None = None) -> "_Ladder":
        """Of a ladder, the noise always of all rungs."""
        seeds = len(next(iter(losses.values())))
        noise = math.sqrt(fmean(variance(values) for values in losses.values()))
        means = {size: fmean(values) for size, values in losses.items() if size != without}
        return cls(means, max(noise, LEAST_ERROR), len(losses) * (seeds - 1), seeds)

    def forecast(self, size: float, runs: int = 1) -> Forecast:
        """Of the mean of new runs at `size`."""
        error = self.run_error / math.sqrt(self.seeds)
        run_error = self.run_error / math.sqrt(runs)
        return forecast(list(self.means), list(self.means.values()), error, self.freedom, size, run_error)


def _too_little(losses: Mapping[float, Sequence[float]], size: float) -> str:
    """Why these losses predict nothing; empty where they do."""
    if len(losses) < MIN_RUNGS:
        return f"{len(losses)} rungs are too few for a prediction; {MIN_RUNGS} or more would do"
    seeds = {len(values) for values in losses.values()}
    if seeds == {1}:
        return "one seed tells nothing of the noise; set ladder.seeds=2"
    if len(seeds) > 1 or not all(math.isfinite(value) for values in losses.values() for value in values):
        return "a rung lacks the loss of a seed"
    smallest, largest = min(losses), max(losses)
    most = largest * min(largest / smallest, 2**MAX_DOUBLINGS)
    if size > most * (1 + 1e-9) or size < smallest:
        return (
            f"the target's width of {size:g} is not within {smallest:g}-{most:.0f}, which is as far as a ladder of "
            f"{smallest:g}-{largest:g} predicts"
        )
    rise = fmean(losses[largest]) - fmean(losses[smallest])
    if rise > RISE * _Ladder.of(losses).run_error * math.sqrt(2 / seeds.pop()):
        return f"the loss rises by {rise:.4f} from the narrowest to the widest rung, where a power law only falls"
    return ""


def _differing(part: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    return [f"{part}.{key} ({ours[key]} → {theirs[key]})" for key in ours if ours[key] != theirs[key]]


def _stages(spec: RunSpec) -> str:
    return " + ".join(f"{s.num_steps}×{s.batch_sequences}×{s.context_length} tokens" for s in spec.stages)
