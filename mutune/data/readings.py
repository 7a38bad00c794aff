"""A part of a corpus, and the order in which its windows are read: a ring of tokens, or windows between what was read.

Shapes: n windows, T context length, W windows of an epoch.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mutune.data.order import Ints, permute
from mutune.data.told import Tell

AT_ONCE = 1 << 18  # windows whose places are worked out together
BUCKET = 1 << 16  # tokens, so that a place within them has 16 bits
#: (purpose, epoch) → the keys of a reading.
Keys = Callable[[str, int], npt.NDArray[np.uint64]]
#: (low, high) → intervals [n, 2] of the tokens from `low` to before `high` that were inputs.
Within = Callable[[int, int], Ints]


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

    def read(self, count: int, context: int, keys: Keys, tell: Tell) -> Within:
        """The input tokens of the first `count` windows. It holds a bit for each of the W."""


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
            starts[here] = (self._offset(epoch, keys) + order * context) % size
        return self.low + starts

    def indices(self, starts: Ints, length: int) -> Ints:
        return self.low + (starts[:, None] - self.low + np.arange(length)) % (self.high - self.low)

    def read(self, count: int, context: int, keys: Keys, tell: Tell) -> Within:
        if count >= self.num_windows(context):  # all is read, though fewer than T tokens were no inputs
            return lambda low, high: np.clip([[self.low, self.high]], low, high)
        marks = _marks(count, self.num_windows(context), keys("order", 0), tell)
        first = self.low + self._offset(0, keys)

        def within(low: int, high: int) -> Ints:
            low, high = max(low, self.low), min(high, self.high)
            if low >= high:
                return np.empty((0, 2), dtype=np.int64)
            parts = []
            for begin in (first, first - (self.high - self.low)):  # the last windows go on at the ring's beginning
                number, marked = _between(marks, (low - begin) // context, -((begin - high) // context))
                runs = np.flatnonzero(np.diff(marked, prepend=False, append=False)).reshape(-1, 2)
                parts.append(begin + (number + runs) * context)
            return np.clip(np.concatenate(parts), low, high)

        return within

    def _offset(self, epoch: int, keys: Keys) -> int:
        return int(keys("offset", epoch)[0]) % (self.high - self.low)


@dataclass(frozen=True, eq=False)
class Unread:
    """Windows of tokens that nothing has read yet, wherever they lie; for one epoch.

    A window's last target is the token after it, which may have been read, and is the first one after the last.

    Attributes:
        context: T.
        num_tokens: of the corpus.
        ends: for each bucket of `BUCKET` tokens, how many windows begin in it and those before it.
        places: where in its bucket each window begins, in the order of the text, uint16 [W].
    """

    context: int
    num_tokens: int
    ends: Ints
    places: npt.NDArray[np.uint16]

    @classmethod
    def of(cls, starts: Iterable[Ints], context: int, num_tokens: int) -> "Unread":
        """The windows that begin there, in the order of the text, given bit by bit."""
        ends, places = np.zeros(num_tokens // BUCKET + 1, dtype=np.int64), [np.empty(0, dtype=np.uint16)]
        for part in starts:
            if len(part):
                first = int(part[0]) // BUCKET
                number = np.bincount(part // BUCKET - first)
                ends[first : first + len(number)] += number
                places.append((part % BUCKET).astype(np.uint16))
        return cls(context, num_tokens, np.cumsum(ends, out=ends), np.concatenate(places))

    @property
    def bounds(self) -> tuple[int, int]:
        first, last = self._starts(np.array([0, len(self.places) - 1]))
        return int(first), int(last) + self.context

    def num_windows(self, context: int) -> int:
        assert context == self.context, (context, self.context)
        return len(self.places)

    def starts(self, positions: Ints, context: int, keys: Keys) -> Ints:
        num_windows = self.num_windows(context)
        return self._starts(permute(positions % num_windows, num_windows, keys("order", 0)))

    def indices(self, starts: Ints, length: int) -> Ints:
        return (starts[:, None] + np.arange(length)) % self.num_tokens

    def read(self, count: int, context: int, keys: Keys, tell: Tell) -> Within:
        marks = _marks(count, self.num_windows(context), keys("order", 0), tell)

        def within(low: int, high: int) -> Ints:
            before, last = max(0, low - context) // BUCKET, (high - 1) // BUCKET
            number, marked = _between(marks, int(self.ends[before - 1]) if before else 0, int(self.ends[last]))
            starts = self._starts(number + np.flatnonzero(marked))
            return np.clip(np.stack([starts, starts + context], axis=1), low, high)

        return within

    def _starts(self, numbers: Ints) -> Ints:
        """Where the windows [n] of these numbers in the order of the text begin."""
        return np.searchsorted(self.ends, numbers, side="right") * BUCKET + self.places[numbers]


def _marks(count: int, num_windows: int, keys: npt.NDArray[np.uint64], tell: Tell) -> npt.NDArray[np.uint8]:
    """A bit for each of W windows in the order of the text: whether it is among the first `count` that are read."""
    count, marked = min(count, num_windows), np.zeros(num_windows, dtype=bool)
    for low in range(0, count, AT_ONCE):
        marked[permute(np.arange(low, min(low + AT_ONCE, count)), num_windows, keys)] = True
        tell("found", "windows that were read", min(low + AT_ONCE, count), count)
    return np.packbits(marked)


def _between(marks: npt.NDArray[np.uint8], first: int, last: int) -> tuple[int, npt.NDArray[np.bool_]]:
    """The number of the first window of those from `first` to before `last` that there are, and which are marked."""
    first, last = max(0, first), max(0, last)
    low = first // 8
    bits = np.unpackbits(marks[low : -(-last // 8)])
    return first, bits[first - 8 * low : last - 8 * low].astype(bool)


def token_ranges(num_tokens: int, asked: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open token range of each asker: disjoint and proportional within one epoch, else all the same."""
    bounds = [0, *accumulate(tokens + 1 for tokens in asked)]  # + 1: the last target
    if bounds[-1] > num_tokens:
        return [(0, num_tokens)] * len(asked)
    return list(pairwise(num_tokens * so_far // bounds[-1] for so_far in bounds))
