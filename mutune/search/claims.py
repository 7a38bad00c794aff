"""Who works on what, where several processes, of one host or of many, run the same study.

A unit of work is held by a lock in its folder, and a study's processes are told apart by locks in one of its folders.
Locks die with their holders, so that nothing is left to be found stale. Hosts share the folder, and their file system
has to keep locks (NFS does, from version 4 on).
"""

import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from filelock import FileLock, Timeout

from mutune.errors import Refusal
from mutune.folders import LOCK

MEMBERS = ".members"
TURN = ".turn.lock"
ONE_HOST = ("sqlite",)  # storages that no network file system carries


class Unit(Protocol):
    """Something to do in a folder of its own."""

    @property
    def directory(self) -> Path:
        """Where its records go."""


AnyUnit = TypeVar("AnyUnit", bound=Unit)


class Claims(ExitStack):
    """The units of work that this process holds, until they are released or the block is left."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[Path, FileLock] = {}
        self.callback(self._release_all)

    def of(self, units: Iterable[AnyUnit], is_open: Callable[[AnyUnit], bool]) -> Iterator[AnyUnit]:
        """The units that no other process holds, each held from the moment it is handed out.

        Args:
            is_open: whether there is still something to do, asked once the unit is held: another process may have
                finished it a moment ago.
        """
        for unit in units:
            unit.directory.mkdir(parents=True, exist_ok=True)
            lock = FileLock(unit.directory / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            self._held[unit.directory] = lock
            if is_open(unit):
                yield unit
            else:
                self.release(unit.directory)

    def _release_all(self) -> None:
        for directory in list(self._held):
            self.release(directory)

    def release(self, directory: Path) -> None:
        """Let others have it."""
        self._held.pop(directory).release()


def turn(directory: Path) -> FileLock:
    """Held for what only one process at a time may decide: which trials come next, and which go on."""
    return FileLock(directory / TURN)


@contextmanager
def joined(directory: Path) -> Iterator[None]:
    """Be one of the processes that work in `directory`; to be entered while its lock is held."""
    place = directory / MEMBERS
    place.mkdir(exist_ok=True)
    living = members(directory)
    for path in place.iterdir():
        if path.name not in living:
            path.unlink(missing_ok=True)
    with FileLock(place / own_name()):
        yield


def members(directory: Path) -> list[str]:
    """The living processes that work in `directory`, this one left out, as host.process."""
    place = directory / MEMBERS
    if not place.is_dir():
        return []
    return [path.name for path in sorted(place.iterdir()) if path.name != own_name() and _is_held(path)]


def check_company(storage: str, others: Sequence[str], overwrite: bool) -> None:
    """Refuse to replace what other processes are at, and to join those of other hosts where the storage is for one.

    Args:
        others: `members` of the study.
    """
    if others and overwrite:
        raise Refusal(
            f"overwrite=true replaces what {others[0]} is at; wait for it or stop it, or join it with overwrite=false."
        )
    far = [name for name in others if name.rpartition(".")[0] != host()]
    if far and storage in ONE_HOST:
        raise Refusal(
            f"search.storage={storage} is for one host, and {far[0]} is at this study; for example a study of its own "
            "with search.storage=journal, or search.storage=postgresql+psycopg://user@host/database."
        )


def own_name() -> str:
    """This process, as host.process."""
    return f"{host()}.{os.getpid()}"


def host() -> str:
    """This machine's name, as a part of a file's name."""
    return re.sub(r"[^\w-]", "_", socket.gethostname()) or "host"


def _is_held(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # removed in between
        return False
