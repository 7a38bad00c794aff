"""Units of work are held by one process at a time, and by none that is dead."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from mutune.errors import Refusal
from mutune.search.claims import MEMBERS, Claims, check_company, host, joined, members, own_name
from tests import doors


@dataclass(frozen=True)
class Unit:
    directory: Path


def units(tmp_path: Path) -> list[Unit]:
    return [Unit(tmp_path / str(i)) for i in range(3)]


def test_a_unit_that_another_holds_is_not_handed_out_until_it_is_released(tmp_path: Path) -> None:
    mine, others = Claims(), Claims()
    first = next(mine.of(units(tmp_path), lambda unit: True))
    rest = list(others.of(units(tmp_path), lambda unit: True))
    assert [first, *rest] == units(tmp_path)
    assert not list(mine.of(units(tmp_path), lambda unit: True))
    others.release(rest[0].directory)
    assert list(mine.of(units(tmp_path), lambda unit: True)) == [rest[0]]
    mine.close()
    others.close()
    assert list(Claims().of(units(tmp_path), lambda unit: True)) == units(tmp_path)


def test_a_unit_is_taken_only_when_it_is_asked_for(tmp_path: Path) -> None:
    mine = Claims()
    handed = mine.of(units(tmp_path), lambda unit: True)
    first = next(handed)
    assert list(Claims().of(units(tmp_path), lambda unit: True)) == units(tmp_path)[1:]
    assert first == units(tmp_path)[0]


def test_a_unit_that_was_finished_meanwhile_is_left_and_released(tmp_path: Path) -> None:
    mine = Claims()
    assert not list(mine.of(units(tmp_path), lambda unit: False))
    assert list(Claims().of(units(tmp_path), lambda unit: True)) == units(tmp_path)


def test_the_dead_are_no_members_and_the_living_are(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from mutune.search.claims import joined\n"
        "with joined(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=doors.ROOT)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "in\n"
        assert members(tmp_path) == [f"{host()}.{process.pid}"]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert members(tmp_path) == []
    with joined(tmp_path):
        assert [path.name for path in (tmp_path / MEMBERS).iterdir()] == [own_name()]  # the dead one's is gone
        assert members(tmp_path) == []


@pytest.mark.parametrize(
    ("storage", "others", "overwrite", "sentence"),
    [
        ("sqlite", ["elsewhere.1"], False, "search.storage=sqlite is for one host, and elsewhere.1 is at this study"),
        ("journal", ["elsewhere.1"], True, "overwrite=true replaces what elsewhere.1 is at"),
    ],
)
def test_company_that_would_do_harm_is_refused(storage: str, others: list[str], overwrite: bool, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence):
        check_company(storage, others, overwrite)


def test_company_that_does_none_is_welcome() -> None:
    check_company("sqlite", [f"{host()}.1"], False)
    check_company("journal", ["elsewhere.1"], False)
    check_company("sqlite", [], True)
