"""A study run by jobs of a cluster: each is the same command, with workers of its own, in the folder of the first.

What starts them takes no trial. It watches, says where the study stands, and concludes. Interrupted, it ends them;
killed, it leaves them, and they end the study without it.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from mutune.errors import Refusal, first_line, require
from mutune.search.claims import ONE_HOST, members
from mutune.search.config import WHERE, without_password
from mutune.search.workers import GRACE_SECONDS, RunAll, WorkError, Workers

Task = TypeVar("Task")
Result = TypeVar("Result")

PACKAGES = {"slurm": "submitit", "ray": "ray"}
FOLDER = "jobs"
CONCLUDE_SECONDS = 60.0  # for the figures and the page of a finished study
QUEUE_SECONDS = 30.0  # between two looks at the cluster's queue


class Jobs(Protocol):
    """Jobs that were started."""

    def ended(self) -> list[str]:
        """How each one ended that is over."""

    def stop(self) -> None:
        """End them; they save what they have."""

    def join(self) -> None:
        """The study is over: let those conclude that would end with this process."""


def check_launcher(launcher: str, storage: str) -> None:
    """Refuse a launcher that is not there, or a storage that its jobs could not use.

    Raises:
        Refusal: as said.
    """
    if launcher == "local":
        return
    package = PACKAGES[launcher]
    require(
        importlib.util.find_spec(package) is not None,
        f"launcher={launcher} needs {package}, which is not installed; for example pip install 'mutune[{launcher}]'.",
    )
    require(
        launcher != "slurm" or shutil.which("sbatch") is not None,
        "launcher=slurm needs the command sbatch, which this host does not have; for example launcher=local.",
    )
    require(
        storage not in ONE_HOST,
        f"search.storage={storage} is for one host, and launcher={launcher} may use many; for example "
        "search.storage=journal, or search.storage=postgresql+psycopg://user@host/database.",
    )
    require(
        storage == without_password(storage),
        f"search.storage={without_password(storage)} has a password, which launcher={launcher} would write into its "
        "files; put it into ~/.pgpass or PGPASSWORD, for example search.storage=postgresql+psycopg://user@host/database.",
    )


@dataclass(frozen=True)
class Launch:
    """Where a study runs.

    Attributes:
        launcher: `local`, `slurm` or `ray`. jobs: how many. workers: of each.
        resources: what each job asks of the cluster, as submitit's `update_parameters` or Ray's `remote` takes it.
    """

    launcher: str
    jobs: int
    workers: int
    resources: Mapping[str, Any]


@contextmanager
def runner(
    function: Callable[[Task], Result], where: Launch, words: Sequence[str], directory: Path
) -> Iterator[RunAll[Task, Result]]:
    """What runs a study's trials: workers of this process, or jobs of a cluster, which it then only watches.

    Args:
        function: runs one.
        words: the command line that a job repeats.
        directory: the study's folder; logs of jobs go to `jobs` in it.

    Raises:
        Refusal: the cluster does not know such resources, or cannot be reached.
    """
    if where.launcher == "local":
        with Workers(function, where.workers) as pool:
            yield pool.run
        return
    count = max(1, where.jobs - len(members(directory)))  # an earlier start may have left some at work
    asked = [word for word in words if not re.match(rf"[+~]*({'|'.join(WHERE)})[.=]", word)]
    command = [sys.executable, "-m", "mutune.sweep", *asked, f"workers={where.workers}"]
    jobs = _start(where, count, command, directory / FOLDER)
    try:
        yield partial(_watch, jobs, count, directory / FOLDER)
    except BaseException:
        jobs.stop()
        raise
    jobs.join()


def _start(where: Launch, count: int, command: Sequence[str], folder: Path) -> Jobs:
    kind: type[_Slurm] | type[_Ray] = _Slurm if where.launcher == "slurm" else _Ray
    try:
        return kind(count, command, where, folder)
    except (TypeError, ValueError, NameError, RuntimeError, ConnectionError, subprocess.SubprocessError) as error:
        raise Refusal(
            f"launcher={where.launcher} with resources={dict(where.resources)} could not start a job "
            f"({first_line(error)}); for example resources={{}}."
        ) from error


def _watch(
    jobs: Jobs, count: int, logs: Path, tasks: Iterable[Task], tick: Callable[[list[Task]], None]
) -> Iterator[tuple[Task, Any]]:
    """In the place of `Workers.run`: runs nothing itself.

    Raises:
        WorkError: every job has ended, and something is still to do.
    """
    ended = jobs.ended()
    if len(ended) == count:
        raise WorkError(f"every job has ended ({', '.join(ended)}); what they said is in {logs}")
    return iter(())


def member(command: Sequence[str], folder: str, log: str | None = None) -> int:
    """A job's whole work: the command, which ends with it."""
    with open(log, "a") if log else open(os.devnull) as said:
        process = subprocess.Popen(
            command, cwd=folder, stdout=said if log else None, stderr=subprocess.STDOUT if log else None
        )
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()


class _Slurm:
    def __init__(self, count: int, command: Sequence[str], where: Launch, folder: Path) -> None:
        import submitit

        executor = submitit.AutoExecutor(folder, cluster="slurm")
        executor.update_parameters(**{"name": "mutune", "cpus_per_task": where.workers, **where.resources})
        with executor.batch():
            self._jobs = [executor.submit(member, list(command), os.getcwd()) for _ in range(count)]
        self._looked, self._gone = time.monotonic(), set[str]()

    def ended(self) -> list[str]:
        if time.monotonic() - self._looked > QUEUE_SECONDS:
            self._looked, self._gone = time.monotonic(), self._not_queued()
        return [said for job in self._jobs if (said := self._end(job))]

    def _end(self, job: Any) -> str:
        """How a job ended; an empty string where it has not."""
        if job.paths.result_pickle.exists():
            return f"{job.job_id}: exit code {job.result()}"
        return f"{job.job_id}: killed" if job.job_id in self._gone else ""

    def _not_queued(self) -> set[str]:
        """Jobs that the queue does not know any more; none where it does not answer. It needs no accounting."""
        names = {job.job_id for job in self._jobs}
        whole = sorted({name.partition("_")[0] for name in names})
        answer = subprocess.run(
            ["squeue", "--noheader", "--array", "--format=%i", "--jobs", ",".join(whole)],
            capture_output=True,
            text=True,
        )
        known = answer.returncode == 0 or "Invalid job id" in answer.stderr
        return names - set(answer.stdout.split()) if known else set()

    def stop(self) -> None:
        for job in self._jobs:
            if not self._end(job):
                job.cancel(check=False)

    def join(self) -> None:
        """They need nobody."""


class _Ray:
    def __init__(self, count: int, command: Sequence[str], where: Launch, folder: Path) -> None:
        import ray

        self._ray = ray
        if not ray.is_initialized():
            handler = signal.getsignal(signal.SIGTERM)
            ray.init(log_to_driver=False)
            signal.signal(signal.SIGTERM, handler)  # Ray's own aborts
        folder.mkdir(parents=True, exist_ok=True)
        remote = ray.remote(**{"num_cpus": where.workers, "max_retries": 0, **where.resources})(member)
        self._jobs = [
            remote.remote(list(command), os.getcwd(), str(folder.absolute() / f"{i}.log")) for i in range(count)
        ]

    def ended(self) -> list[str]:
        over, _ = self._ray.wait(self._jobs, num_returns=len(self._jobs), timeout=0)
        return [f"{self._jobs.index(job)}.log: exit code {self._code(job)}" for job in over]

    def _code(self, job: Any) -> Any:
        try:
            return self._ray.get(job)
        except Exception as error:  # of Ray's own, or what killed the job
            return first_line(error)

    def stop(self) -> None:
        for job in self._jobs:
            self._ray.cancel(job)
        self._ray.wait(self._jobs, num_returns=len(self._jobs), timeout=GRACE_SECONDS)

    def join(self) -> None:
        self._ray.wait(self._jobs, num_returns=len(self._jobs), timeout=CONCLUDE_SECONDS)
