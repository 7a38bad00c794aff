"""What each stage of a run reads, also where a run goes on from others.

A run that is extended keeps what its stages read. What is added reads tokens that no step before it has read, where
they are enough; else it begins afresh, with an epoch of its own over everything.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mutune.data import unread
from mutune.data.mixture import choose, counts
from mutune.data.order import Ints, keys_of
from mutune.data.readings import AT_ONCE, Keys, Reading, Ring, Unread, token_ranges
from mutune.data.told import Tell
from mutune.errors import require, require_number

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
class Skip:
    """From global step `from_step` on, to its stage's end, every step reads the batch of `num_skipped` steps later.

    Skips add up, so that one made after another counts the steps of the run as it then is.
    """

    from_step: int
    num_skipped: int

    def __post_init__(self) -> None:
        require_number("skips.from_step", self.from_step, at_least=0, example=100, whole=True)
        require_number("skips.num_skipped", self.num_skipped, at_least=1, example=10, whole=True)


@dataclass(frozen=True)
class Segment:
    """Steps of a stage that read the same places: a stage, or the part by which it was made longer.

    Attributes:
        stage: what is read, with the number of steps.
        label: whose keys it has.
        number: of its stage in the run.
        readings: corpus → what is read of it.
        num_skipped: steps whose batches were left out of it: none reads them again.
        again: corpora of which it reads all afresh, since what steps before it have not read is not enough.
    """

    stage: Stage
    label: str
    number: int
    readings: Mapping[str, Reading]
    num_skipped: int = 0
    again: tuple[str, ...] = ()

    def of_corpora(self, positions: Ints, seed: int) -> tuple[Ints, Ints]:
        """For the windows at `positions`: the number of their corpus in the mixture, and their own number in it."""
        return choose(positions, self._parts, partial(keys_of, "mixture", seed, self.label))

    def num_windows(self, seed: int) -> dict[str, int]:
        """Corpus → how many windows of it are read, or left out."""
        both = (self.stage.num_steps + self.num_skipped) * self.stage.batch_sequences
        found = counts(both, self._parts, partial(keys_of, "mixture", seed, self.label))
        return dict(zip(dict(self.stage.mixture), found, strict=True))

    def keys(self, seed: int, corpus: str) -> Keys:
        """Those of what is read of a corpus."""
        whose = f"{self.label}@{corpus}" if corpus else self.label
        return lambda purpose, number: keys_of(purpose, seed, whose, number)

    @property
    def _parts(self) -> list[int]:
        return [part for _, part in self.stage.mixture]


def segments(
    sizes: Mapping[str, int],
    stages: Sequence[Stage],
    seed: int,
    extends: Sequence[Sequence[Stage]] = (),
    left_out: Sequence[Sequence[Skip]] = (),
    tell: Tell = lambda *so_far: None,
) -> list[Segment]:
    """What a run reads, in the order of its steps.

    Args:
        sizes: corpus → its tokens.
        extends: the stages of the runs that this one goes on from, the first one first.
        left_out: of each of those runs, what rollbacks had left out of it by the step at which it was left.
        tell: how far it is, as `Told.share` has it; a large corpus takes a while.
    """
    found = list[Segment]()
    skips = (), *(left_out or [()] * len(extends))
    for level, (listed, skipped) in enumerate(zip((*extends, stages), skips, strict=True)):
        kept = _kept(found, listed, skipped, seed)
        begun = [sum(s.stage.num_steps for s in kept if s.number == number) for number in range(len(listed))]
        added = [
            Segment(replace(stage, num_steps=left), f"{number}+{level}" if level else str(number), number, {})
            for number, (stage, done) in enumerate(zip(listed, begun, strict=True))
            if (left := stage.num_steps - done)
        ]
        found = kept + _placed(sizes, kept, added, seed, tell)
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


def steps_skipped(skips: Sequence[Skip], first_step: int, end: int) -> int:
    """Steps whose batches are left out of the steps `first_step` to before `end` of a stage."""
    return sum(skip.num_skipped for skip in skips if first_step <= skip.from_step < end)


def _kept(found: Sequence[Segment], stages: Sequence[Stage], skips: Sequence[Skip], seed: int) -> list[Segment]:
    """The segments, or their beginnings, that a run of these stages shares with the one before it.

    The last one goes on where its stage is now longer and there are windows left that it has not read.
    """
    before = [
        replace(mine[0].stage, num_steps=sum(s.stage.num_steps for s in mine))
        for number in range(max((s.number for s in found), default=-1) + 1)
        if (mine := [s for s in found if s.number == number])
    ]
    shared, first, kept = shared_steps(before, stages), 0, list[Segment]()
    for segment in found:
        if first >= shared:
            break
        kept.append(_lasting(segment, first, min(shared - first, segment.stage.num_steps), skips))
        first += segment.stage.num_steps
    if kept:
        last, first = kept[-1], sum(s.stage.num_steps for s in kept[:-1])
        more = stages[last.number].num_steps - sum(s.stage.num_steps for s in kept if s.number == last.number)
        longer = _lasting(last, first, last.stage.num_steps + more, skips)
        kept[-1] = longer if _has_room(longer, seed) else last
    return kept


def _lasting(segment: Segment, first_step: int, num_steps: int, skips: Sequence[Skip]) -> Segment:
    """The segment with so many steps, of which the first one is `first_step`."""
    skipped = steps_skipped(skips, first_step, first_step + num_steps)
    return replace(segment, stage=replace(segment.stage, num_steps=num_steps), num_skipped=skipped)


def _has_room(segment: Segment, seed: int) -> bool:
    """Whether a segment's windows are all of one epoch."""
    context, asked = segment.stage.context_length, segment.num_windows(seed)
    return all(
        number <= (segment.readings[corpus].num_windows(context) if corpus in segment.readings else 0)
        for corpus, number in asked.items()
    )


def _placed(
    sizes: Mapping[str, int], kept: Sequence[Segment], added: Sequence[Segment], seed: int, tell: Tell
) -> list[Segment]:
    """The added segments with what they read: of each corpus what is unread, or all of it afresh."""
    readings: list[dict[str, Reading]] = [{} for _ in added]
    again: list[tuple[str, ...]] = [() for _ in added]
    asked = [segment.num_windows(seed) for segment in added]
    for corpus, size in sizes.items():
        need = [(number, windows[corpus]) for number, windows in enumerate(asked) if windows.get(corpus)]
        lengths = [added[number].stage.context_length for number, _ in need]
        windows = [count for _, count in need]
        if not need:
            continue
        unread_parts = _unread(size, corpus, kept, lengths, windows, seed, tell)
        for (number, _), reading in zip(need, unread_parts or _rings(size, lengths, windows), strict=True):
            readings[number][corpus] = reading
            if unread_parts is None and any(corpus in segment.readings for segment in kept):
                again[number] += (corpus,)
    return [replace(part, readings=readings[i], again=again[i]) for i, part in enumerate(added)]


def _rings(num_tokens: int, lengths: Sequence[int], windows: Sequence[int]) -> list[Reading]:
    """A ring for each asker: disjoint and proportional where all fit into one epoch, else each has everything."""
    asked = [length * count for length, count in zip(lengths, windows, strict=True)]
    return [Ring(low, high) for low, high in token_ranges(num_tokens, asked)]


def _unread(
    size: int,
    corpus: str,
    kept: Sequence[Segment],
    lengths: Sequence[int],
    windows: Sequence[int],
    seed: int,
    tell: Tell,
) -> list[Reading] | None:
    """What each asker reads of the tokens that the kept segments have not; None where that is not enough for all."""
    asked = [length * count for length, count in zip(lengths, windows, strict=True)]
    before = [(s, count) for s in kept if (count := s.num_windows(seed).get(corpus))]
    read = sum(min(count * s.stage.context_length, size) for s, count in before)
    if not before or size - read < sum(asked) + len(asked):
        return None
    within = [s.readings[corpus].read(n, s.stage.context_length, s.keys(seed, corpus), tell) for s, n in before]
    block = AT_ONCE * min(*lengths, *(s.stage.context_length for s, _ in before))

    def gaps() -> Iterator[Ints]:
        return unread.gaps(within, size, block, tell)

    ranges = [(0, size)]
    if len(asked) > 1:
        left = unread.count(gaps())  # less than was not input: what a part has beyond its last window counts as read
        if left < sum(asked) + len(asked):
            return None
        ranges = token_ranges(left, asked)
    parts = [Unread.of(unread.cut(gaps(), n, *bounds), n, size) for n, bounds in zip(lengths, ranges, strict=True)]
    enough = all(len(part.places) >= count for part, count in zip(parts, windows, strict=True))
    return list(parts) if enough else None
