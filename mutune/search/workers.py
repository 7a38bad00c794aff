"""Worker processes: one thread each, started by spawn, gone when their parent is gone."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from mutune.parametrization.finding import AuditError

Task = TypeVar("Task")
Result = TypeVar("Result")

#: Workers that may die (out of memory, kill -9) without any task finishing in between, before the work stops.
MAX_LOSSES = 3
POLL_SECONDS = 1.0


class WorkError(Exception):
    """A task raised, or workers kept dying. The message holds the task and its traceback, or what an audit found."""


def default_workers() -> int:
    """As many as the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass
class _Worker(Generic[Task]):
    process: BaseProcess
    connection: Connection
    task: Task | None = None


def run_all(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    workers: int,
    tick: Callable[[list[Task]], None] = lambda running: None,
) -> Iterator[tuple[Task, Result]]:
    """Run `function` on every task in worker processes; yield (task, result) as they finish.

    A task whose worker dies is run again in a new worker.

    Args:
        function: a module-level function; it and its tasks and results are pickled.
        tick: called about once a second, and after every result, with the tasks now running.

    Raises:
        WorkError: `function` raised, or workers keep dying.
    """
    waiting, losses = list(tasks), 0
    pool = [_start(function) for _ in range(min(workers, len(tasks)))]
    try:
        while waiting or any(worker.task is not None for worker in pool):
            for worker in pool:
                if worker.task is None and waiting:
                    worker.task = waiting.pop(0)
                    _send(worker)
            tick([worker.task for worker in pool if worker.task is not None])
            busy = [worker for worker in pool if worker.task is not None]
            ready = wait_for([part for w in busy for part in (w.connection, w.process.sentinel)], POLL_SECONDS)
            for worker in busy:
                if worker.connection not in ready and worker.process.sentinel not in ready:
                    continue
                task, answer = worker.task, _receive(worker)
                assert task is not None
                if answer is None:
                    losses += 1
                    if losses > MAX_LOSSES:
                        raise WorkError(f"worker processes keep dying, the last one in {task}; is memory short?")
                    waiting.insert(0, task)
                    pool[pool.index(worker)] = _start(function)
                    continue
                worker.task, losses = None, 0
                failed, result = answer
                if failed:
                    raise WorkError(f"{task} failed:\n{result}")
                yield task, result
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.process.join()
            worker.connection.close()


def _start(function: Callable[[Any], Any]) -> _Worker[Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, function), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _send(worker: _Worker[Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker's sentinel says so next
        worker.connection.send(worker.task)


def _receive(worker: _Worker[Any]) -> tuple[bool, Any] | None:
    """(failed, result or what went wrong), or None where the worker died."""
    try:
        if worker.connection.poll():
            return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        pass
    worker.process.join()
    worker.connection.close()
    return None


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    """A worker's life: take a task, answer, until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            answer = (False, function(task))
        except AuditError as error:
            answer = (True, str(error))
        except Exception:
            answer = (True, traceback.format_exc())
        connection.send(answer)


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
