"""What each stage of a run reads, also where a run goes on from others.

A run that is extended keeps what its stages read. What is added reads tokens that no step before it has read, where
they are enough; else it begins afresh, with an epoch of its own over everything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from mutune.data.mixture import choose, counts
from mutune.data.order import keys_of
from mutune.data.readings import Gaps, Ints, Keys, Reading, Ring, token_ranges
from mutune.errors import require

MAIN = ""  # the corpus of a stage without a mixture


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


def _unread(
    size: int, corpus: str, kept: Sequence[Segment], lengths: Sequence[int], windows: Sequence[int], seed: int
) -> list[Reading] | None:
    """What each asker reads of the tokens that the kept segments have not; None where that is not enough for all."""
    asked = [length * count for length, count in zip(lengths, windows, strict=True)]
    before = [(s, count) for s in kept if (count := s.num_windows(seed).get(corpus))]
    read = sum(min(count * s.stage.context_length, size) for s, count in before)
    if not before or size - read < sum(asked) + len(asked):
        return None
    intervals = [s.readings[corpus].read(count, s.stage.context_length, s.keys(seed, corpus)) for s, count in before]
    gaps = Gaps.between(np.concatenate(intervals), size)
    parts = [gaps.part(low, high) for low, high in token_ranges(len(gaps), asked)]
    enough = all(part.num_windows(length) >= count for part, length, count in zip(parts, lengths, windows, strict=True))
    return list(parts) if enough else None
