"""One line of progress: rewritten in place on a terminal and in a notebook, printed at every change elsewhere."""

import sys
import time


class ProgressLine:
    """Shows the latest state of long work on stderr, or in the output of a notebook's cell."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self._shown = ""
        self._terminal = sys.stderr.isatty()
        self._notebook = type(sys.stdout).__module__ == "ipykernel.iostream"

    @property
    def elapsed(self) -> float:
        """Seconds since the work began."""
        return time.monotonic() - self.started

    def show(self, text: str, change: bool) -> None:
        """Show `text`; off a terminal only where it reports a `change`."""
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif self._notebook:
            print(f"\r{text:<{len(self._shown)}}", end="", flush=True)  # a cell's output knows \r, and no escape codes
        elif change and text != self._shown:
            print(text, file=sys.stderr, flush=True)
        self._shown = text

    def say(self, text: str) -> None:
        """Print a line that stays, above the one of progress."""
        if self._notebook:
            print(f"\r{text:<{len(self._shown)}}", flush=True)
        else:
            print(f"\r\033[K{text}" if self._terminal else text, file=sys.stderr, flush=True)
        self._shown = ""

    def close(self) -> None:
        """End the line."""
        if self._shown and (self._terminal or self._notebook):
            print(file=sys.stderr if self._terminal else sys.stdout)


def clock(seconds: float) -> str:
    """`75` → `1:15`, `4000` → `1:06:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
