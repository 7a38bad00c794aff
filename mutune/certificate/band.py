"""The target's training loss along its run, foretold from the ladder's curves before the target runs. No torch.

At a fraction x of the run, L(w, x) = E(x) + a(x)·w^-α(x): the rungs make the same steps by the same schedule, so that
`scaling.power_law.forecast` continues their smoothed losses at every x as it does the held-out losses at the end. What
is foretold is one smoothed training loss of one run: the batches that it is a mean over are part of its spread. Runs of
one seed see the same batches at every width, which moves them all together.

Shapes: R runs, N steps, F fractions, W widths, P coefficients.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from mutune.certificate.config import Prediction
from mutune.certificate.ladder import LadderRun
from mutune.certificate.prediction import LEAST_ERROR, MIN_RUNGS, RISE
from mutune.scaling.power_law import Forecast, forecast
from mutune.training.config import RunSpec
from mutune.training.result import METRICS, smoothing

Array = npt.NDArray[np.float64]

COUNT = 20  # fractions, evenly spaced in their logarithm: losses bend most where they fall first
LEVEL = 0.99  # of one smoothed loss: a curve is held against many of them
NEAR = 1.5  # octaves from the transferred rate within which runs tell of it
NEIGHBOURS = 2  # fractions on each side whose noise counts as this one's
MIN_FREEDOM = 2  # degrees of freedom of the noise


@dataclass(frozen=True)
class Curves:
    """Training losses of finished runs that differ in width, rate and seed alone.

    Attributes:
        widths, seeds: (R,).
        octaves: (R,), from the transferred rate.
        losses: (R, N), nats per token, of every step.
        warmup: steps of the warm-up, of which nothing is foretold.
    """

    widths: Array
    octaves: Array
    seeds: Array
    losses: Array
    warmup: int

    def at_rate(self) -> "Curves":
        """The runs at the transferred rate, by the seeds that every width has there, where these are two or more; else
        all that are near it.
        """
        mine = np.isclose(self.octaves, 0.0, atol=1e-6)
        found = [set(self.seeds[mine & (self.widths == width)].tolist()) for width in np.unique(self.widths)]
        common = set.intersection(*found) if found else set()
        if len(common) > 1:
            return self._only(mine & np.isin(self.seeds, list(common)))
        return self._only(np.abs(self.octaves) <= NEAR + 1e-6)

    def _only(self, rows: npt.NDArray[np.bool_]) -> "Curves":
        parts = {name: getattr(self, name)[rows] for name in ("widths", "octaves", "seeds", "losses")}
        return replace(self, **parts)


def with_band(prediction: Prediction, runs: Sequence[LadderRun], target: RunSpec) -> Prediction:
    """The prediction with its band, where there is a number and the runs' curves tell of one.

    Args:
        prediction: of `target`'s loss.
        runs: finished ones of its ladder; those that differ from the target in width, rate and seed alone count.
    """
    if prediction.loss is None:
        return prediction
    rate = target.hyperparameters.learning_rate
    curves = read_curves([run for run in runs if _alike(run.spec, target)], rate)
    band = foretell(curves, float(target.model.width)) if curves else []
    return replace(prediction, band=band or None)


def foretell(curves: Curves, size: float, level: float = LEVEL) -> list[list[float]]:
    """[fraction, low, median, high] of a run of this width, from after its warm-up to its end; nothing where the curves
    do not tell.

    The smoothed loss at a fraction x is the mean of the last `smoothing(N)` steps up to x·N; it lies between low and
    high with probability `level`.
    """
    used = curves.at_rate()
    ends = _ends(used.losses.shape[1], used.warmup)
    levels = _levels(used, ends)
    if levels is None:
        return []
    rows, tail = [], 0.5 - level / 2
    for i, end in enumerate(ends):
        if (future := levels.forecast(i, size)) is not None:
            quantiles = [max(0.0, future.quantile(share)) for share in (tail, 0.5, 1 - tail)]
            rows.append([round(float(end) / used.losses.shape[1], 6), *(round(value, 5) for value in quantiles)])
    return rows


def band_at(prediction: Prediction | None, num_steps: int) -> Callable[[int], tuple[float, float] | None]:
    """Steps done → (low, high) of the training loss smoothed over the last `smoothing(num_steps)` of them.

    None before the first fraction of the band, and everywhere where there is no band.
    """
    if prediction is None or not prediction.band:
        return lambda step: None
    fractions, low, _, high = np.asarray(prediction.band, dtype=float).T

    def at(step: int) -> tuple[float, float] | None:
        fraction = step / num_steps
        if fraction < fractions[0] - 1e-6:
            return None
        return float(np.interp(fraction, fractions, low)), float(np.interp(fraction, fractions, high))

    return at


def read_curves(runs: Sequence[LadderRun], learning_rate: float) -> Curves | None:
    """What the folders of these runs hold; one that is damaged or did not reach its end is left out. None of none."""
    rows, losses = [], []
    for run in runs:
        found = _losses(run)
        if len(found) == run.spec.num_steps and all(map(math.isfinite, found)):
            octaves = math.log2(run.spec.hyperparameters.learning_rate / learning_rate)
            rows.append((run.spec.model.width, octaves, run.spec.seed))
            losses.append(found)
    if not rows:
        return None
    widths, octaves, seeds = np.array(rows, dtype=float).T
    spec = runs[0].spec
    return Curves(widths, octaves, seeds, np.array(losses, dtype=float), spec.schedule.warmup(spec.num_steps))


def _losses(run: LadderRun) -> list[float]:
    try:
        lines = (run.directory / METRICS).read_text().splitlines()
        return [float(json.loads(line)["loss"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _alike(spec: RunSpec, target: RunSpec) -> bool:
    """Whether a rung differs from the target, whose prediction has a number, in width, rate and seed alone."""
    return (spec.model.depth, spec.stages) == (target.model.depth, target.stages)


def _ends(num_steps: int, warmup: int) -> npt.NDArray[np.int64]:
    """(F,) the last step of each window; the first is the first that has no warm-up in it."""
    first = min(num_steps, warmup + smoothing(num_steps))
    return np.unique(np.geomspace(first, num_steps, COUNT).round().astype(np.int64))


def smoothed(losses: Array, ends: npt.NDArray[np.int64]) -> Array:
    """(R, N) → (R, F): means of the `smoothing(N)` steps up to each end."""
    total = np.pad(np.cumsum(losses, axis=1), ((0, 0), (1, 0)))
    window = smoothing(losses.shape[1])
    return np.asarray((total[:, ends] - total[:, ends - window]) / window)


@dataclass(frozen=True)
class _Levels:
    """Smoothed losses at the transferred rate.

    Attributes:
        widths: (W,). means: (W, F), over the seeds.
        error: (F,) standard error of each, but for what moves all widths together.
        noise: (F,) of one run among those of its seed. shift: (F,) of a seed, which moves all widths together.
        share: variance of the ladder's mean shift, in that of one seed.
        freedom: of the noise.
    """

    widths: Array
    means: Array
    error: Array
    noise: Array
    shift: Array
    share: float
    freedom: int

    def forecast(self, i: int, size: float) -> Forecast | None:
        """Of one new run at the fraction i; None where the losses rise with the width."""
        least = LEAST_ERROR * float(self.means[:, i].mean())
        error, noise = max(float(self.error[i]), least), max(float(self.noise[i]), least)
        if self.means[-1, i] - self.means[0, i] > RISE * error * math.sqrt(2):
            return None
        run_error = math.sqrt(noise**2 + (1.0 + self.share) * float(self.shift[i]) ** 2)
        return forecast(self.widths.tolist(), self.means[:, i].tolist(), error, self.freedom, size, run_error)


def _levels(curves: Curves, ends: npt.NDArray[np.int64]) -> _Levels | None:
    """Least squares: a level for each width and a shift for each seed; where rates differ, a slope for each width and
    one curvature. None where that leaves too little to tell the noise by, or a width was not run on both sides.
    """
    widths = np.unique(curves.widths)
    seeds, counts = np.unique(curves.seeds, return_counts=True)
    beside = [curves.octaves[curves.widths == width] for width in widths]
    if len(widths) < MIN_RUNGS or len(seeds) < 2 or any(o.min() > 1e-6 or o.max() < -1e-6 for o in beside):
        return None
    mine = (curves.widths[:, None] == widths).astype(float)  # R, W
    octaves = curves.octaves[:, None]
    moved = [mine * octaves, octaves**2] if np.ptp(curves.octaves) > 1e-6 else []
    shifts = (curves.seeds[:, None] == seeds[:-1]) - (curves.seeds[:, None] == seeds[-1]) * counts[:-1] / counts[-1]
    design = np.hstack([mine, *moved, shifts])  # R, P; shifts are 0 in the mean over runs
    freedom = len(design) - design.shape[1]
    if freedom < MIN_FREEDOM or np.linalg.matrix_rank(design) < design.shape[1]:  # as with one rate on either side
        return None
    losses = smoothed(curves.losses, ends)
    inverse = np.linalg.pinv(design)
    found = inverse @ losses  # P, F
    noise = np.sqrt(_among((losses - design @ found) ** 2).sum(axis=0) / freedom)
    spread = np.sqrt((inverse[: len(widths)] ** 2).sum(axis=1).mean())
    own = found[1 - len(seeds) :]
    all_shifts = np.vstack([own, -(counts[:-1, None] * own).sum(axis=0) / counts[-1]])
    shift = np.sqrt(np.maximum(_among(all_shifts.var(axis=0, ddof=1)), _batches(curves, ends)))
    share = float(((counts / counts.sum()) ** 2).sum())
    return _Levels(widths, found[: len(widths)], spread * noise, noise, shift, share, freedom)


def _among(squares: Array) -> Array:
    """(..., F): each in the mean with its neighbours: few runs tell little of one fraction, and noise varies slowly."""
    padded = np.pad(squares, [(0, 0)] * (squares.ndim - 1) + [(NEIGHBOURS, NEIGHBOURS)], mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, 2 * NEIGHBOURS + 1, axis=-1).mean(axis=-1)


def _batches(curves: Curves, ends: npt.NDArray[np.int64]) -> Array:
    """(F,) variance of a smoothed loss by the choice of its batches, from the losses' jumps from step to step."""
    jumps = np.diff(curves.losses, axis=1, prepend=curves.losses[:, :1]) ** 2 / 2
    return np.asarray(smoothed(jumps, ends).mean(axis=0) / smoothing(curves.losses.shape[1]))
