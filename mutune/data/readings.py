"""What each stage of a run reads: which tokens of which corpus, in which order; also where a run is extended.

Shapes: n windows, T context length, W windows of an epoch, N tokens of a range, G intervals.

A run that is extended keeps what its stages read. What is added reads tokens that no step before it has read, where
they are enough; else it begins afresh, with an epoch of its own over everything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from mutune.data.mixture import choose, counts
from mutune.data.order import keys_of, permute
from mutune.errors import require

MAIN = ""  # the corpus of a stage without a mixture
AT_ONCE = 1 << 20  # windows whose places are worked out together
Ints = npt.NDArray[np.int64]
#: (purpose, epoch) → the keys of a reading.
Keys = Callable[[str, int], npt.NDArray[np.uint64]]


@dataclass(frozen=True)
class Stage:
    """`num_steps` steps of `batch_sequences` sequences (the global batch) of `context_length` tokens each.

    `mixture` has for each corpus its name and how many windows of a block are of it (`mixture.proportions`); without
    one, all are of the main corpus.
    """

    context_length: int
    num_steps: int
    batch_sequences: int
    mixture: tuple[tuple[str, int], ...] = ((MAIN, 1),)

    def __post_init__(self) -> None:
        for name in ("context_length", "num_steps", "batch_sequences"):
            value = getattr(self, name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"{name}={value} must be a whole number above 0; for example {name}=128.",
            )
        assert all(part > 0 for _, part in self.mixture), self.mixture
        assert len(dict(self.mixture)) == len(self.mixture) > 0, self.mixture

    @property
    def num_windows(self) -> int:
        return self.num_steps * self.batch_sequences

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.context_length

    @property
    def kind(self) -> "Stage":
        """All but its length: stages of one kind can be one another's beginning."""
        return replace(self, num_steps=1)


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
        order = permute(positions, int(ends[-1]), keys("order", 0))
        gap = np.searchsorted(ends, order, side="right")
        return self.intervals[gap, 0] + (order - (ends - self._counts(context))[gap]) * context

    def indices(self, starts: Ints, length: int) -> Ints:
        return (starts[:, None] + np.arange(length)) % self.num_tokens

    def _counts(self, context: int) -> Ints:
        return (self.intervals[:, 1] - self.intervals[:, 0]) // context


@dataclass(frozen=True)
class Segment:
    """Steps of a stage that read the same places: a stage, or the part by which it was made longer.

    Attributes:
        stage: what is read, with the number of steps.
        label: whose keys it has.
        number: of its stage in the run.
        readings: corpus → what is read of it.
    """

    stage: Stage
    label: str
    number: int
    readings: Mapping[str, Reading]

    def of_corpora(self, positions: Ints, seed: int) -> tuple[Ints, Ints]:
        """For the windows at `positions`: the number of their corpus in the mixture, and their own number in it."""
        return choose(positions, self._parts, partial(keys_of, "mixture", seed, self.label))

    def num_windows(self, seed: int) -> dict[str, int]:
        """Corpus → how many windows of it are read."""
        found = counts(self.stage.num_windows, self._parts, partial(keys_of, "mixture", seed, self.label))
        return dict(zip(dict(self.stage.mixture), found, strict=True))

    def keys(self, seed: int, corpus: str) -> Keys:
        """Those of what is read of a corpus."""
        whose = f"{self.label}@{corpus}" if corpus else self.label
        return lambda purpose, number: keys_of(purpose, seed, whose, number)

    @property
    def _parts(self) -> list[int]:
        return [part for _, part in self.stage.mixture]


def segments(
    sizes: Mapping[str, int], stages: Sequence[Stage], seed: int, extends: Sequence[Sequence[Stage]] = ()
) -> list[Segment]:
    """What a run reads, in the order of its steps.

    Args:
        sizes: corpus → its tokens.
        extends: the stages of the runs that this one goes on from, the first one first.
    """
    found = list[Segment]()
    for level, listed in enumerate((*extends, stages)):
        kept = _kept(found, listed, seed)
        begun = [sum(s.stage.num_steps for s in kept if s.number == number) for number in range(len(listed))]
        added = [
            Segment(replace(stage, num_steps=left), f"{number}+{level}" if level else str(number), number, {})
            for number, (stage, done) in enumerate(zip(listed, begun, strict=True))
            if (left := stage.num_steps - done)
        ]
        found = kept + _placed(sizes, kept, added, seed)
    return found


def shared_steps(before: Sequence[Stage], stages: Sequence[Stage]) -> int:
    """How many first steps two runs have in common: a run may leave the other at any of them and end so."""
    steps = 0
    for old, new in zip(before, stages, strict=False):
        if old.kind != new.kind:
            break
        steps += min(old.num_steps, new.num_steps)
        if old.num_steps != new.num_steps:
            break
    return steps


def _kept(found: Sequence[Segment], stages: Sequence[Stage], seed: int) -> list[Segment]:
    """The segments, or their beginnings, that a run of these stages shares with the one before it.

    The last one goes on where its stage is now longer and there are windows left that it has not read.
    """
    before = [
        replace(mine[0].stage, num_steps=sum(s.stage.num_steps for s in mine))
        for number in range(max((s.number for s in found), default=-1) + 1)
        if (mine := [s for s in found if s.number == number])
    ]
    steps, kept = shared_steps(before, stages), list[Segment]()
    for segment in found:
        if steps <= 0:
            break
        kept.append(replace(segment, stage=replace(segment.stage, num_steps=min(steps, segment.stage.num_steps))))
        steps -= segment.stage.num_steps
    if kept:
        last = kept[-1]
        more = stages[last.number].num_steps - sum(s.stage.num_steps for s in kept if s.number == last.number)
        longer = replace(last, stage=replace(last.stage, num_steps=last.stage.num_steps + more))
        kept[-1] = longer if _has_room(longer, seed) else last
    return kept


def _has_room(segment: Segment, seed: int) -> bool:
    """Whether a segment's windows are all of one epoch."""
    context, asked = segment.stage.context_length, segment.num_windows(seed)
    return all(
        number <= (segment.readings[corpus].num_windows(context) if corpus in segment.readings else 0)
        for corpus, number in asked.items()
    )


def _placed(sizes: Mapping[str, int], kept: Sequence[Segment], added: Sequence[Segment], seed: int) -> list[Segment]:
    """The added segments with what they read: of each corpus what is unread, or all of it afresh."""
    readings: list[dict[str, Reading]] = [{} for _ in added]
    asked = [segment.num_windows(seed) for segment in added]
    for corpus, size in sizes.items():
        need = [(number, windows[corpus]) for number, windows in enumerate(asked) if windows.get(corpus)]
        lengths = [added[number].stage.context_length for number, _ in need]
        windows = [count for _, count in need]
        if not need:
            continue
        found = _unread(size, corpus, kept, lengths, windows, seed) or _rings(size, lengths, windows)
        for (number, _), reading in zip(need, found, strict=True):
            readings[number][corpus] = reading
    return [replace(segment, readings=places) for segment, places in zip(added, readings, strict=True)]


def _rings(num_tokens: int, lengths: Sequence[int], windows: Sequence[int]) -> list[Reading]:
    """A ring for each asker: disjoint and proportional where all fit into one epoch, else each has everything."""
    asked = [length * count for length, count in zip(lengths, windows, strict=True)]
    return [Ring(low, high) for low, high in token_ranges(num_tokens, asked)]


def token_ranges(num_tokens: int, asked: Sequence[int]) -> list[tuple[int, int]]:
    """Half-open token range of each asker: disjoint and proportional within one epoch, else all the same."""
    bounds = [0, *accumulate(tokens + 1 for tokens in asked)]  # + 1: the last target
    if bounds[-1] > num_tokens:
        return [(0, num_tokens)] * len(asked)
    return list(pairwise(num_tokens * so_far // bounds[-1] for so_far in bounds))


def _unread(
    size: int, corpus: str, kept: Sequence[Segment], lengths: Sequence[int], windows: Sequence[int], seed: int
) -> list[Reading] | None:
    """What each asker reads of the tokens that the kept segments have not; None where that is not enough for all."""
    asked = [length * count for length, count in zip(lengths, windows, strict=True)]
    before = [(s, count) for s in kept if (count := s.num_windows(seed).get(corpus))]
    read = sum(min(count * s.stage.context_length, size) for s, count in before)
    if not before or size - read < sum(asked) + len(asked):
        return None
    gaps = _gaps(size, np.concatenate([_read(segment, corpus, count, seed) for segment, count in before]))
    ends = np.cumsum(gaps[:, 1] - gaps[:, 0])
    found = list[Reading]()
    for (low, high), length, count in zip(token_ranges(int(ends[-1]), asked), lengths, windows, strict=True):
        reading = Gaps(_cut(gaps, ends, low, high), size)
        if reading.num_windows(length) < count:
            return None
        found.append(reading)
    return found


def _read(segment: Segment, corpus: str, count: int, seed: int) -> Ints:
    """Intervals [n, 2] of the input tokens of a segment's first `count` windows of a corpus."""
    reading, context, keys = segment.readings[corpus], segment.stage.context_length, segment.keys(seed, corpus)
    if isinstance(reading, Ring) and count >= reading.num_windows(context):
        return np.array([[reading.low, reading.high]])
    parts = [np.arange(first, min(first + AT_ONCE, count)) for first in range(0, count, AT_ONCE)]
    starts = np.concatenate([reading.starts(positions, context, keys) for positions in parts])
    intervals = np.stack([starts, starts + context], axis=1)
    if not isinstance(reading, Ring):
        return intervals
    beyond = intervals[intervals[:, 1] > reading.high]  # goes on at the ring's beginning
    again = np.stack([np.full(len(beyond), reading.low), beyond[:, 1] - reading.high + reading.low], axis=1)
    return np.concatenate([np.minimum(intervals, reading.high), again])


def _gaps(size: int, read: Ints) -> Ints:
    """What of the tokens 0 to `size` lies in none of the intervals, as intervals."""
    read = read[np.argsort(read[:, 0], kind="stable")]
    lows = np.concatenate([[0], np.maximum.accumulate(read[:, 1])])
    highs = np.concatenate([read[:, 0], [size]])
    return np.stack([lows, highs], axis=1)[highs > lows]


def _cut(gaps: Ints, ends: Ints, low: int, high: int) -> Ints:
    """The part of the gaps that holds their tokens number `low` to `high`; `ends` are their lengths added up."""
    begins = ends - (gaps[:, 1] - gaps[:, 0])
    cut = np.stack([np.maximum(begins, low), np.minimum(ends, high)], axis=1) - begins[:, None] + gaps[:, :1]
    return cut[cut[:, 1] > cut[:, 0]]
