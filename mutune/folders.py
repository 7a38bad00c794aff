"""Result folders: whose they are, who holds them, and what changed since they were made."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mutune.errors import Refusal
from mutune.files import read_yaml, write_yaml
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
        raise Refusal(
            f"{directory} is in use by another mutune process; wait for it, or choose another {key}=NAME."
        ) from None


def check_claim(directory: Path, inputs: Mapping[str, Any], key: str, overwrite: bool) -> None:
    """Refuse a folder that holds results of other inputs, naming every difference; writes nothing.

    Args:
        inputs: everything that decides the results, as plain data.
        key: the setting that would choose another folder.
        overwrite: replace what is there instead.
    """
    path = directory / CONFIG
    if overwrite or not path.exists():
        return
    stored = read_yaml(path, "config")
    changed = differences(stored.get("inputs", {}), inputs)
    if changed:
        raise Refusal(
            f"{directory} holds results of other inputs ({'; '.join(changed)}); choose another {key}=NAME, "
            f"or replace them with overwrite=true."
        )


def claim(directory: Path, inputs: Mapping[str, Any], key: str, overwrite: bool) -> None:
    """Make the folder, whose lock is held, this result's; what other inputs left in it goes only with `overwrite`."""
    check_claim(directory, inputs, key, overwrite)
    if overwrite:
        clear(directory)
    if not (directory / CONFIG).exists():
        write_yaml(directory / CONFIG, {"inputs": dict(inputs), "versions": versions()})


def clear(directory: Path) -> None:
    """Remove everything in a folder but the lock that is held on it."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


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
