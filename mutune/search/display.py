"""The progress of a study as one line: done, best, running, time left."""

from optuna.trial import FrozenTrial

from mutune.progress import ProgressLine, clock
from mutune.search.study import Progress


class SweepProgress:
    """Draws a study's progress; the time left is counted from the durations of the trials that are done.

    Args:
        workers: how many run at once.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.written: FrozenTrial | None = None
        self._line = ProgressLine()
        self._seen = 0

    def update(self, progress: Progress) -> None:
        """Show where the study stands."""
        best = progress.best
        parts = [f"{progress.name} {progress.done}/{progress.total} trials"]
        parts.append(f"best {best.value:.4f} (trial {best.number})" if best else "best —")
        if progress.running:
            parts.append(f"running {', '.join(map(str, progress.running))}")
        parts.append(f"{clock(self._line.elapsed)} elapsed")
        if progress.done and progress.done < progress.total:
            parts.append(f"about {clock(self._left(progress))} left")
        self._line.show(" · ".join(parts), change=progress.done != self._seen or progress.done == progress.total)
        self._seen = progress.done

    def close(self) -> None:
        """End the line."""
        self._line.close()

    def _left(self, progress: Progress) -> float:
        return progress.seconds_left / self.workers
