"""Which code made a result: version, commit, and the libraries that decide its numbers."""

import functools
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


@functools.cache
def versions() -> dict[str, str]:
    """Name → version, with the commit of the checkout (`-dirty` where it is changed), or `none` outside one."""
    found = {"commit": _commit()}
    for package in ("mutune", "torch", "optuna", "numpy", "tokenizers", "tiktoken"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a plain checkout that was never installed
            found[package] = "not installed"
    return found


def _commit() -> str:
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return "none"
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "none"
