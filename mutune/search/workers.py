"""Worker processes: one thread each, gone when their parent is gone.

On Linux they are forked by a process that has loaded torch once and does nothing else (`forkserver`); elsewhere each
starts by itself. What they run comes to them by value (`cloudpickle`), so it may be defined in a notebook's cell or
inside a function.
"""

import contextlib
import ctypes
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeAlias, TypeVar

import cloudpickle

from mutune.errors import Refusal
from mutune.parametrization.finding import AuditError

Task = TypeVar("Task")
Result = TypeVar("Result")
#: (tasks, tick) → (task, result) of each as it finishes: what `Workers.run` is.
RunAll: TypeAlias = Callable[[Iterable[Task], Callable[[list[Task]], None]], Iterator[tuple[Task, Result]]]

#: Workers that may die (out of memory, kill -9) without any task finishing in between, before the work stops.
MAX_LOSSES = 3
POLL_SECONDS = 1.0
GRACE_SECONDS = 8.0  # for saving, once the work is to end
#: What workers have loaded when they are forked. None of it starts a thread or touches a GPU.
PRELOADED = ["torch", "torch._dynamo", "mutune.training.run"]  # dynamo: every optimizer of torch does load it
PR_SET_PDEATHSIG = 1  # of Linux' prctl.h


class WorkError(Exception):
    """A task raised, or workers kept dying. The message holds the task and its traceback, or what an audit found.

    Its cause is the `Refusal`, `AuditError` or `UserCodeError` that was raised there, or none.
    """


class UserCodeError(Exception):
    """A function of the user's raised. The message is its traceback, without what called it.

    Args:
        frames: (file, line, function) from the user's outermost frame inwards. The lines themselves are looked up
            where the message is read: a worker does not know the text of a notebook's cells.
        last: the exception itself, as the last lines of a traceback.
    """

    def __init__(self, frames: list[tuple[str, int, str]], last: str) -> None:
        super().__init__(frames, last)
        self.frames, self.last = frames, last

    @classmethod
    def of(cls, error: Exception | SystemExit) -> "UserCodeError":
        """What `error` says, caught where the user's function was called."""
        frames = [(f.filename, f.lineno or 0, f.name) for f in traceback.extract_tb(error.__traceback__)[1:]]
        return cls(frames, "".join(traceback.format_exception_only(error)))

    def __str__(self) -> str:
        frames = [traceback.FrameSummary(file, line, name) for file, line, name in self.frames]
        return "".join(["Traceback (most recent call last):\n", *traceback.format_list(frames), self.last]).rstrip()


class DiskFull(Exception):
    """Nothing more could be written; the message names the file."""


#: What is handed to the parent as it is; every other exception as the text of its traceback.
KNOWN = (AuditError, DiskFull, Refusal, UserCodeError)


def default_workers() -> int:
    """As many as the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Stop:
    """SIGTERM in a worker: it ends at once, unless its task saves itself first."""

    def __init__(self) -> None:
        self.saves, self.requested = False, False

    def note(self, signum: int, frame: types.FrameType | None) -> None:
        self.requested = True
        if not self.saves:
            os._exit(128 + signum)


_STOP = _Stop()


@contextlib.contextmanager
def saving() -> Iterator[Callable[[], bool]]:
    """While it is entered, a worker's task is only asked to stop: it looks at what this yields, saves, and ends."""
    _STOP.saves = True
    try:
        yield lambda: _STOP.requested
    finally:
        _STOP.saves = False
        if _STOP.requested:
            os._exit(128 + signal.SIGTERM)


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
    """Run `function` on every task in worker processes; as `Workers.run`, with workers of its own."""
    with Workers(function, workers) as pool:
        yield from pool.run(tasks, tick)


class Workers(Generic[Task, Result]):
    """Worker processes for one function. They start when there is work, and stay for more until the block is left.

    Args:
        function: any function; it and its tasks are sent by value, and results are pickled.
        workers: at most so many processes; 0 runs the tasks in this one, where what they raise is not caught.
    """

    def __init__(self, function: Callable[[Task], Result], workers: int) -> None:
        self._function, self._workers = function, workers
        self._pickled = cloudpickle.dumps(function) if workers else b""
        self._pool: list[_Worker[Task]] = []

    def __enter__(self) -> "Workers[Task, Result]":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._pool:
            worker.process.terminate()  # what saves itself, saves
        deadline = time.monotonic() + GRACE_SECONDS
        for worker in self._pool:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self._pool.clear()

    def run(
        self, tasks: Iterable[Task], tick: Callable[[list[Task]], None] = lambda running: None
    ) -> Iterator[tuple[Task, Result]]:
        """Run every task; yield (task, result) as they finish. A task whose worker dies is run again in a new one.

        Args:
            tasks: each is taken when a worker is free for it.
            tick: called about once a second, and after every result, with the tasks now running.

        Raises:
            WorkError: the function raised, or workers keep dying. What is running then ends with the block.
        """
        if self._workers == 0:
            yield from _run_here(self._function, tasks, tick)
            return
        waiting, again, losses, pool = iter(tasks), list[Task](), 0, self._pool
        while True:
            while self._has_room() and (task := again.pop() if again else next(waiting, None)) is not None:
                worker = self._free()
                worker.task = task
                _send(worker)
            busy = [worker for worker in pool if worker.task is not None]
            if not busy:
                return
            tick([worker.task for worker in busy if worker.task is not None])
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
                    again.append(task)
                    pool.remove(worker)
                    continue
                worker.task, losses = None, 0
                failure, result = answer
                if failure is not None:
                    raise WorkError(f"{task} failed:\n{failure}") from (failure if isinstance(failure, KNOWN) else None)
                yield task, result

    def _has_room(self) -> bool:
        return len(self._pool) < self._workers or any(worker.task is None for worker in self._pool)

    def _free(self) -> _Worker[Task]:
        """A worker without a task; started, where there is none yet."""
        for worker in self._pool:
            if worker.task is None:
                return worker
        self._pool.append(_start(self._pickled))
        return self._pool[-1]


def _run_here(
    function: Callable[[Task], Result], tasks: Iterable[Task], tick: Callable[[list[Task]], None]
) -> Iterator[tuple[Task, Result]]:
    for task in tasks:
        tick([task])
        try:
            result = function(task)
        except Exception as error:
            error.add_note(f"in {task}")
            raise
        yield task, result
    tick([])


def _start(pickled: bytes) -> _Worker[Any]:
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    context.set_forkserver_preload(PRELOADED)  # which another context does not heed
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, pickled, dict(os.environ)), daemon=True)
    for patience in (0.1, 1.0, 5.0, 0.0):
        try:
            with _no_main(), _as_of_a_worker():
                process.start()
            break
        except (ConnectionError, EOFError):  # what forks workers is just ending; it is started again
            if not patience:
                raise
            time.sleep(patience)
    theirs.close()
    return _Worker(process, ours)


@contextlib.contextmanager
def _as_of_a_worker() -> Iterator[None]:
    """What the process that forks workers begins with: one thread, and deaf to a SIGTERM or Ctrl-C that goes to all,
    since its workers end with it and may be saving.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    resource_tracker.ensure_running()  # by itself it would be started below, and take the block away
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        del os.environ["OMP_NUM_THREADS"]
        os.environ.update({} if threads is None else {"OMP_NUM_THREADS": threads})


@contextlib.contextmanager
def _no_main() -> Iterator[None]:
    """Start workers that do not run the caller's script again: a script needs no `if __name__ == "__main__"`."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _send(worker: _Worker[Any]) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker's sentinel says so next
        worker.connection.send_bytes(cloudpickle.dumps(worker.task))


def _receive(worker: _Worker[Any]) -> tuple[Exception | str | None, Any] | None:
    """(what went wrong, result), or None where the worker died."""
    try:
        if worker.connection.poll():
            return worker.connection.recv()
    except (EOFError, ConnectionResetError):
        pass
    worker.process.join()
    worker.connection.close()
    return None


def _serve(connection: Connection, pickled: bytes, environment: dict[str, str]) -> None:
    """A worker's life: take a task, answer, until the parent closes the pipe or dies.

    Args:
        environment: the parent's; what forks workers has that of the first start.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, _STOP.note)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT])
    if sys.platform == "linux":  # without what forked it nobody would hear of its end, and its task be given to another
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.clear()
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()
    import numpy as np
    import torch

    torch.set_num_threads(1)
    np.random.seed()  # forked workers would all draw the same
    function: Callable[[Any], Any] | None = None
    answer: tuple[Exception | str | None, Any]
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        try:
            function = function or pickle.loads(pickled)
            answer = (None, function(pickle.loads(task)))
        except KNOWN as error:
            answer = (error, None)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            answer = (DiskFull(f"{error}; free some space") if full else traceback.format_exc(), None)
        except Exception:
            answer = (traceback.format_exc(), None)
        connection.send(answer)


def _die_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)
