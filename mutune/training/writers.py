"""Records for TensorBoard and Weights & Biases, when asked. JSON lines are written in any case, and not here."""

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mutune.errors import require

STEP = "step"  # of a record: what its numbers are drawn over
PROJECT = "mutune"  # under which Weights & Biases files runs, where WANDB_PROJECT names no other


class Writer(Protocol):
    """Whoever gets the records."""

    def write(self, record: dict[str, Any]) -> None:
        """Take one record; its numbers are drawn over `step`."""

    def rewind(self, step: int) -> None:
        """The run has gone back to `step`: what was written after it is no longer so."""

    def close(self) -> None:
        """Write what is still to be written."""


def require_writers(names: Sequence[str]) -> None:
    """Refuse a writer whose package is missing."""
    for name in names:
        require(
            find_spec(name) is not None,
            f"writers={list(names)} needs the package {name}, which is not installed; for example "
            f"pip install 'mutune[{name}]'.",
        )


def open_writers(
    names: Sequence[str], directory: Path, name: str, config: dict[str, Any], start_step: int = 0
) -> list[Writer]:
    """Writers of these names, for a run's folder.

    Args:
        directory: the run's; TensorBoard's files go to `tensorboard/` in it, and what W&B keeps here to `wandb/`.
        name: the run's, as W&B shows it.
        config: what decides the run, as W&B shows it.
        start_step: where a run is resumed; what was written after it is hidden.

    Raises:
        Refusal: a package is missing.
    """
    require_writers(names)
    made: list[Writer] = []
    for each in names:
        if each == "tensorboard":
            made.append(TensorBoard(directory, start_step))
        else:
            made.append(WeightsAndBiases(directory, name, config))
    return made


class TensorBoard:
    """Event files that `tensorboard --logdir <run>/tensorboard` shows."""

    def __init__(self, directory: Path, start_step: int) -> None:
        self._folder = str(directory / "tensorboard")
        self._open(start_step + 1)

    def _open(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(self._folder, purge_step=purge_step)

    def rewind(self, step: int) -> None:
        self.close()
        self._open(step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, resumed under the same id; WANDB_MODE=offline keeps it here.

    Its own count of steps only rises, and what is logged of an earlier one is dropped. So the step of a record is a
    number like the others, over which they are drawn: of steps that are made again both lines are there.
    """

    def __init__(self, directory: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name,
            id=hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16],
            dir=str(directory),
            config=config,
            resume="allow",
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def write(self, record: dict[str, Any]) -> None:
        self._run.log({STEP: record[STEP], **numbers(record)})

    def rewind(self, step: int) -> None:
        """W&B keeps what it has; what is made again is drawn beside it."""

    def close(self) -> None:
        self._run.finish()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """What of a record can be drawn: everything but its step, and `diverged` as 0 or 1."""
    return {
        key: float(value) for key, value in record.items() if key != "step" and isinstance(value, bool | int | float)
    }
