"""What a run costs on named hardware: memory of a GPU by component, days and money. Arithmetic, no torch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from mutune.errors import require
from mutune.scaling.hardware import CURRENCY, RESERVED, accelerator
from mutune.scaling.memory import Sharding, peak_memory
from mutune.training.config import ParallelConfig, RunSpec
from mutune.training.making_room import advice
from mutune.training.price import StagePrice, forward_pass, price, sequences_of, size_of

GB, DAY, HOUR = 1e9, 86400.0, 3600.0


@dataclass(frozen=True)
class Machine:
    """What a run is priced on: so many GPUs of a kind.

    Attributes:
        peak_flops: of one, FLOP/s, dense, in the run's number format.
        memory_bytes: of one.
        gpu_hour: price of one's hour, in `CURRENCY`.
        mfu: model FLOPs that are computed, over the peak, where nothing is computed again.
    """

    name: str
    gpus: int
    peak_flops: float
    memory_bytes: float
    gpu_hour: float
    mfu: float

    @property
    def usable_bytes(self) -> float:
        """Memory of one that a run may fill."""
        return (1 - RESERVED) * self.memory_bytes

    @property
    def flops(self) -> float:
        """FLOPs per second of all together."""
        return self.gpus * self.mfu * self.peak_flops


@dataclass(frozen=True)
class StageQuote:
    """One stage on a machine: sequences per forward pass, and how long it takes in seconds."""

    price: StagePrice
    sequences: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs together."""
        return self.price.tokens / self.seconds


def machine(
    hardware: str,
    *,
    dtype: str,
    gpus: int,
    mfu: float,
    peak_flops: float | None = None,
    memory_gb: float | None = None,
    gpu_hour: float | None = None,
) -> Machine:
    """GPUs of a kind in the table, with what was set by hand put in.

    Raises:
        Refusal: the table has no such kind.
    """
    kind = accelerator(hardware)
    return Machine(
        hardware,
        gpus,
        peak_flops=kind.peak_flops(dtype) if peak_flops is None else peak_flops,
        memory_bytes=kind.memory_bytes if memory_gb is None else memory_gb * GB,
        gpu_hour=kind.gpu_hour if gpu_hour is None else gpu_hour,
        mfu=mfu,
    )


def quote(spec: RunSpec, parallel: ParallelConfig, on: Machine) -> list[StageQuote]:
    """What each stage takes on a machine.

    Raises:
        Refusal: the batch or the replicas cannot be spread over so many GPUs.
    """
    check_spread(spec, parallel, on.gpus)
    parts = price(spec, parallel, on.gpus, "cuda").stages
    at_once = [forward_pass(spec, number, parallel, on.gpus).sequences for number in range(len(parts))]
    return [
        StageQuote(part, sequences, (part.flops + part.again) / on.flops)
        for part, sequences in zip(parts, at_once, strict=True)
    ]


def check_spread(spec: RunSpec, parallel: ParallelConfig, gpus: int) -> None:
    """Refuse GPUs that do not divide the sequences of a step, and replicas that do not divide the GPUs."""
    fewest = min(stage.batch_sequences for stage in spec.stages)
    require(gpus <= fewest, f"gpus={gpus} is more than the {fewest} sequences of a step; for example gpus={fewest}.")
    for stage in spec.stages:
        sequences = stage.batch_sequences
        works = max(count for count in range(1, gpus + 1) if all(s.batch_sequences % count == 0 for s in spec.stages))
        require(
            sequences % gpus == 0,
            f"gpus={gpus} cannot share the {sequences:,} sequences of a step evenly; for example gpus={works}.",
        )
    require(
        gpus % parallel.replicas == 0,
        f"parallel.replicas={parallel.replicas} does not divide gpus={gpus}; for example parallel.replicas=1.",
    )


def largest_that_fits(spec: RunSpec, parallel: ParallelConfig, on: Machine) -> list[int]:
    """Per stage, the most sequences per forward pass that fit a GPU, in parts of equal size; 0 where none does.

    Raises:
        Refusal: as `quote`.
    """
    check_spread(spec, parallel, on.gpus)

    def of(stage: int) -> int:
        share = sequences_of(spec.stages[stage], on.gpus)
        most = largest(share, lambda n: estimate(spec, parallel, stage, n, on.gpus) <= on.usable_bytes)
        return balanced(most, share)

    return [of(stage) for stage in range(len(spec.stages))]


def estimate(spec: RunSpec, parallel: ParallelConfig, stage: int, sequences: int, gpus: int) -> int:
    """Bytes of a GPU in a stage, with so many sequences per forward pass."""
    given = replace(parallel, micro_sequences=sequences)
    run = forward_pass(spec, stage, given, gpus, "cuda")
    return peak_memory(size_of(spec), run, Sharding(gpus, parallel.replicas, parallel.reshard)).total


def largest(share: int, fits: Callable[[int], bool]) -> int:
    """The most of `share` sequences that fit at a time, where more never fit if fewer do not; 0 where one does not."""
    low, high = 0, share + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def balanced(sequences: int, share: int) -> int:
    """The least number that needs as few forward passes for `share` as `sequences` does, so that they are of a size."""
    return -(-share // -(-share // sequences)) if sequences else 0


def setting(found: list[int], shares: list[int]) -> str:
    """What sets these sequences per forward pass: one number where it does for every stage, else one for each."""
    one = max(found)  # a stage takes no more than its share
    serves = found == [min(one, share) for share in shares]
    return f"parallel.micro_sequences={one if serves else '[' + ','.join(map(str, found)) + ']'}"


def quote_table(spec: RunSpec, parallel: ParallelConfig, on: Machine) -> str:
    """The quote in words and numbers."""
    stages = quote(spec, parallel, on)
    dtype = spec.loop.settled().dtype
    hours = sum(stage.seconds for stage in stages) * on.gpus / HOUR
    lines = [
        f"hardware   {on.gpus} × {on.name}: {on.peak_flops / 1e12:,.4g} TFLOP/s in {dtype} and "
        f"{on.memory_bytes / GB:,.4g} GB each, {on.gpu_hour:,.2f} {CURRENCY} per hour; assumed MFU {on.mfu:.4g}",
        *_memory_lines(stages, on),
    ]
    for number, stage in enumerate(stages, 1):
        money = on.gpus * stage.seconds / HOUR * on.gpu_hour
        lines.append(
            f"stage {number}    {counted(stage.sequences, 'sequence')} at a time; "
            f"{stage.tokens_per_second:,.0f} tokens per second, {_days(stage.seconds)}, {money:,.2f} {CURRENCY}"
            f"{_computed_again(stage)}"
        )
    seconds = sum(stage.seconds for stage in stages)
    lines.append(
        f"costs      {spec.num_steps:,} steps, {_days(seconds)}, {hours:,.1f} GPU hours, "
        f"{hours * on.gpu_hour:,.2f} {CURRENCY}"
    )
    return "\n".join(lines)


def largest_table(spec: RunSpec, parallel: ParallelConfig, on: Machine) -> str:
    """The most sequences per forward pass that fit, and what to set."""
    found = largest_that_fits(spec, parallel, on)
    shares = [sequences_of(stage, on.gpus) for stage in spec.stages]
    lines = []
    for i, (sequences, share) in enumerate(zip(found, shares, strict=True)):
        need = estimate(spec, parallel, i, max(1, sequences), on.gpus) / GB
        fits = f"{sequences:,} of {share:,} sequences at a time" if sequences else "not one sequence fits"
        lines.append(
            f"stage {i + 1}    {fits}: {need:,.1f} GB of the {on.usable_bytes / GB:,.1f} GB to fill, by estimate"
        )
    if all(found):
        lines.append(f"set        {setting(found, shares)}")
        lines.append("next       the same command with that, and dry_run=true in place of fit=true, says what it costs")
    else:
        lines.append(advice(spec, parallel, on.gpus, lambda run, way, gpus: _one_fits(run, way, on, gpus), "gpus="))
    return "\n".join(lines)


def _one_fits(spec: RunSpec, parallel: ParallelConfig, on: Machine, gpus: int) -> bool:
    """Whether one sequence per forward pass fits in every stage."""
    return all(estimate(spec, parallel, i, 1, gpus) <= on.usable_bytes for i in range(len(spec.stages)))


def lacking(spec: RunSpec, parallel: ParallelConfig, on: Machine) -> str | None:
    """Why the run does not fit, in one sentence; None where it does."""
    most, number = max((stage.price.memory.total, i) for i, stage in enumerate(quote(spec, parallel, on), 1))
    if most <= on.usable_bytes:
        return None
    cures = {"none": "selective", "selective": "full"}
    cure = cures.get(parallel.activation_checkpointing)
    works = f"parallel.activation_checkpointing={cure}" if cure else f"gpus={2 * on.gpus}"
    return (
        f"hardware={on.name} has {on.usable_bytes / GB:,.1f} GB to fill and stage {number} needs {most / GB:,.1f} GB; "
        f"for example {works}; fit=true finds what fits, or says what would have to change."
    )


def _memory_lines(stages: list[StageQuote], on: Machine) -> list[str]:
    """One row per component, one column per stage."""
    parts = [stage.price.memory.components() for stage in stages]
    names = list(dict.fromkeys(name for part in parts for name in part))
    head = "".join(f"{f'stage {number}':>10}" for number in range(1, len(stages) + 1))
    rows = [(name, [part.get(name, 0) for part in parts]) for name in names]
    rows.append(("together", [stage.price.memory.total for stage in stages]))
    fits = "".join(f"{'yes' if stage.price.memory.total <= on.usable_bytes else 'no':>10}" for stage in stages)
    asked = f"fits into {on.usable_bytes / GB:,.1f} GB, {1 - RESERVED:.0%} of {on.name}'s"
    return [
        f"memory     {'GB per GPU when it holds most':<52}{head}",
        *(f"{'':11}{name:<52}{''.join(f'{count / GB:>10,.2f}' for count in counts)}" for name, counts in rows),
        f"{'':11}{asked:<52}{fits}",
    ]


def _computed_again(stage: StageQuote) -> str:
    """What of a stage's time goes into blocks that are computed again, where they are."""
    share = stage.price.again / (stage.price.flops + stage.price.again)
    return f"; {share:.0%} of it for blocks that are computed again" if share else ""


def counted(number: int, what: str) -> str:
    """`1 sequence`, `2 sequences`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _days(seconds: float) -> str:
    return f"{seconds / DAY:,.1f} days" if seconds >= DAY else f"{seconds / HOUR:,.2f} hours"
