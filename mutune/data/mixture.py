"""Mixtures: which corpus a window is of, and which of that corpus's windows it is.

The windows of a stage come in blocks, each of which holds every corpus in exact proportion, in a keyed random order of
its own. So both answers are a function of the window's number alone.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from mutune.data.order import permute

MIN_BLOCK, MAX_BLOCK = 100, 10**6  # windows
#: Block → the keys of its order.
BlockKeys = Callable[[int], npt.NDArray[np.uint64]]


def proportions(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the ratio of the weights, as written in decimals: windows of each corpus in a block.

    A block has at least a hundred windows, so that a batch meets few of them. Weights that need more than a million are
    rounded to millionths, no corpus to nothing.
    """
    if len(weights) == 1:
        return (1,)
    exact = [Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * common) for weight in exact]
    whole = [number // math.gcd(*whole) for number in whole]
    if sum(whole) <= MAX_BLOCK:
        return tuple(number * math.ceil(MIN_BLOCK / sum(whole)) for number in whole)
    bounds = [round(MAX_BLOCK * Fraction(so_far, sum(whole))) for so_far in (0, *accumulate(whole))]
    return tuple(max(1, high - low) for low, high in pairwise(bounds))


def choose(
    positions: npt.NDArray[np.int64], parts: Sequence[int], keys: BlockKeys
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For the windows at `positions` of a stage: the number of their corpus, and their own number in that corpus.

    Args:
        parts: windows of each corpus in a block, as `proportions` gives them.
    """
    if len(parts) == 1:
        return np.zeros_like(positions), positions
    ends, numbers = np.cumsum(parts), np.array(parts)
    blocks, places = np.divmod(positions, ends[-1])
    order = np.empty_like(positions)
    for block in np.unique(blocks):
        here = blocks == block
        order[here] = permute(places[here], int(ends[-1]), keys(int(block)))
    corpus = np.searchsorted(ends, order, side="right")
    return corpus, blocks * numbers[corpus] + order - (ends - numbers)[corpus]


def counts(num_windows: int, parts: Sequence[int], keys: BlockKeys) -> list[int]:
    """How many of the first `num_windows` windows are of each corpus."""
    blocks, rest = divmod(num_windows, sum(parts))
    last, _ = choose(np.arange(num_windows - rest, num_windows), parts, keys)
    return [
        blocks * part + int(more) for part, more in zip(parts, np.bincount(last, minlength=len(parts)), strict=True)
    ]
