"""The checkpoints of one run, written by all of its processes, and where it pays while it goes on."""

import errno
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from mutune.parametrization.plan import Plan
from mutune.training import checkpoint
from mutune.training.world import World, is_sharded, shared


class Saver:
    """Writes checkpoints of a run.

    Args:
        root: the folder of its checkpoints, which all processes see.
        plan: the run's.
        kept: of the steps that have a checkpoint, in order, those that stay.
        background: whether training goes on while files are written; what is saved is copied first.
    """

    def __init__(
        self, root: Path, world: World, plan: Plan, kept: Callable[[list[int]], list[int]], *, background: bool = False
    ) -> None:
        self.root, self.world, self.plan, self.kept = root, world, plan, kept
        self.background = background and world.size > 1
        self._group = dist.new_group(backend="gloo") if self.background else None
        self._pending: tuple[int, dict[str, Any], Any] | None = None
        self._keep_all = False

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: dict[str, Any],
        keep_all: bool = False,
    ) -> None:
        """Save the state after `step` updates; every process calls it at the same step.

        Args:
            keep_all: drop no older checkpoint.

        Raises:
            OSError: it could not be written, now or in the background before; the checkpoints before are still there.
        """
        self.finish()
        if self.world.is_first:
            checkpoint.begin(self.root, step)
        self.world.wait()
        tensors = checkpoint.state_of(model, optimizer)
        self._keep_all = keep_all
        self._pending = step, meta, self._start(self.root / f".{step}.partial", tensors)
        if not self.background:
            self.finish()

    def _start(self, partial: Path, tensors: dict[str, torch.Tensor]) -> Any:
        if not any(map(is_sharded, tensors.values())):
            return lambda: checkpoint.write_whole(partial, tensors)
        writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
        if self.background:
            return async_save(tensors, storage_writer=writer, process_group=self._group)
        return lambda: save_shards(tensors, storage_writer=writer)

    def poll(self) -> None:
        """Give a checkpoint its name once its files are written everywhere; every process calls it."""
        if self._pending and isinstance(written := self._pending[2], Future):
            failed = written.done() and written.exception() is not None
            if self.world.any(failed) or not self.world.any(not written.done()):
                self._publish()

    def finish(self) -> None:
        """Wait for what is being written; every process calls it."""
        if self._pending:
            self._publish()
        self.world.wait()

    def _publish(self) -> None:
        assert self._pending
        (step, meta, written), self._pending = self._pending, None
        try:
            written.result() if isinstance(written, Future) else written()
            if self.world.is_first:
                checkpoint.describe(self.root / f".{step}.partial", step, self.plan, meta)
        except BaseException as error:
            if self.world.is_first:
                shutil.rmtree(self.root / f".{step}.partial", ignore_errors=True)
            if isinstance(error, CheckpointException):
                raise shared(_as_os_error(error, self.root)) from error
            raise
        if self.world.is_first:
            checkpoint.publish(self.root, step, (lambda steps: steps) if self._keep_all else self.kept)


def _as_os_error(error: CheckpointException, root: Path) -> OSError:
    """What the system said to whichever process could not write."""
    rank, (cause, _) = next(iter(error.failures.items()))
    number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
    why = cause.strerror if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"
    return OSError(number, f"process {rank} could not write its part of a checkpoint ({why})", str(root))
