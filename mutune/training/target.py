"""A target's run under way: its records, checkpoints and alarms, and going back where the guard says so."""

import json
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from mutune.errors import Refusal
from mutune.files import appended, write_text
from mutune.parametrization.apply import initialise
from mutune.parametrization.forward_pass import reshard
from mutune.training import checkpoint
from mutune.training.alarms import PAUSE, ROLLBACK, Alarm
from mutune.training.config import stage_ends
from mutune.training.guard import Action, Guard
from mutune.training.loop import Record
from mutune.training.result import CHECKPOINTS, LEFT_OUT, METRICS
from mutune.training.run import Run
from mutune.training.saving import Saver
from mutune.training.sentences import aside
from mutune.training.throughput import Throughput
from mutune.training.watch import Watch

ALARMS = "alarms.jsonl"


class Paused(Exception):
    """The guard stopped the run; the message says why, and what to do."""


@dataclass
class Target:
    """A run that keeps what it does under `directory`. Every process has one; the first writes records.

    Attributes:
        meta: what travels with each checkpoint.
        every: steps between checkpoints; each number by itself.
        kept: of the steps that have a checkpoint, in order, those that stay.
        background: whether training goes on while a checkpoint is written.
        say: prints a line that stays.
        measure: (step, cost so far) → what adds speed, memory and cost to the records from there on.
        seconds, cost: of the run so far, over all starts; the latter where a price is known.
        origin: of a branch, the checkpoint that it began with.
    """

    run: Run
    directory: Path
    guard: Guard
    meta: dict[str, Any]
    every: Sequence[int]
    kept: Callable[[list[int]], list[int]]
    background: bool
    say: Callable[[str], None]
    measure: Callable[[int, float], Throughput]
    seconds: float = 0.0
    cost: float = 0.0
    origin: checkpoint.Checkpoint | None = None
    throughput: Throughput = field(init=False)
    _saver: Saver = field(init=False)
    _watch: Watch = field(init=False)
    _told: set[str] = field(init=False)  # lines of alarms

    def __post_init__(self) -> None:
        self._saver = Saver(
            self.directory / CHECKPOINTS, self.run.world, self.run.plan, self.kept, background=self.background
        )
        self.run.loader.skips = self.guard.skips
        path = self.directory / ALARMS
        self._told = {*path.read_text().splitlines(keepends=True)} if path.is_file() else set()

    def records(self, start: int, stop: Callable[[], bool]) -> Iterator[Record]:
        """Train from step `start` to the end, or until some process's `stop` is true, which is saved.

        A record may be of an earlier step than the one before it: then the run has gone back.

        Raises:
            Paused: the guard stopped the run.
        """
        step: int | None = start
        while step is not None:
            step = yield from self._stretch(step, stop)
        self._saver.finish()

    def _stretch(self, start: int, stop: Callable[[], bool]) -> Generator[Record, None, int | None]:
        """From there on; returns the step to go back to, or None where the run is over or stopped."""
        ends = [end for end, _ in stage_ends(self.run.spec.stages)]
        self._watch, self.throughput, before = self.run.watch(self.guard), self.measure(start, self.cost), self.seconds
        with self._written(METRICS) as lines:
            for record in self.run.records(start):
                alarms = self._watch.observe(record)
                action = self.guard.decide(alarms, self.run.loader.stage_start(record["step"] - 1))
                step, stopped = record["step"], self.run.world.any(stop())
                record |= self.throughput.of(record)
                self.cost = record.get("cost", 0.0)
                self.seconds = record["seconds"] = round(before + record["seconds"], 4)
                lines.write(json.dumps(record) + "\n")
                self._tell(alarms, action)
                self._saver.poll()
                if action.do == ROLLBACK:
                    return self._go_back(action, step)
                paused = action.do == PAUSE
                due = step in ends or any(step % every == 0 for every in self.every)
                if not record["diverged"] and (due or stopped or paused):
                    self._save(step, lines, keep_all=paused)
                yield record
                if paused:
                    self._saver.finish()
                    raise Paused(self._pause(action, saved=not record["diverged"]))
                if stopped or record["diverged"]:
                    break
        return None

    def _save(self, step: int, lines: TextIO, keep_all: bool) -> None:
        if self.run.world.is_first:
            os.fsync(lines.fileno())  # a checkpoint never knows a step that the records do not
        meta = {**self.meta, "guard": self.guard.state_dict()}
        self._saver.save(step, self.run.model, self.run.optimizer, meta, keep_all)

    def _go_back(self, action: Action, step: int) -> int:
        """To the newest whole checkpoint from before the trouble, or where none was taken yet to where the run began;
        the batches are left out from now on.

        Newer checkpoints are set aside, and records of the steps that are made again move to `rolled_back.jsonl`.

        Raises:
            Paused: only newer checkpoints are left.
        """
        assert action.before is not None
        self._saver.finish()
        root, skips = self.directory / CHECKPOINTS, (*self.guard.skips, *action.skips)
        rollbacks = (*self.guard.rollbacks, action.skips[0].from_step)
        found, only_newer = self._good(root, action.before)
        if only_newer:
            said = action.sentence.rpartition("\n")[0]  # without what it would have done
            why = f"The run is paused: it cannot go back, as no checkpoint of step {action.before:,} or before is left"
            cure = "more of them stay with keep_every=STEPS, in a run of another name=NAME"
            raise Paused(f"{said}\n{why}; {self._goes_on(saved=False)}, and {cure}.")
        back = found.step if found else 0
        self._load(found)
        self.guard.skips, self.guard.rollbacks, self.run.loader.skips = skips, rollbacks, skips
        told = list[str]()
        if self.run.world.is_first:
            told = aside(self.directory, checkpoint.set_aside(root, back))
            _move_records(self.directory, back)
        self.run.world.wait()
        left_out = sum(skip.num_skipped for skip in action.skips)
        for line in (f"rolled back to step {back:,} from step {step:,}, leaving out {left_out} batches", *told):
            self.say(line)
        return back

    def _good(self, root: Path, before: int) -> tuple[checkpoint.Checkpoint | None, bool]:
        """The newest whole checkpoint of at most that step, as the first process finds it; the run's origin where it
        has none of its own. And whether none is left although it has others.
        """
        mine: tuple[int | None, bool] = None, False
        world = self.run.world
        if world.is_first:
            mine = self._newest_whole(root, before), bool(checkpoint.list_steps(root))
        step, has_some = world.share(mine)
        if step is None:
            return (None if has_some else self.origin), has_some
        return world.together(lambda: checkpoint.read(root / str(step))), False

    def _newest_whole(self, root: Path, before: int) -> int | None:
        """The step of the newest whole checkpoint of at most that step."""
        for step in sorted(checkpoint.list_steps(root), reverse=True):
            if step <= before:
                try:
                    return checkpoint.read(root / str(step)).step
                except Refusal as refusal:
                    self.say(f"note       {refusal}")
        return None

    def _load(self, found: checkpoint.Checkpoint | None) -> None:
        run = self.run
        run.optimizer.zero_grad()
        if found:
            checkpoint.restore(found, run.model, run.optimizer)
            if found is self.origin:
                self.guard.begin_anew()
            else:
                self.guard.load_state_dict(found.meta["guard"])
        else:
            reshard(run.model)
            initialise(run.model, run.plan, run.spec.seed)
            run.optimizer.state.clear()
            self.guard.begin_anew()

    def _pause(self, action: Action, saved: bool) -> str:
        steps = checkpoint.list_steps(self.directory / CHECKPOINTS)
        before = max((step for step in steps if step <= (action.before or 0)), default=None)
        good = "no checkpoint is before it" if before is None else f"resume={before} goes on from the newest before it"
        return f"{action.sentence}\n{good}; {self._goes_on(saved)}."

    def _goes_on(self, saved: bool) -> str:
        """What the same command would do."""
        newest = max(checkpoint.list_steps(self.directory / CHECKPOINTS), default=0)
        where = "where it is" if saved else f"step {newest:,}, the newest that is saved"
        return f"the same command goes on from {where}"

    def _tell(self, alarms: list[Alarm], action: Action) -> None:
        if not alarms or not self.run.world.is_first:
            return
        told = [json.dumps({**alarm.as_dict(), "action": action.do}) + "\n" for alarm in alarms]
        with self._written(ALARMS) as lines:
            lines.writelines(line for line in told if line not in self._told)  # of steps made again after a kill
        self._told.update(told)
        for alarm in alarms:
            self.say(f"alarm      {alarm}")

    def _written(self, name: str) -> TextIO:
        """A file of the run's, which the first process writes."""
        path = self.directory / name
        return appended(path) if self.run.world.is_first else Path(os.devnull).open("a")


def _what(line: str) -> tuple[Any, ...]:
    """What a record is of, whenever it was made; nothing where a kill cut it."""
    try:
        record = json.loads(line)
    except ValueError:
        return ()
    return tuple(record.get(key) for key in ("step", "tokens", "loss", "grad_norm"))


def _move_records(directory: Path, step: int) -> None:
    """Keep the records of steps 1 to `step`; the rest goes to `rolled_back.jsonl`."""
    path, old = directory / METRICS, directory / LEFT_OUT
    lines = path.read_text().splitlines(keepends=True)
    known = {*map(_what, old.read_text().splitlines())} if old.is_file() else set()
    with appended(old) as left_out:
        left_out.writelines(line for line in lines[step:] if _what(line) not in known)  # a kill lets some come twice
        left_out.flush()
        os.fsync(left_out.fileno())
    write_text(path, "".join(lines[:step]))
