"""What is usual in a noisy series: medians and deviations of its last values, on plain lists. No torch."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import median

#: Median of |x - y| of two normal numbers, over their deviation.
DIFFERENCE = math.sqrt(2) * 0.67449
RECENT = 32  # values whose median is the level: short enough to follow a decaying loss
CAP = 4.0  # deviations that one value counts for in a sum over several
LEAST = 1e-4  # of the level: a deviation that rounding alone could make


def level(values: Sequence[float]) -> float:
    """The median of the last values."""
    return median(values[-RECENT:])


def deviation(values: Sequence[float]) -> float:
    """σ of normal noise around a trend, from the median difference of neighbours."""
    noise = median(abs(y - x) for x, y in pairwise(values)) / DIFFERENCE
    return max(noise, LEAST * max(1.0, abs(values[-1])))


def cusum(sum_so_far: float, deviations: float) -> float:
    """The sum of what lies above one deviation, never below zero: small and lasting shifts add up (Page 1954)."""
    return max(0.0, sum_so_far + min(deviations, CAP) - 1.0)
