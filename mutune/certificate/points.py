"""Finished runs of a ladder as one table: what each rung is, the rate, the seed, the loss."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

#: What a rung may differ in; `tokens` and `batch` (tokens per step) are counts.
AXES = ("width", "depth", "tokens", "batch")
COLUMNS = (*AXES, "learning_rate", "seed", "loss", "diverged")


def rung_table(points: pd.DataFrame) -> pd.DataFrame:
    """The distinct rungs of `points`, one row each with the columns of `AXES`, narrowest and smallest first."""
    return points[list(AXES)].drop_duplicates().sort_values(list(AXES), ignore_index=True)


def rung_index(points: pd.DataFrame, rungs: pd.DataFrame) -> np.ndarray:
    """Each point's row in `rungs`."""
    place = {tuple(row): i for i, row in enumerate(rungs.itertuples(index=False))}
    return np.array([place[tuple(row)] for row in points[list(AXES)].itertuples(index=False)])


def doublings(rungs: pd.DataFrame, base: Mapping[str, float]) -> np.ndarray:
    """How many times each axis is doubled from `base`: (rungs, axes)."""
    return np.log2(rungs[list(AXES)].to_numpy(float) / np.array([base[axis] for axis in AXES], float))
