"""The loader: which tokens step s trains on, as a pure function of (tokens, stages, seed, s).

Shapes: B sequences of the global batch, T context length, W windows of an epoch, N tokens of a range.

Nothing is stored between steps, so the state of a run's data is the integer s, and every world size sees one global
batch. All randomness is integer mixing written out below: order never depends on platform, hash seed or numpy version.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from mutune.errors import require, require_number

NUM_ROUNDS = 8


@dataclass(frozen=True)
class Stage:
    """`num_steps` steps of `batch_sequences` sequences (the global batch) of `context_length` tokens each."""

    context_length: int
    num_steps: int
    batch_sequences: int

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            require(
                isinstance(value, int) and not isinstance(value, bool) and value > 0,
                f"{entry.name}={value} must be a whole number above 0; for example {entry.name}=128.",
            )

    @property
    def num_windows(self) -> int:
        return self.num_steps * self.batch_sequences

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.context_length


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


class WindowLoader:
    """Batches of windows, in a keyed random order.

    A stage reads its token range as a ring of N tokens, cut into W = N // T windows that begin at a keyed offset: each
    epoch has its own offset and its own order, and within an epoch no token is an input twice. A window holds T + 1
    tokens; the last is only a target.

    Where all stages together ask for at most one epoch of the corpus, each stage has a range of its own, in proportion
    to what it asks and in stage order, so that no stage repeats what another has seen. Otherwise every stage reads the
    whole corpus in an order of its own.

    Batches that a rollback left out are `skips`: the steps of that stage move on over them, and its last ones read what
    would have come next, which is the rest of its range or, past that, its next epoch. Other stages are as before.
    """

    def __init__(
        self, tokens: npt.NDArray[np.uint16], stages: Sequence[Stage], seed: int, skips: Sequence[Skip] = ()
    ) -> None:
        """`tokens`: uint16 [tokens], usually memory-mapped. Raises `Refusal` where a context exceeds the tokens."""
        require(
            len(stages) > 0, "stages=[] has no stage; give at least one context_length, num_steps, batch_sequences."
        )
        for stage in stages:
            _require_context(stage.context_length, len(tokens))
        self.tokens = np.asarray(tokens)
        self.stages = tuple(stages)
        self.seed = seed
        self.skips = tuple(skips)
        self.token_ranges = _token_ranges(len(tokens), self.stages)
        self._first_steps = (0, *accumulate(stage.num_steps for stage in stages))

    @property
    def total_steps(self) -> int:
        return self._first_steps[-1]

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return self.stages[self._stage_index(step)]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """Tokens [B / world_size, T + 1] of `step`: inputs are `[:, :-1]`, targets `[:, 1:]`.

        Rank r has the rows r, r + world_size, ... of the global batch.
        """
        index = self._stage_index(step)
        stage, (low, high) = self.stages[index], self.token_ranges[index]
        _require_rank(rank, world_size, stage.batch_sequences)
        rows = np.arange(rank, stage.batch_sequences, world_size)
        read = step + self._skipped(step, self._first_steps[index]) - self._first_steps[index]
        positions = read * stage.batch_sequences + rows
        starts = self._window_starts(index, positions)
        ring = (starts[:, None] + np.arange(stage.context_length + 1)) % (high - low)
        return self.tokens[low + ring].astype(np.int64)

    def _skipped(self, step: int, first_step: int) -> int:
        """Steps that are left out between `first_step` of a stage and `step`."""
        return sum(skip.num_skipped for skip in self.skips if first_step <= skip.from_step <= step)

    def _stage_index(self, step: int) -> int:
        require(
            0 <= step < self.total_steps,
            f"step={step} is outside this run of {self.total_steps} steps; for example step={self.total_steps - 1}.",
        )
        return int(np.searchsorted(self._first_steps, step, side="right")) - 1

    def _window_starts(self, stage_index: int, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """First token, within the stage's ring, of the windows at `positions` (0, 1, ... over the stage's epochs)."""
        low, high = self.token_ranges[stage_index]
        context = self.stages[stage_index].context_length
        num_windows = (high - low) // context
        epochs, places = np.divmod(positions, num_windows)
        starts = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            order = permute(places[here], num_windows, _keys(self.seed, stage_index, epoch, "order"))
            offset = int(_keys(self.seed, stage_index, epoch, "offset")[0]) % (high - low)
            starts[here] = offset + order * context
        return starts


def permute(places: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a keyed permutation of 0 .. size - 1 sends each of `places`, in O(1) memory.

    A balanced Feistel network permutes the smallest 4^h >= size; a value beyond `size` is sent on until it falls inside
    (cycle walking), which keeps the map one-to-one and takes four rounds of it on average at worst.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def heldout_windows(tokens: npt.NDArray[np.uint16], context_length: int, num_windows: int) -> npt.NDArray[np.int64]:
    """The fixed evaluation set: `num_windows` windows [N, T + 1], evenly spaced, no token a target twice.

    Fewer where the text is short (at least 1, else `Refusal`); the same for every call.
    """
    _require_context(context_length, len(tokens))
    require(num_windows > 0, f"num_windows={num_windows} must be above 0; for example num_windows=64.")
    available = (len(tokens) - 1) // context_length
    num_taken = min(num_windows, available)
    starts = np.arange(num_taken) * available // num_taken * context_length
    return np.asarray(tokens)[starts[:, None] + np.arange(context_length + 1)].astype(np.int64)


def _token_ranges(num_tokens: int, stages: Sequence[Stage]) -> tuple[tuple[int, int], ...]:
    """Half-open token range of each stage: disjoint and proportional within one epoch, else all the same."""
    asked = [0, *accumulate(stage.num_tokens + 1 for stage in stages)]  # + 1: the last target
    if asked[-1] > num_tokens:
        return ((0, num_tokens),) * len(stages)
    bounds = [num_tokens * so_far // asked[-1] for so_far in asked]
    return tuple(pairwise(bounds))


def _keys(seed: int, stage_index: int, epoch: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Eight 64-bit keys [NUM_ROUNDS], independent for each purpose, epoch, stage and seed."""
    label = f"mutune.windows.1/{purpose}/{seed}/{stage_index}/{epoch}"
    return np.frombuffer(hashlib.blake2b(label.encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014; Stafford's variant 13), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _require_context(context_length: int, num_tokens: int) -> None:
    works = f"context_length={min(128, num_tokens - 1)}" if num_tokens > 1 else "a longer text"
    require(
        0 < context_length < num_tokens,
        f"context_length={context_length} does not fit into {num_tokens} tokens; for example {works}.",
    )


def _require_rank(rank: int, world_size: int, batch_sequences: int) -> None:
    require(world_size > 0, f"world_size={world_size} must be above 0; for example world_size=1.")
    works = max(1, batch_sequences // world_size) * world_size
    require(
        batch_sequences % world_size == 0,
        f"batch_sequences={batch_sequences} cannot be shared evenly by world_size={world_size}; "
        f"for example batch_sequences={works}.",
    )
    require(0 <= rank < world_size, f"rank={rank} must be below world_size={world_size}; for example rank=0.")
