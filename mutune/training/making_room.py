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
    works = [*_spread(spec, parallel, processes, fits), *_processes(spec, parallel, processes, fits, more)]
    works += _context(spec, parallel, processes, fits)
    if not works:
        return "advice     nothing that was tried is enough, by estimate; take a smaller target.model, at the transfer"
    return f"advice     one would fit, by estimate, with {', or '.join(works)}"


def _spread(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits) -> Iterator[str]:
    """What the same processes can do."""
    if not parallel.reshard and fits(spec, replace(parallel, reshard=True), processes):
        yield "parallel.reshard=true"
    if parallel.replicas > 1 and fits(spec, replace(parallel, replicas=1), processes):
        yield "parallel.replicas=1"
    for more in RECOMPUTED[RECOMPUTED.index(parallel.activation_checkpointing) + 1 :]:
        if fits(spec, replace(parallel, activation_checkpointing=more), processes):
            yield f"parallel.activation_checkpointing={more}"
            return


def _processes(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits, more: str | None) -> Iterator[str]:
    """The fewest further processes that are enough, as it is and with all blocks computed again."""
    if more is None:
        return
    batch = math.gcd(*(stage.batch_sequences for stage in spec.stages))
    counts = [n for n in range(processes + 1, batch + 1) if batch % n == 0 and n % parallel.replicas == 0]
    full = replace(parallel, activation_checkpointing=RECOMPUTED[-1])
    for way, words in ((parallel, ""), (full, f" parallel.activation_checkpointing={RECOMPUTED[-1]}")):
        if not words or (way != parallel and not fits(spec, way, processes)):
            count = next((n for n in counts if fits(spec, way, n)), None)
            if count is not None:
                yield f"{more}{count}{words}"


def _context(spec: RunSpec, parallel: ParallelConfig, processes: int, fits: Fits) -> Iterator[str]:
    """The longest context that fits, of halves of the longest one."""
    longest = max(stage.context_length for stage in spec.stages) // 2
    while longest >= SHORTEST:
        stages = tuple(replace(s, context_length=min(s.context_length, longest)) for s in spec.stages)
        if fits(replace(spec, stages=stages), parallel, processes):
            yield f"contexts of at most {longest:,} in target.stages, at the transfer"
            return
        longest //= 2
