"""`make setup`, with a Python that only writes down what it is asked."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.doors import ROOT

STUB = """#!/bin/sh
echo "$@" >> {log}
[ "$1 $2" = "-m venv" ] && mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
case "$*" in *"{fails}"*) echo "no such package" >&2; exit 1;; esac
exit 0
"""


def setup(folder: Path, fails: str = "never") -> tuple[list[str], list[str], int]:
    """What is printed, what Python is asked, and the exit code."""
    log, python = folder / "log", folder / "python"
    python.write_text(STUB.format(log=log, fails=fails))
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={python}", f"VENV={folder / 'venv'}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={key: value for key, value in os.environ.items() if not key.startswith("MAKE")},  # those of `make test`
    )
    return done.stdout.splitlines(), log.read_text().splitlines(), done.returncode


def test_setting_up_says_each_step_and_installs_torch_first(tmp_path: Path) -> None:
    said, asked, code = setup(tmp_path)
    assert [line.split("  ")[0] for line in said] == [*(f"setup {step}/4" for step in (1, 2, 3, 4)), "setup"]
    assert code == 0
    installs = [words for words in asked if words.startswith("-m pip")]
    assert installs == [
        "-m pip install --quiet --constraint constraints.txt torch",
        "-m pip install --quiet --constraint constraints.txt --editable .[dev]",
    ]
    assert (tmp_path / "venv/.ready").exists()
    again, _, _ = setup(tmp_path)
    assert again == ["make: Nothing to be done for 'setup'."]


@pytest.mark.parametrize(("fails", "step"), [("txt torch", 2), ("editable", 3)])
def test_a_step_that_fails_is_the_last_that_was_named(fails: str, step: int, tmp_path: Path) -> None:
    said, _, code = setup(tmp_path, fails)
    named = [line for line in said if line.startswith("setup")]
    assert named[-1].startswith(f"setup {step}/4  ")
    assert "no such package" in said
    assert code == 2
    assert not (tmp_path / "venv/.ready").exists()


def test_torchvision_that_does_not_import_is_removed(tmp_path: Path) -> None:
    _, asked, _ = setup(tmp_path, "import torchvision")
    assert "-m pip uninstall --quiet --yes torchvision" in asked
