"""Helpers for tests that run the commands as a user does."""

import contextlib
import importlib
import io
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import psutil
import yaml

from mutune.certificate.config import TransferFile
from mutune.compose import build
from mutune.files import write_yaml

ROOT = Path(__file__).resolve().parent.parent


def start(door: str, *arguments: str, cwd: Path | None = None) -> "subprocess.Popen[str]":
    """Start a command in its own process group."""
    return subprocess.Popen(
        [sys.executable, "-m", f"mutune.{door}", *arguments],
        cwd=cwd or ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(door: str, *arguments: str, cwd: Path | None = None, expect: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end in this process, whose libraries are loaded, and check its exit code.

    Its workers are processes all the same.
    """
    import torch

    stdout, stderr = io.StringIO(), io.StringIO()
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    main: Callable[[list[str]], int] = importlib.import_module(f"mutune.{door}").main
    try:
        with contextlib.chdir(cwd or ROOT), redirect_stdout(stdout), redirect_stderr(stderr), warnings.catch_warnings():
            warnings.simplefilter("default")  # as in a process of its own, they end nothing
            code = main(list(arguments))
    finally:
        torch.set_num_threads(threads)
        signal.signal(signal.SIGTERM, handler)
    out, err = stdout.getvalue(), stderr.getvalue()
    assert code == expect, f"exit code {code}\n{out}\n{err}"
    return subprocess.CompletedProcess([door, *arguments], code, out, err)


def run_apart(
    door: str, *arguments: str, cwd: Path | None = None, expect: int = 0
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end in a process of its own, as a shell does, and check its exit code."""
    process = start(door, *arguments, cwd=cwd)
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == expect, f"exit code {process.returncode}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def workers_of(parent: int) -> list[int]:
    """Worker processes of a command: children of what forks them."""
    descendants = psutil.Process(parent).children(recursive=True)
    return [process.pid for process in descendants if process.ppid() != parent]


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout: float = 300.0) -> None:
    """Wait for `condition` while `process` runs."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"the process ended first: {process.communicate()}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def seal(path: Path) -> None:
    """Seal an edited transfer file, as `mutune.transfer` would have written it."""
    transfer = build(TransferFile, yaml.safe_load(path.read_text()))
    write_yaml(path, transfer.sealed(transfer.verdict).as_dict())


def edit_yaml(path: Path, *keys: str, value: object) -> None:
    """Set one value in a YAML file."""
    data = yaml.safe_load(path.read_text())
    inner = data
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False))
