"""What to change where not one sequence per forward pass fits: each setting tried by estimate, no torch."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from mutune.training.config import RECOMPUTED, ParallelConfig, RunSpec

SHORTEST = 32  # tokens of a context that is still advised
#: (run, how it is spread, processes) → whether one sequence per forward pass fits in every stage.
Fits = Callable[[RunSpec, ParallelConfig, int], bool]


def advice(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits, more: str | None) -> str:
    """The line that says under which settings, each by itself, one sequence would fit.

    Args:
        fits: by estimate.
        more: how a larger number of processes is asked for, such as `gpus=`; None where more would not help.
    """
    full = replace(parallel, activation_checkpointing=RECOMPUTED[-1])
    leanest = replace(full, replicas=1, reshard=True)

    def spread(way: ParallelConfig, counts: list[int]) -> list[str]:
        """The fewest of so many processes that are enough, spread in that way."""
        count = next((n for n in counts if n % way.replicas == 0 and fits(spec, way, n)), None)
        return [] if count is None else [_words(parallel, way, f"{more}{count}" if count != processes else "")]

    more_processes = _counts(spec, processes) if more else []
    works = list(_alone(spec, parallel, processes, fits)) or spread(leanest, [processes])
    works += spread(parallel, more_processes)
    works += [] if fits(spec, full, processes) else spread(full, more_processes)
    works = works or spread(leanest, more_processes)
    works += _context(spec, parallel, processes, fits)
    if not works:
        return "advice     nothing that was tried is enough, by estimate; take a smaller target.model, at the transfer"
    return f"advice     one would fit, by estimate, with {', or '.join(works)}"


def _alone(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits) -> Iterator[str]:
    """What one key does for the same processes."""
    if not parallel.reshard and fits(spec, replace(parallel, reshard=True), processes):
        yield "parallel.reshard=true"
    if parallel.replicas > 1 and fits(spec, replace(parallel, replicas=1), processes):
        yield "parallel.replicas=1"
    for more in RECOMPUTED[RECOMPUTED.index(parallel.activation_checkpointing) + 1 :]:
        if fits(spec, replace(parallel, activation_checkpointing=more), processes):
            yield f"parallel.activation_checkpointing={more}"
            return


def _counts(spec: RunSpec, processes: int) -> list[int]:
    """Larger numbers of processes that share every stage's batch evenly."""
    batch = math.gcd(*(stage.batch_sequences for stage in spec.stages))
    return [count for count in range(processes + 1, batch + 1) if batch % count == 0]


def _words(now: ParallelConfig, way: ParallelConfig, processes: str) -> str:
    """The keys that make `way` of how it is spread now."""
    changed = [(key, value) for key, value in vars(way).items() if value != getattr(now, key)]
    return " ".join([*([processes] if processes else []), *(f"parallel.{key}={str(v).lower()}" for key, v in changed)])


def _context(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits) -> Iterator[str]:
    """The longest context that fits, of halves of the longest one."""
    longest = max(stage.context_length for stage in spec.stages) // 2
    while longest >= SHORTEST:
        stages = tuple(replace(s, context_length=min(s.context_length, longest)) for s in spec.stages)
        if fits(replace(spec, stages=stages), parallel, processes):
            yield f"contexts of at most {longest:,} in target.stages, at the transfer"
            return
        longest //= 2
