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

from mutune.certificate.assessment import Assessment
from mutune.certificate.config import Prediction
from mutune.certificate.points import AXES
from mutune.certificate.regret import penalties
from mutune.certificate.rungs import place
from mutune.compose import plain
from mutune.files import write_json
from mutune.scaling.power_law import Forecast, forecast
from mutune.training.config import RunSpec

PUBLISHED = Prediction("published values come without a ladder")
MIN_RUNGS = 5
MAX_DOUBLINGS = 2.0  # past the widest rung, and no further than the ladder is long; calibrated up to there
LEVEL = 0.9
LEAST_ERROR = 3e-5  # of the loss; seeds that agree by chance do not make it exact
OUTSIDE = 1.0  # octaves past the tried rates at which a loss is still foretold
RISE = 3.0  # standard errors by which the widest rung may lie above the narrowest
#: Of the loop, what a held-out loss hangs on.
LOOP = ("clip_norm", "heldout_windows", "dtype")


def predict_target(proxy: RunSpec, target: RunSpec, assessment: Assessment) -> Prediction:
    """The prediction for a target of a ladder, or why there is none.

    Args:
        proxy: the study's run at the transferred values.
        assessment: of the ladder; its rungs that differ from the proxy's run in width alone count.
    """
    if differing := unmodelled(proxy, target):
        return Prediction(
            f"the target differs from the study's run in more than the width ({', '.join(differing)}), and its loss "
            "with it"
        )
    return predict_at(assessment, place(proxy) | {"width": float(target.model.width)})


def predict_at(assessment: Assessment, target: Mapping[str, float]) -> Prediction:
    """The prediction of a run at `target`, from the rungs that differ from it in width alone, or why there is none.

    Where every width was run at the transferred rate, by the same seeds, it is of those losses; else of the fitted
    valleys' bottoms, and what the transferred rate is expected to cost above the target's.
    """
    points, others = assessment.points, [axis for axis in AXES if axis != "width"]
    alike = np.logical_and.reduce([points[axis] == target[axis] for axis in others])
    if not alike.any():
        odd = (
            " and ".join(axis for axis in others if not (points[axis] == target[axis]).any()) or "several axes at once"
        )
        return Prediction(f"the target differs from every rung in {odd}, and its loss with it")
    at_rate = np.isclose(np.log2(points.learning_rate) - assessment.log2_rate, 0.0, atol=1e-6)
    losses: dict[float, list[float]] = {}
    for width in sorted(points.width[alike].unique().tolist()):
        mine = points[alike & at_rate & (points.width == width)].sort_values("seed")
        if mine.diverged.any():
            return Prediction(f"a run of width {width:g} at the transferred rate diverged")
        losses[width] = mine.loss.tolist()
    if len(losses) < MIN_RUNGS:
        return Prediction(_few(len(losses)))
    fewest = min(map(len, losses.values()))  # a ladder by design has more seeds where they pay
    if fewest > 1:
        return predict({width: found[:fewest] for width, found in losses.items()}, target["width"])
    return _predict_fitted(assessment, target)


def _predict_fitted(assessment: Assessment, target: Mapping[str, float]) -> Prediction:
    """From the fitted bottoms, which follow a power law where losses at one rate need not; the fit says how sure they
    are.
    """
    if assessment.drift is None or any(assessment.valleys.edges):
        return Prediction("an optimum is not inside the tried rates")
    rates = np.log2(assessment.points.learning_rate)
    if not rates.min() - OUTSIDE <= assessment.log2_rate <= rates.max() + OUTSIDE:
        return Prediction("the transferred rate lies outside those that were tried")
    valleys, means, errors = assessment.valleys, {}, []
    for i, rung in enumerate(valleys.rungs.to_dict("records")):
        if all(rung[axis] == target[axis] for axis in AXES if axis != "width"):
            means[float(rung["width"])] = float(valleys.levels[i])
            errors.append(float(valleys.level_errors[i]))
    noise = float(valleys.weights @ [fit.noise for fit in valleys.fits])
    freedom = int(min(fit.freedom for fit in valleys.fits))
    least = LEAST_ERROR * abs(fmean(means.values()))
    ladder = _Ladder(means, max(noise, least), max(fmean(errors), least), freedom)
    above = penalties(valleys, assessment.drift, assessment.nearest("width"), assessment.log2_rate)
    return _predict(ladder, target["width"], (above, assessment.drift.weights))


def predict(losses: Mapping[float, Sequence[float]], size: float) -> Prediction:
    """The loss of one new run at `size`, from finite losses by size and seed, at one rate; or why there is none.

    The noise is the spread over seeds, pooled over the rungs.
    """
    if reason := _unusable(losses):
        return Prediction(reason)
    return _predict(_Ladder.of(losses), size)


def _predict(
    ladder: "_Ladder", size: float, above: tuple[np.ndarray, np.ndarray] = (np.zeros(1), np.ones(1))
) -> Prediction:
    """Of a ladder's losses.

    Args:
        above: draws, and their weights, of what the run is expected to lose above the ladder's losses.
    """
    if reason := _too_little(ladder, size):
        return Prediction(reason)
    future, largest = ladder.forecast(size), max(ladder.means)
    rest = ladder.without(largest).forecast(largest, run_error=ladder.error)
    left_out, tail = ladder.means[largest], 0.5 - LEVEL / 2
    low, middle, high = (future.plus(*above, share) for share in (tail, 0.5, 1 - tail))
    return Prediction(
        loss=middle,
        low=low,
        high=high,
        level=LEVEL,
        exponent=future.exponent,
        floor=future.floor,
        left_out=left_out - rest.quantile(0.5),
        left_out_inside=rest.quantile(tail) <= left_out <= rest.quantile(1 - tail),
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
    ours, theirs = proxy.loop.settled(), target.loop.settled()
    return found + [f"loop.{name}" for name in LOOP if getattr(ours, name) != getattr(theirs, name)]


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
    """Losses by size, their common standard error, and the noise of one run with its degrees of freedom."""

    means: dict[float, float]
    run_error: float
    error: float
    freedom: int

    @classmethod
    def of(cls, losses: Mapping[float, Sequence[float]]) -> "_Ladder":
        """Of runs by seed."""
        seeds = len(next(iter(losses.values())))
        means = {size: fmean(values) for size, values in losses.items()}
        least = LEAST_ERROR * abs(fmean(means.values()))
        noise = max(math.sqrt(fmean(variance(values) for values in losses.values())), least)
        return cls(means, noise, noise / math.sqrt(seeds), len(losses) * (seeds - 1))

    def without(self, size: float) -> "_Ladder":
        """The rungs but one, the noise of all."""
        return replace(self, means={other: mean for other, mean in self.means.items() if other != size})

    def forecast(self, size: float, run_error: float | None = None) -> Forecast:
        """Of one new run at `size`, or of what is known to `run_error`."""
        error = self.run_error if run_error is None else run_error
        return forecast(list(self.means), list(self.means.values()), self.error, self.freedom, size, error)


def _unusable(losses: Mapping[float, Sequence[float]]) -> str:
    """Why these losses say nothing of the noise; empty where they do."""
    if len(losses) < MIN_RUNGS:
        return _few(len(losses))
    seeds = {len(values) for values in losses.values()}
    if seeds == {1}:
        return "one seed tells nothing of the noise; set ladder.seeds=2"
    if len(seeds) > 1 or not all(math.isfinite(value) for values in losses.values() for value in values):
        return "a rung lacks the loss of a seed"
    return ""


def _few(count: int) -> str:
    return f"{count} rungs are too few for a prediction; {MIN_RUNGS} or more would do"


def _too_little(ladder: _Ladder, size: float) -> str:
    """Why this ladder predicts nothing; empty where it does."""
    if len(ladder.means) < MIN_RUNGS:
        return _few(len(ladder.means))
    if min(ladder.means.values()) <= 0:
        return "a loss of 0 or below is no cross-entropy, and follows no power law towards a floor above 0"
    smallest, largest = min(ladder.means), max(ladder.means)
    most = largest * min(largest / smallest, 2**MAX_DOUBLINGS)
    if size > most * (1 + 1e-9) or size < smallest:
        return (
            f"the target's width of {size:g} is not within {smallest:g}-{most:.0f}, which is as far as a ladder of "
            f"{smallest:g}-{largest:g} predicts"
        )
    rise = ladder.means[largest] - ladder.means[smallest]
    if rise > RISE * ladder.error * math.sqrt(2):
        return f"the loss rises by {rise:.4f} from the narrowest to the widest rung, where a power law only falls"
    return ""


def _differing(part: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> list[str]:
    return [f"{part}.{key} ({ours[key]} → {theirs[key]})" for key in ours if ours[key] != theirs[key]]


def _stages(spec: RunSpec) -> str:
    return " + ".join(f"{s.num_steps}×{s.batch_sequences}×{s.context_length} tokens" for s in spec.stages)
