"""The progress of a study as one line: done, best, running, time left; its best values are kept up to date beside."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from mutune.errors import Refusal
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.progress import ProgressLine, clock
from mutune.search.results import read_best, write_best
from mutune.search.storage import TRIALS
from mutune.search.study import Progress
from mutune.search.trial import last_record
from mutune.training.result import METRICS
from mutune.training.schedule import ScheduleConfig


@contextmanager
def followed(
    directory: Path,
    workers: int,
    hyperparameters: Callable[[dict[str, Any]], BaseHyperparameters],
    schedule: Callable[[dict[str, Any]], ScheduleConfig | None] = lambda params: None,
) -> Iterator[Callable[[Progress], None]]:
    """What `run_study` reports to: the progress line, and `best.yaml` in `directory` whenever there is a new best.

    Args:
        hyperparameters: a trial's parameters → all base hyperparameters that it ran with; schedule: its schedule.
    """
    line = SweepProgress(workers, directory / TRIALS)
    written: FrozenTrial | None = None

    def report(progress: Progress) -> None:
        nonlocal written
        line.update(progress)
        if progress.best is not None and progress.best != written:
            written = progress.best
            if _is_confirmed(directory, progress.best.number):
                return  # what was found by more seeds stands until there is a better trial
            params = progress.best.params
            write_best(directory, progress.name, progress.best, hyperparameters(params), schedule(params))

    try:
        yield report
    finally:
        line.close()


def _is_confirmed(directory: Path, trial: int) -> bool:
    """Whether `best.yaml` was chosen from leaders of which this trial is one."""
    try:
        return any(row.trial == trial for row in read_best(directory).confirmed)
    except Refusal:
        return False


@contextmanager
def confirming(name: str) -> Iterator[Callable[[int, int, list[str]], None]]:
    """What the runs that confirm a study's leaders report to."""
    line = ProgressLine()

    def report(done: int, total: int, running: list[str]) -> None:
        now = f" · running {', '.join(running)}" if running else ""
        line.show(f"{name} confirming {done}/{total} runs{now} · {clock(line.elapsed)} elapsed", change=not running)

    try:
        yield report
    finally:
        line.close()


class SweepProgress:
    """Draws a study's progress; the time left is counted from the durations of the trials that are done.

    Args:
        workers: how many run at once.
        trials: the folder of the trials' records.
    """

    def __init__(self, workers: int, trials: Path) -> None:
        self.workers, self._trials = workers, trials
        self._line = ProgressLine()
        self._seen = 0

    def update(self, progress: Progress) -> None:
        """Show where the study stands."""
        best = progress.best
        pruned = f" ({progress.pruned} pruned)" if progress.pruned else ""
        parts = [f"{progress.name} {progress.done}/{progress.total} trials{pruned}"]
        parts.append(f"best {best.value:.4f} (trial {best.number})" if best else "best —")
        if progress.running:
            parts.append(f"running {', '.join(map(self._state, progress.running))}")
        if progress.others:
            parts.append(f"with {', '.join(progress.others)}")
        parts.append(f"{clock(self._line.elapsed)} elapsed")
        if progress.done and progress.done < progress.total:
            parts.append(f"about {clock(self._left(progress))} left")
        self._line.show(" · ".join(parts), change=progress.done != self._seen or progress.done == progress.total)
        self._seen = progress.done

    def close(self) -> None:
        """End the line."""
        self._line.close()

    def _state(self, number: int) -> str:
        """A running trial and how far it has come."""
        last = last_record(self._trials / str(number) / METRICS)
        return f"{number} (step {last['step']:,})" if last else str(number)

    def _left(self, progress: Progress) -> float:
        return progress.seconds_left / max(self.workers, 1)
