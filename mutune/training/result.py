"""What a run leaves: the names of its files, and what it says once it is over; torch is not loaded for that."""

import shutil
from dataclasses import dataclass
from pathlib import Path

METRICS, CHECKPOINTS, PREDICTION = "metrics.jsonl", "checkpoints", "prediction.json"
LEFT_OUT = "rolled_back.jsonl"  # records of steps that were made again
SMOOTHED = 0.05  # of a run: over how many steps a training loss is averaged


@dataclass(frozen=True)
class RunResult:
    """What a run that is over has to say.

    Attributes:
        value: final held-out loss in nats per token; for a diverged run the worst finite loss it saw, and at least
            ln(vocabulary), so that a search can learn from it.
        diverged: whether the run left the stated bounds and stopped.
        bits_per_byte: final held-out bits per byte; None for a diverged run.
        num_steps: updates done.
        seconds: wall time.
        finished: whether it is over. One that is paused has its smoothed training loss as `value`.
    """

    value: float
    diverged: bool
    bits_per_byte: float | None
    num_steps: int
    seconds: float
    finished: bool = True


def discard(directory: Path) -> None:
    """Drop the checkpoint of a run that does not go on; once its result is kept, where it has one."""
    shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)


def smoothing(num_steps: int) -> int:
    """Steps over which the training loss of a run is averaged: a twentieth of the run."""
    return max(1, round(SMOOTHED * num_steps))
