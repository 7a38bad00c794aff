"""The largest micro-batch that fits on the present device: by arithmetic first, then by really running it."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mutune.training.config import ParallelConfig, RunSpec
from mutune.training.device import device_name, free_memory, kind_of
from mutune.training.making_room import advice
from mutune.training.peak import measure_step
from mutune.training.price import price, sequences_of
from mutune.training.quote import balanced, largest, setting

MOST_TRIALS = 6
WORTH = 1.1  # times as many sequences, for which one more trial is made
FAR = 1.25  # times what is free, that one sequence needs by estimate, and is not tried: memory would swap
WORSE = 1.5  # times its estimate, that what ran out of memory is taken to need


@dataclass(frozen=True)
class Fit:
    """The most sequences per forward pass of one stage, what they were estimated to need and what they needed.

    `sequences` is 0 where not even one fits.
    """

    sequences: int
    share: int
    estimated: int
    measured: int
    have: int


def fit_here(spec: RunSpec, parallel: ParallelConfig, device: str) -> list[Fit]:
    """What fits, stage by stage, on the device of that name, in one process."""
    where = device_name(device)
    return [_fit_stage(spec, parallel, i, where) for i in range(len(spec.stages))]


def _fit_stage(spec: RunSpec, parallel: ParallelConfig, stage: int, where: str) -> Fit:
    have, share = free_memory(where), sequences_of(spec.stages[stage], 1)

    def estimate(sequences: int) -> int:
        return stage_bytes(spec, parallel, stage, sequences, where)

    def measure(sequences: int) -> int | None:
        return measure_step(spec, stage, sequences, where, parallel)

    sequences, measured = search(share, have, estimate, measure)
    return Fit(sequences, share, estimate(max(1, sequences)), measured, have)


def search(
    share: int, have: int, estimate: Callable[[int], int], measure: Callable[[int], int | None]
) -> tuple[int, int]:
    """The most of `share` sequences that were measured to fit into `have` bytes, and what they took; 0 where none did.

    Every measurement corrects the estimates of the next one.

    Args:
        measure: bytes, or None where memory ran out.
    """
    best, taken, too_many, correction = 0, 0, share + 1, 1.0
    for _ in range(MOST_TRIALS):
        tried = largest(too_many - 1, lambda n, c=correction: c * estimate(n) <= have)  # type: ignore[misc]
        if not best and estimate(1) > FAR * have:
            break
        if tried <= best:  # the estimates are of no more use: one by itself, else what lies between
            tried = (best + too_many) // 2 if best else min(1, too_many - 1)
        tried = balanced(tried, share)
        if tried <= WORTH * best:
            break
        found = measure(tried)
        correction = WORSE * correction if found is None else found / estimate(tried)
        if found is None or found > have:
            too_many = tried
        else:
            best, taken = tried, found
    return best, taken


def stage_bytes(spec: RunSpec, parallel: ParallelConfig, stage: int, sequences: int, where: str) -> int:
    """Estimate of one process on the present device, with so many sequences per forward pass."""
    given = replace(parallel, micro_sequences=sequences)
    return price(spec, given, device=kind_of(where), heap=where == "cpu").stages[stage].memory.total


def advice_here(spec: RunSpec, parallel: ParallelConfig, device: str, found: list[Fit]) -> str:
    """What to change where not one sequence of a stage fits on the device of that name."""
    where = device_name(device)

    def fits(run: RunSpec, way: ParallelConfig, processes: int) -> bool:
        parts = price(run, replace(way, micro_sequences=1), processes, kind_of(where), heap=where == "cpu").stages
        return all(
            part.memory.total <= (fit.have if fit.sequences else min(fit.have, fit.estimated - 1))  # which was tried
            for part, fit in zip(parts, found, strict=True)
        )

    return advice(spec, parallel, 1, fits, "torchrun --nproc-per-node=" if where == "cuda" else None)


def fit_table(found: list[Fit], help_out: str = "") -> str:
    """What was found, and what to set.

    Args:
        help_out: the line for a run that does not fit.
    """
    lines = []
    for number, fit in enumerate(found, 1):
        if fit.sequences == 0:
            lines.append(
                f"stage {number}    not one sequence fits into the {fit.have / 2**30:,.2f} GiB that are free: about "
                f"{fit.estimated / 2**30:,.2f} GiB are needed"
            )
            continue
        lines.append(
            f"stage {number}    {fit.sequences:,} of {fit.share:,} sequences at a time: "
            f"{fit.measured / 2**30:,.2f} GiB measured, {fit.estimated / 2**30:,.2f} GiB estimated, "
            f"{fit.have / 2**30:,.2f} GiB free"
        )
    if all(fit.sequences for fit in found):
        lines.append(f"set        {setting([fit.sequences for fit in found], [fit.share for fit in found])}")
    else:
        lines.append(help_out)
    return "\n".join(lines)
