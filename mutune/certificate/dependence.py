"""Whether losses depend on the rate at all, before any valley is fitted to them."""

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from mutune.certificate.points import AXES

CLIP = 3.0  # times as far above the lowest loss as the median is


def chance_of_none(points: pd.DataFrame) -> float:
    """The chance that losses which do not depend on the rate would look as if they did: F tests over all rungs.

    One asks every rung by itself: where seeds repeat its rates, their means are set against what seeds leave
    unexplained, elsewhere a parabola in the log2 rate against what it leaves. The other asks for what rungs have in
    common at the same rates. Losses far above the median are clipped. The smaller chance counts, as often as tests were
    made; 0 where nothing is left to test by.
    """
    finished = points[~points.diverged.to_numpy(bool)].reset_index(drop=True)
    rate, loss = np.log2(finished.learning_rate.to_numpy(float)), finished.loss.to_numpy(float).copy()
    explained, left = np.zeros(2), np.zeros(2)  # sum of squares, degrees of freedom
    for rung in finished.groupby(list(AXES)).indices.values():
        lowest = loss[rung].min()
        loss[rung] = np.minimum(loss[rung], lowest + CLIP * (np.median(loss[rung]) - lowest))
        levels, rates = _indicators(finished.seed.iloc[rung]), _indicators(rate[rung])
        if np.linalg.matrix_rank(np.hstack([levels, rates])) >= len(rung):
            rates = np.vander(rate[rung] - rate[rung].mean(), 3)
        more, rest = _squares(loss[rung], levels, rates)
        explained, left = explained + more, left + rest
    levels = _indicators(finished.groupby([*AXES, "seed"]).ngroup())
    tests = [(explained, left), _squares(loss, levels, _indicators(rate))]
    chances = [_chance(more, rest) for more, rest in tests if more[1] and rest[1]]
    return min(1.0, len(chances) * min(chances)) if chances else 0.0


def _indicators(values: Any) -> np.ndarray:
    """A column for each distinct value."""
    which = pd.factorize(values)[0]
    return np.eye(which.max() + 1)[which]


def _squares(loss: np.ndarray, plain: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum of squares and degrees of freedom that `more` explains beyond `plain`, and those that both leave."""
    both = np.hstack([plain, more])
    ranks = np.linalg.matrix_rank(plain), np.linalg.matrix_rank(both)
    rests = [float(np.sum((loss - x @ np.linalg.lstsq(x, loss)[0]) ** 2)) for x in (plain, both)]
    return np.array([rests[0] - rests[1], ranks[1] - ranks[0]]), np.array([rests[1], len(loss) - ranks[1]])


def _chance(explained: np.ndarray, left: np.ndarray) -> float:
    """Of an F test."""
    ratio = explained[0] / explained[1] / (left[0] / left[1]) if left[0] else np.inf
    return float(stats.f.sf(ratio, explained[1], left[1]))
