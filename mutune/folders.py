"""Result folders: whose they are, who holds them, and what changed since they were made."""

import fcntl
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mutune.errors import Refusal
from mutune.files import fsync_directory, read_yaml, remove, write_yaml
from mutune.versions import versions

CONFIG = "config.yaml"
LOCK = ".lock"


@contextmanager
def locked(directory: Path, key: str) -> Iterator[None]:
    """Hold a result folder for this process; the lock dies with the process.

    Args:
        key: the setting that would choose another folder, for the message.

    Raises:
        Refusal: another process holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(directory / LOCK, timeout=0):
            yield
    except Timeout:
        raise _in_use(directory, key) from None


def check_free(directory: Path, key: str) -> None:
    """Refuse a folder that another process holds, as `locked` does; holds nothing itself, and writes nothing."""
    path = directory / LOCK
    if not path.is_file():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(directory, key) from None
    except OSError:  # of a file system without such locks
        return
    finally:
        os.close(descriptor)


def _in_use(directory: Path, key: str) -> Refusal:
    return Refusal(f"{directory} is in use by another mutune process; wait for it, or choose another {key}=NAME.")


@contextmanager
def entered(directory: Path) -> Iterator[None]:
    """Hold a result folder that several processes may work in, for as long as one of them looks or decides; others
    wait.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / LOCK):
        yield


def check_claim(directory: Path, inputs: Mapping[str, Any], key: str, overwrite: bool) -> bool:
    """Refuse a folder that holds anything but results of these inputs, naming every difference; writes nothing.

    Args:
        inputs: everything that decides the results, as plain data.
        key: the setting that would choose another folder.
        overwrite: replace what is there instead.

    Returns:
        Whether what is there is to be replaced.
    """
    why = _foreign(directory, inputs)
    if why and not (overwrite and directory.is_dir()):
        replace = ", or replace them with overwrite=true" if directory.is_dir() else ""
        raise Refusal(f"{why}; choose another {key}=NAME{replace}.")
    return bool(why)


def claim(directory: Path, inputs: Mapping[str, Any], key: str, overwrite: bool, keep: Collection[str] = ()) -> None:
    """Make the folder, whose lock is held, this result's.

    Results of the same inputs stay. What anything else left goes, with `overwrite`, but for the entries named in
    `keep`, which tell by themselves what they belong to.
    """
    if check_claim(directory, inputs, key, overwrite):
        clear(directory, keep)
    if not (directory / CONFIG).exists():
        write_yaml(directory / CONFIG, {"inputs": dict(inputs), "versions": versions()})


def clear(directory: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder but `keep` and the lock that is held on it.

    The config goes first: where this is interrupted, the rest is nobody's, and `check_claim` refuses it.
    """
    (directory / CONFIG).unlink(missing_ok=True)
    fsync_directory(directory)
    for entry in directory.iterdir():
        if entry.name in (LOCK, *keep):
            continue
        remove(entry)


def _foreign(directory: Path, inputs: Mapping[str, Any]) -> str:
    """Why what is in a folder is not of these inputs; an empty string where it is, or where nothing is there."""
    if not directory.exists():
        return ""
    if not directory.is_dir():
        return f"{directory} is a file"
    path = directory / CONFIG
    if not path.exists():
        found = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
        return f"{directory} holds {', '.join(found)} but no {CONFIG}, so what made them is unknown" if found else ""
    try:
        stored = read_yaml(path, "config").get("inputs")
    except Refusal:
        stored = None
    if not isinstance(stored, Mapping):
        return f"{path} does not say which inputs made the results beside it"
    changed = differences(stored, inputs)
    return f"{directory} holds results of other inputs ({'; '.join(changed)})" if changed else ""


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every leaf in which two nested mappings differ."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key, "absent"), new.get(key, "absent")
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} → {after}")
    return found
