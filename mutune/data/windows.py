"""The loader: which tokens step s trains on, as a pure function of (tokens, stages, seed, s).

Shapes: B sequences of the global batch, T context length, W windows of an epoch, N tokens of a range.

Nothing is stored between steps, so the state of a run's data is the integer s, and every world size sees one global
batch. All randomness is integer mixing (`order.py`): order never depends on platform, hash seed or numpy version.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import numpy.typing as npt

from mutune.data.segments import MAIN, Segment, Skip, Stage, segments, shared_steps, steps_skipped
from mutune.data.told import Tell
from mutune.errors import require

__all__ = ["Skip", "Stage", "WindowLoader", "heldout_windows", "shared_steps"]

Tokens = npt.NDArray[np.uint16]


class WindowLoader:
    """Batches of windows, in a keyed random order.

    A stage reads its token range as a ring of N tokens, cut into W = N // T windows that begin at a keyed offset: each
    epoch has its own offset and its own order, and within an epoch no token is an input twice. A window holds T + 1
    tokens; the last is only a target.

    Where all stages together ask for at most one epoch of the corpus, each stage has a range of its own, in proportion
    to what it asks and in stage order, so that no stage repeats what another has seen. Otherwise every stage reads the
    whole corpus in an order of its own. In a mixture this holds for each corpus by itself.

    A run that goes on from others (`extends`) reads what they read, for as long as it has their stages
    (`shared_steps`); a stage that is longer than it was goes on in its own range. Stages that are new, or for which
    that range has no windows left, read what no step before them has read, cut into windows of their own length; where
    that is not enough for them all, they begin as a run of their own would, and read tokens again.

    Batches that a rollback left out are `skips`: the steps of that stage move on over them, and its last ones read what
    would have come next, which is the rest of its range or, past that, its next epoch. Other stages are as before. To a
    run that goes on from one with skips (`left_out`), what was left out counts as read.
    """

    def __init__(
        self,
        tokens: Tokens,
        stages: Sequence[Stage],
        seed: int,
        *,
        corpora: Mapping[str, Tokens] | None = None,
        extends: Sequence[Sequence[Stage]] = (),
        left_out: Sequence[Sequence[Skip]] = (),
        skips: Sequence[Skip] = (),
        tell: Tell = lambda *so_far: None,
    ) -> None:
        """
        Args:
            tokens: of the main corpus, uint16 [tokens], usually memory-mapped.
            corpora: name → tokens of the others that stages have in their mixtures.
            extends: the stages of the runs that this one goes on from, as they were, the first one first.
            left_out: of each of `extends`, the batches that rollbacks had left out where the next run left it.
            skips: batches that rollbacks left out, of those runs too.
            tell: how far it is with what was read, as `Told.share` has it; a large corpus takes a while.

        Raises:
            Refusal: a context exceeds the tokens, or a run shares no step with the one that it extends.
        """
        require(
            len(stages) > 0, "stages=[] has no stage; give at least one context_length, num_steps, batch_sequences."
        )
        self.corpora = {MAIN: np.asarray(tokens)} | {name: np.asarray(part) for name, part in (corpora or {}).items()}
        self.stages = tuple(stages)
        self.seed = seed
        for listed in (*extends, stages):
            for stage in listed:
                for name, _ in stage.mixture:
                    _require_context(stage.context_length, len(self.corpora[name]))
        for before, after in pairwise((*extends, stages)):
            require(
                shared_steps(before, after) > 0,
                "extends has a run whose first stage is of another context_length, batch_sequences or data than that "
                "of the run that goes on from it; for example the same first stage in both.",
            )
        self.skips = tuple(skips)
        sizes = {name: len(part) for name, part in self.corpora.items()}
        self.segments = tuple(segments(sizes, self.stages, seed, extends, left_out, tell))
        self._first_steps = (0, *accumulate(segment.stage.num_steps for segment in self.segments))

    @property
    def total_steps(self) -> int:
        return self._first_steps[-1]

    @property
    def token_ranges(self) -> tuple[tuple[int, int], ...]:
        """Half-open range of the main corpus that each part of the run reads; of what was unread, its bounds."""
        found = [segment.readings[MAIN] for segment in self.segments if MAIN in segment.readings]
        return tuple(part.bounds for part in found)

    def stage_at(self, step: int) -> Stage:
        """The stage that `step` belongs to."""
        return self.stages[self._segment_at(step)[0].number]

    def stage_start(self, step: int) -> int:
        """The first step of the stage that `step` belongs to, or of the part of it that is read by itself."""
        return self._segment_at(step)[1]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> npt.NDArray[np.int64]:
        """Tokens [B / world_size, T + 1] of `step`: inputs are `[:, :-1]`, targets `[:, 1:]`.

        Rank r has the rows r, r + world_size, ... of the global batch.
        """
        segment, before = self._segment_at(step)
        stage = segment.stage
        _require_rank(rank, world_size, stage.batch_sequences)
        rows = np.arange(rank, stage.batch_sequences, world_size)
        read = step - before + steps_skipped(self.skips, before, step + 1)
        number, positions = segment.of_corpora(read * stage.batch_sequences + rows, self.seed)
        batch = np.empty((len(rows), stage.context_length + 1), dtype=np.int64)
        for which, (name, _) in enumerate(stage.mixture):
            if (here := number == which).any():
                batch[here] = self._windows(segment, name, positions[here])
        return batch

    def _windows(self, segment: Segment, corpus: str, positions: npt.NDArray[np.int64]) -> Tokens:
        """The windows [n, T + 1] of one corpus at these positions of a segment."""
        reading, context = segment.readings[corpus], segment.stage.context_length
        starts = reading.starts(positions, context, segment.keys(self.seed, corpus))
        return self.corpora[corpus][reading.indices(starts, context + 1)]

    def _segment_at(self, step: int) -> tuple[Segment, int]:
        """The segment that `step` belongs to, and the steps before it."""
        require(
            0 <= step < self.total_steps,
            f"step={step} is outside this run of {self.total_steps} steps; for example step={self.total_steps - 1}.",
        )
        index = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return self.segments[index], self._first_steps[index]


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
