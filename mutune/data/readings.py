"""A part of a corpus, and the order in which its windows are read: a ring of tokens, or gaps between what was read.

Shapes: n windows, T context length, W windows of an epoch, G intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mutune.data.order import permute

AT_ONCE = 1 << 20  # windows whose places are worked out together
Ints = npt.NDArray[np.int64]
#: (purpose, epoch) → the keys of a reading.
Keys = Callable[[str, int], npt.NDArray[np.uint64]]


class Reading(Protocol):
    """A part of a corpus, and the order in which its windows are read."""

    @property
    def bounds(self) -> tuple[int, int]:
        """The tokens from the first one to the one after the last."""

    def num_windows(self, context: int) -> int:
        """W: how many there are in an epoch."""

    def starts(self, positions: Ints, context: int, keys: Keys) -> Ints:
        """The first token [n] of the windows at `positions`: 0, 1, ... over all epochs."""

    def indices(self, starts: Ints, length: int) -> Ints:
        """The tokens [n, length] of windows that begin at `starts`."""

    def read(self, count: int, context: int, keys: Keys) -> Ints:
        """Intervals [n, 2] of the input tokens of the first `count` windows."""


@dataclass(frozen=True)
class Ring:
    """The tokens `low` to `high`, of which the first follows the last.

    Each epoch cuts them into windows from an offset of its own and has an order of its own.
    """

    low: int
    high: int

    @property
    def bounds(self) -> tuple[int, int]:
        return self.low, self.high

    def num_windows(self, context: int) -> int:
        return (self.high - self.low) // context

    def starts(self, positions: Ints, context: int, keys: Keys) -> Ints:
        size, num_windows = self.high - self.low, self.num_windows(context)
        epochs, places = np.divmod(positions, num_windows)
        starts = np.empty_like(positions)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            here = epochs == epoch
            order = permute(places[here], num_windows, keys("order", epoch))
            starts[here] = (int(keys("offset", epoch)[0]) % size + order * context) % size
        return self.low + starts

    def indices(self, starts: Ints, length: int) -> Ints:
        return self.low + (starts[:, None] - self.low + np.arange(length)) % (self.high - self.low)

    def read(self, count: int, context: int, keys: Keys) -> Ints:
        if count >= self.num_windows(context):
            return np.array([[self.low, self.high]])
        intervals = _first(self, count, context, keys)
        beyond = intervals[intervals[:, 1] > self.high]  # goes on at the ring's beginning
        again = np.stack([np.full(len(beyond), self.low), beyond[:, 1] - self.high + self.low], axis=1)
        return np.concatenate([np.minimum(intervals, self.high), again])


@dataclass(frozen=True, eq=False)
class Gaps:
    """Intervals [G, 2] of tokens that nothing has read yet, each cut into windows from its beginning; for one epoch.

    A window's last target is the token after it, which may have been read, and is the first one after the last.
    """

    intervals: Ints
    num_tokens: int

    @property
    def bounds(self) -> tuple[int, int]:
        return int(self.intervals[0, 0]), int(self.intervals[-1, 1])

    def num_windows(self, context: int) -> int:
        return int(self._counts(context).sum())

    def starts(self, positions: Ints, context: int, keys: Keys) -> Ints:
        ends = np.cumsum(self._counts(context))
        order = permute(positions % int(ends[-1]), int(ends[-1]), keys("order", 0))
        gap = np.searchsorted(ends, order, side="right")
        return self.intervals[gap, 0] + (order - (ends - self._counts(context))[gap]) * context

    def indices(self, starts: Ints, length: int) -> Ints:
        return (starts[:, None] + np.arange(length)) % self.num_tokens

    def read(self, count: int, context: int, keys: Keys) -> Ints:
        return _first(self, count, context, keys)

    @classmethod
    def between(cls, read: Ints, num_tokens: int) -> "Gaps":
        """What of the tokens 0 to `num_tokens` lies in none of these intervals."""
        read = read[np.argsort(read[:, 0], kind="stable")]
        lows = np.concatenate([[0], np.maximum.accumulate(read[:, 1])])
        highs = np.concatenate([read[:, 0], [num_tokens]])
        return cls(np.stack([lows, highs], axis=1)[highs > lows], num_tokens)

    def part(self, low: int, high: int) -> "Gaps":
        """Its tokens number `low` to `high`."""
        lengths = self.intervals[:, 1] - self.intervals[:, 0]
        begins, ends = np.cumsum(lengths) - lengths, np.cumsum(lengths)
        places = np.stack([np.maximum(begins, low), np.minimum(ends, high)], axis=1) - begins[:, None]
        cut = self.intervals[:, :1] + places
        return Gaps(cut[cut[:, 1] > cut[:, 0]], self.num_tokens)

    def __len__(self) -> int:
        """How many tokens there are."""
        return int((self.intervals[:, 1] - self.intervals[:, 0]).sum())

    def _counts(self, context: int) -> Ints:
        return (self.intervals[:, 1] - self.intervals[:, 0]) // context


def _first(reading: Reading, count: int, context: int, keys: Keys) -> Ints:
    """Intervals [n, 2] from the start of each of the first windows, beyond the end of a ring too."""
    parts = [np.arange(low, min(low + AT_ONCE, count)) for low in range(0, count, AT_ONCE)]
    starts = np.concatenate([reading.starts(positions, context, keys) for positions in parts])
    return np.stack([starts, starts + context], axis=1)


def token_ranges(num_tokens: int, asked: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open token range of each asker: disjoint and proportional within one epoch, else all the same."""
    bounds = [0, *accumulate(tokens + 1 for tokens in asked)]  # + 1: the last target
    if bounds[-1] > num_tokens:
        return [(0, num_tokens)] * len(asked)
    return list(pairwise(num_tokens * so_far // bounds[-1] for so_far in bounds))
