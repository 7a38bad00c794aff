"""A target's run under way: what its records are told to, and how it ends, is stopped or is over its time."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.config import TrainConfig
from mutune.door import StopRequest, Terminated, WorkFailed, drawn
from mutune.progress import ProgressLine
from mutune.training.config import stage_ends
from mutune.training.launched import is_launched
from mutune.training.result import CHECKPOINTS
from mutune.training.throughput import Throughput, rates
from mutune.training.writers import Writer, open_writers

FIRST_STEPS = 4  # after which it is known how long the run will take
DRAW_SECONDS = 60.0  # between drawings of a run that is under way
STARTED = time.monotonic()

if TYPE_CHECKING:
    from mutune.training.branch import Branch
    from mutune.training.guard import Guard
    from mutune.training.loop import Record
    from mutune.training.run import Run
    from mutune.training.target import Target


class Audience:
    """What a run's records are told to: the line of progress, the writers that were asked for, the figure of the loss.

    Args:
        directory: of the run.
        start: updates done before the first record.
        every: steps between checkpoints, at which the figure is drawn too.
    """

    def __init__(self, run: "Run", directory: Path, writers: list[Writer], line: ProgressLine, start: int, every: int):
        self._run, self._directory, self._writers, self._line = run, directory, writers, line
        self._start, self._every = start, every
        self._seen = line.elapsed
        self.last = start

    def hear(self, record: "Record", throughput: Throughput) -> None:
        """The next record; it may be of an earlier step than the one before it, where the run has gone back."""
        for writer in self._writers:
            if record["step"] <= self.last:
                writer.rewind(record["step"] - 1)
            writer.write(record)
        self.last = record["step"]
        if self._run.world.is_first:
            self._show(record, throughput)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._run.world.is_first:
            self._line.say(text)

    def _show(self, record: "Record", throughput: Throughput) -> None:
        from mutune.reporting.figures import draw_train
        from mutune.training.sentences import progress

        line, saved = self._line, record["step"] % self._every == 0
        words = progress(self._directory.name, record, self._run.spec.num_steps, line.elapsed, throughput)
        line.show(words, change=saved or record["step"] == self._start + FIRST_STEPS)
        if saved and line.elapsed - self._seen > DRAW_SECONDS:
            drawn(lambda: draw_train(self._directory))
            self._seen = line.elapsed


def run_to_end(
    config: TrainConfig,
    run: "Run",
    directory: Path,
    start: int,
    meta: dict[str, Any],
    guard: "Guard",
    so_far: tuple[float, float],
    branch: "Branch | None",
) -> None:
    """Train from step `start` to the last one, or until the run is asked to stop, which is saved.

    Args:
        meta: what travels with each checkpoint.
        so_far: seconds and cost of the run, over all starts before this one.

    Raises:
        WorkFailed: it diverged, or the guard paused it.
        KeyboardInterrupt, Terminated: it was asked to stop.
    """
    from mutune.training.sentences import diverged, stopped
    from mutune.training.target import Paused

    total = run.spec.num_steps
    every = config.checkpoint_every or max(1, total // 20)
    with StopRequest(patient=is_launched()) as stop, _audience(config, run, directory, start, every) as audience:
        target = _target(config, run, directory, meta, guard, so_far, branch, every, audience.say)
        record: Record | None = None
        try:
            for record in target.records(start, lambda: stop.requested or _is_late(config)):
                audience.hear(record, target.throughput)
        except Paused as paused:
            raise WorkFailed(str(paused)) from paused
        except (KeyboardInterrupt, Terminated):  # a second signal, which did not wait
            audience.say(stopped(directory, audience.last, total, "at once"))
            raise
        assert record is not None, "there was a step to train"
        if record["diverged"]:
            raise WorkFailed(diverged(record, directory / CHECKPOINTS))
        if record["step"] < total:
            audience.say(stopped(directory, record["step"], total, _why(stop, config)))
            stop.obey()


@contextmanager
def _audience(config: TrainConfig, run: "Run", directory: Path, start: int, every: int) -> Iterator[Audience]:
    with closing(ProgressLine()) as line, ExitStack() as opened:
        asked = config.writers if run.world.is_first else []
        writers = open_writers(asked, directory, directory.name, run.spec.as_dict(), start)
        for writer in writers:
            opened.callback(writer.close)
        yield Audience(run, directory, writers, line, start, every)


def _target(
    config: TrainConfig,
    run: "Run",
    directory: Path,
    meta: dict[str, Any],
    guard: "Guard",
    so_far: tuple[float, float],
    branch: "Branch | None",
    every: int,
    say: Callable[[str], None],
) -> "Target":
    """The run, with its checkpoints and its guard."""
    from mutune.training.checkpoint import kept_every
    from mutune.training.target import Target

    root, world = directory / CHECKPOINTS, run.world
    asked_for = world.share(world.together(lambda: kept_every(root, config.keep_every) if world.is_first else []))
    return Target(
        run,
        directory,
        guard,
        meta,
        every=[every, *asked_for],
        kept=_kept(config, [end for end, _ in stage_ends(run.spec.stages)], asked_for),
        background=_in_background(config, run),
        say=say,
        measure=_throughput(config, run),
        seconds=so_far[0],
        cost=so_far[1],
        origin=branch.checkpoint if branch else None,
    )


def _is_late(config: TrainConfig) -> bool:
    return config.time_limit is not None and time.monotonic() - STARTED > 60 * config.time_limit


def _why(stop: StopRequest, config: TrainConfig) -> str:
    """Why a run was stopped."""
    late = f"time_limit={config.time_limit or 0:g} minutes are over"
    return stop.signal or (late if _is_late(config) else "another process was asked to")


def _kept(config: TrainConfig, ends: list[int], kept_every: list[int]) -> Callable[[list[int]], list[int]]:
    """Which checkpoints stay: the newest, the ends of stages, what any `keep_every=` of this run asked for, and for the
    guard to go back to the newest that is older than two windows, with those that will be it in time.
    """
    window = config.guard.window

    def kept(steps: list[int]) -> list[int]:
        marked = [s for s in steps if s in ends or any(s % every == 0 for every in kept_every)]
        old = [s for s in steps if s <= steps[-1] - 2 * window][-1:] or steps[:1]
        for step in steps:
            if step >= old[-1] + window:
                old.append(step)
        return [*steps[-config.keep_checkpoints :], *marked, *old]

    return kept


def _in_background(config: TrainConfig, run: "Run") -> bool:
    wanted = config.background_checkpoints
    return run.world.device.type == "cuda" if wanted is None else wanted


def _throughput(config: TrainConfig, run: "Run") -> Callable[[int, float], Throughput]:
    """(step, cost so far) → what measures the records from there on."""
    known = rates(
        str(run.world.device),
        str(run.spec.loop.settled().dtype),
        hardware=config.hardware,
        peak_flops=config.peak_flops,
        gpu_hour=config.gpu_hour,
    )

    def measure(step: int, cost: float) -> Throughput:
        return Throughput(run.spec, str(run.world.device), known, processes=run.world.size, start_step=step, cost=cost)

    return measure
