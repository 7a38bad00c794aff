"""What a target's run says of itself while it is under way."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mutune.progress import clock
from mutune.training.checkpoint import GONE_BACK, aside_bytes, list_steps
from mutune.training.loop import Record
from mutune.training.price import price
from mutune.training.result import CHECKPOINTS
from mutune.training.run import Run
from mutune.training.throughput import Throughput

MAX_SAID = 120  # characters of what a backend says


def opening(directory: Path, run: Run, start: int, threads_by: str) -> str:
    """What is about to be trained, and by what.

    Args:
        threads_by: what set the number of CPU threads.
    """
    total, where, world = run.spec.num_steps, run.world.device, run.world
    if start == total:
        return f"finished   {directory.name} was; its figures and report are made again → {directory}/"
    verb = "resuming" if list_steps(directory / CHECKPOINTS) else "branching"
    how = (
        f"{verb:<10} {directory.name} at step {start:,} of {total:,}"
        if start
        else f"training   {directory.name}: {price(run.spec).parameters:,} parameters, {total:,} steps"
    )
    threads = torch.get_num_threads()
    by = f"{threads} thread{'s' if threads > 1 else ''} ({threads_by})"
    on = by if where.type == "cpu" else f"{where} and {by}"
    on = f"{world.size} processes, each by {on}" if world.size > 1 else on
    return f"{how}, by {on} → {directory}/"


def aside(directory: Path, steps: Sequence[int]) -> list[str]:
    """The line about the checkpoints of these steps, which were set aside; none where none was."""
    if not steps:
        return []
    root = directory / CHECKPOINTS
    return [
        f"set aside  the newer checkpoints {', '.join(f'{step:,}' for step in steps)}: {root}/<step>.aside, "
        f"{aside_bytes(root, steps) / 2**20:,.0f} MiB; nothing reads or deletes them, so that is yours to do"
    ]


def gone_back_already(directory: Path, resume: int | None, start: int) -> list[str]:
    """The line about a `resume=` that was done by a start before this one; none where it is done now."""
    if resume is None or resume == start:
        return []
    return [
        f"note       resume={resume} was done before, and the run goes on from what it has reached since; to go back "
        f"there once more, remove {directory / CHECKPOINTS / GONE_BACK}"
    ]


def read_again(run: Run) -> list[str]:
    """The lines about stages of a branch that find too little text that no step before them has read."""
    return [
        f"note       stage {part.number + 1} reads {' and '.join(name or run.corpus.name for name in part.again)} "
        f"afresh: of what no step before it has read, there are fewer whole windows of "
        f"{part.stage.context_length:,} tokens than the {part.stage.num_windows:,} it needs"
        for part in run.loader.segments
        if part.again
    ]


def progress(name: str, record: Record, total: int, elapsed: float, throughput: Throughput) -> str:
    """The line of progress after a step."""
    speed = [f"{record['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in record else []
    speed += [f"MFU {record['mfu']:.0%}"] if "mfu" in record else []
    speed += [f"cost {record['cost']:,.2f}"] if "cost" in record else []
    left = throughput.seconds_left
    told = [
        f"{name} step {record['step']:,}/{total:,}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.3g}",
        *speed,
        f"{clock(elapsed)} elapsed",
        *([f"about {clock(left)} left"] if left is not None else []),
    ]
    return " · ".join(told)


def stopped(directory: Path, step: int, total: int, why: str) -> str:
    """What to say of a run that was asked to stop after `step`, and where it goes on."""
    root, steps = directory / CHECKPOINTS, list_steps(directory / CHECKPOINTS)
    kept = f"the newest checkpoint is {root}/{max(steps)}, from which the same command goes on" if steps else ""
    none = "no checkpoint was saved yet, so that the same command begins anew"
    return f"stopped    after step {step:,} of {total:,}: {why}; {kept or none}"


def diverged(record: Record, checkpoints: Path) -> str:
    """What to say of a run that diverged, and which checkpoint is from before it."""
    step = record["step"]
    good = [saved for saved in list_steps(checkpoints) if saved < step - 1]  # the loss is that of step - 1 updates
    kept = f"the newest checkpoint before it is {checkpoints}/{max(good)}" if good else "no checkpoint is before it"
    return (
        f"the run diverged at step {step:,} (loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}); "
        f"{kept}. The same command meets the same batches again: guard.policy=rollback leaves such out, and if others "
        "end the run too the rate is too high, as in a transfer with a lower hyperparameters.learning_rate."
    )


def lost(directory: Path, error: RuntimeError) -> str:
    """What to say where another process of the run is gone."""
    steps = list_steps(directory / CHECKPOINTS)
    saved = f"its newest checkpoint is of step {max(steps):,}" if steps else "it had saved no checkpoint yet"
    said = str(error).strip().splitlines()[0][:MAX_SAID]
    return (
        f"another process of {directory.name} is gone ({said}); {saved}, from which the same command goes on, with as "
        "many processes or others; torchrun's report says which it was and why."
    )
