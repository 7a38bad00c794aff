"""What is said of work on a large corpus, once it takes a while."""

from collections.abc import Callable

from mutune.progress import ProgressLine

QUIET_SECONDS = 10.0  # of work that says nothing
#: (what is done with them, things, done, total) is told to whoever waits.
Tell = Callable[[str, str, int, int], None]


class Told:
    """What is being done to a corpus, once that takes a while."""

    def __init__(self, name: str) -> None:
        self._line, self._name, self._share = ProgressLine(), name, ("", 0)
        self.close = self._line.close

    def share(self, done_so: str, things: str, done: int, total: int) -> None:
        """So many of all, at every hundredth; a line for each tenth where lines stay."""
        share = (things, 100 * done // total)
        if self._line.elapsed > QUIET_SECONDS and share != self._share:
            text = f"data       {self._name}: {done_so} {done:,} of {total:,} {things}"
            self._line.show(text, change=share[1] % 10 == 0)
        self._share = share
