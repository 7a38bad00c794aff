"""Whether losses depend on the rate at all, before any valley is fitted to them."""

from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from mutune.certificate.points import AXES

CLIP = 3.0  # times as far above the lowest loss as the median is
SHUFFLES, FEWER, MANY = 1999, 499, 2000  # how often losses change places; more runs than `MANY` fewer times
AT_ONCE = 2_000_000  # numbers that are shuffled together


def chance_of_none(points: pd.DataFrame) -> float:
    """The chance that losses which do not depend on the rate would look as if they did: a permutation test.

    A rung's losses of one seed change places among its rates. Two things are asked: how much of them is explained by
    parabolas in the log2 rate, all of one curvature, upwards, and each with its own slope; and what all rungs have in
    common at the same rates. Neither assumes how losses scatter, or that a valley is a parabola. Losses far above the
    median are clipped. The smaller chance counts, twice; 0 where there is nothing to ask.
    """
    finished = points[~points.diverged.to_numpy(bool)]
    finished = finished.assign(block=finished.groupby([*AXES, "seed"]).ngroup()).sort_values("block", kind="stable")
    finished = finished.reset_index(drop=True)
    rate, block = np.log2(finished.learning_rate.to_numpy(float)), finished.block.to_numpy()
    loss, rungs = finished.loss.to_numpy(float).copy(), finished.groupby(list(AXES)).ngroup().to_numpy()
    for rung in range(rungs.max() + 1):
        mine = rungs == rung
        lowest = loss[mine].min()
        loss[mine] = np.minimum(loss[mine], lowest + CLIP * (np.median(loss[mine]) - lowest))
    residual = _centred(loss, block)
    if not residual.any():
        return 1.0
    asked = [ask for ask in (_curves(rate, residual, block, rungs), _common(rate)) if ask]
    as_found = [float(ask(residual[None])[0]) for ask in asked]
    count, more = 0, np.zeros(len(asked))
    for shuffled in _shuffled(residual, block) if asked else ():
        count += len(shuffled)
        more += [np.sum(ask(shuffled) >= found * (1 - 1e-9)) for ask, found in zip(asked, as_found, strict=True)]
    return min(1.0, len(asked) * float((1 + more.min()) / (1 + count))) if asked else 0.0


Ask = Callable[[np.ndarray], np.ndarray]  # (shuffles, n) losses → (shuffles,) how much they look alike


def _curves(rate: np.ndarray, residual: np.ndarray, block: np.ndarray, rungs: np.ndarray) -> Ask | None:
    """How much parabolas explain of the rungs' losses, each rung's in units of its own; None where they would explain
    all whatever the losses were.
    """
    slopes, bends = [], []
    for rung in range(rungs.max() + 1):
        mine = rungs == rung
        whole, x = float(np.sum(residual[mine] ** 2)), rate[mine] - rate[mine].mean()
        basis, triangle = np.linalg.qr(np.column_stack([_centred(y, block[mine]) for y in (x, x**2)]))
        if whole == 0 or np.abs(np.diag(triangle)).min() < 1e-9 * max(1.0, np.abs(x).max() ** 2):
            continue
        slope, bend = np.zeros(len(rate)), np.zeros(len(rate))
        slope[mine] = basis[:, 0] / np.sqrt(whole)
        bend[mine] = basis[:, 1] * np.sign(triangle[1, 1]) / np.sqrt(whole)
        slopes.append(slope)
        bends.append(bend)
    spare = len(rate) - len(np.unique(block)) - len(slopes) - 1
    if not slopes or spare < 1:
        return None
    straight, bent = np.column_stack(slopes), np.sum(bends, axis=0) / np.sqrt(len(bends))
    return lambda r: np.sum((r @ straight) ** 2, axis=1) + np.maximum(0.0, r @ bent) ** 2


def _common(rate: np.ndarray) -> Ask | None:
    """What all runs have in common at the same rates; None where every run has a rate of its own."""
    which = np.unique(rate.round(6), return_inverse=True)[1]
    order, counts = np.argsort(which, kind="stable"), np.bincount(which)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    if counts.max() == 1 or len(counts) == 1:
        return None
    return lambda r: np.sum(np.add.reduceat(r[:, order], starts, axis=1) ** 2 / counts, axis=1)


def _centred(values: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Less each block's mean."""
    which = np.unique(block, return_inverse=True)[1]
    return np.asarray(values - (np.bincount(which, values) / np.bincount(which))[which])


def _shuffled(values: np.ndarray, block: np.ndarray) -> Iterator[np.ndarray]:
    """(some, n) the values with places changed inside their blocks, which are sorted, until there were enough."""
    generator = np.random.default_rng(0)
    left, each = (SHUFFLES if len(values) <= MANY else FEWER), max(1, AT_ONCE // len(values))
    while left > 0:
        now = min(left, each)
        left -= now
        yield values[np.argsort(block + generator.random((now, len(values))), axis=1)]
