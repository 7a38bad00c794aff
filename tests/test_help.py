"""`--help`: every key with its default and its meaning, and examples that work."""

import dataclasses
import importlib
import shlex
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mutune.compose import compose
from mutune.config import CheckConfig, DoorConfig, SweepConfig, TrainConfig, TransferConfig
from mutune.help import MEANINGS_AT, meanings
from tests import doors
from tests.doors import ROOT

DOORS: dict[str, type[DoorConfig]] = {
    "sweep": SweepConfig,
    "transfer": TransferConfig,
    "train": TrainConfig,
    "check": CheckConfig,
}


def printed(door: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert importlib.import_module(f"mutune.{door}").main(["--help"]) == 0
    return capsys.readouterr().out


def groups(cls: Any) -> Iterator[type]:
    """A configuration's dataclass and those inside it."""
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for part in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(part):
                yield from groups(part)


def all_groups() -> set[type]:
    return {cls for schema in DOORS.values() for cls in groups(schema)}


@pytest.mark.parametrize("cls", sorted(all_groups(), key=str))
def test_every_key_has_a_meaning_and_every_meaning_a_key(cls: Any) -> None:
    names = {field.name for field in dataclasses.fields(cls)}
    groups = {name for name, hint in typing.get_type_hints(cls).items() if dataclasses.is_dataclass(hint)}
    assert names - groups <= set(meanings(cls)) <= names  # a group may have its class's own first sentence
    assert all(meanings(cls).values())


def test_meanings_are_inherited_shared_and_continued() -> None:
    @dataclass
    class Parent:
        """One.

        Attributes:
            out: a folder.
        """

        out: str = "runs"

    @dataclass
    class Child(Parent):
        """Two.

        Attributes:
            low, high: bounds
                on both sides.

        Note: nothing of this.
        """

        low: int = 0
        high: int = 1

    assert meanings(Child) == {
        "out": "a folder.",
        "low": "bounds on both sides.",
        "high": "bounds on both sides.",
    }


@pytest.mark.parametrize("door", DOORS)
def test_help_says_the_defaults_that_the_command_has(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    help_lines = [line.strip() for line in printed(door, capsys).splitlines()]
    config = compose(door, DOORS[door], [])
    assert f"python -m mutune.{door} [key=value ...]" in help_lines
    assert any(
        line.startswith("out=runs  ") and line.endswith("folder for everything that is written.") for line in help_lines
    )
    if door == "transfer":  # whose default target is a file of `conf/target`
        assert config.target.model.width == 2560  # type: ignore[attr-defined]
        assert any(line.startswith("width=2560  ") for line in help_lines)
        assert "target=                         btlm_3b (default), btlm_3b_clean, small" in help_lines


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("door", DOORS)
def test_help_fits_the_terminal(
    door: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    keys = printed(door, capsys).partition("keys, their defaults")[2].partition("exit codes")[0].splitlines()[1:]
    assert max(map(len, keys)) <= columns
    assert any(len(line) > columns - 15 for line in keys)
    assert all(line[:MEANINGS_AT].strip() or line[MEANINGS_AT : MEANINGS_AT + 1].strip() for line in keys if line)


@pytest.mark.parametrize("door", DOORS)
def test_the_examples_of_help_can_be_composed(door: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for line in printed(door, capsys).splitlines() if line.startswith("  python -m mutune.")]
    assert 2 <= len(lines) <= 5
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[:3] == ["python", "-m", f"mutune.{door}"]
        compose(door, DOORS[door], words[3:])


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "sweeps").glob("*.yaml")))
def test_every_sweep_has_only_keys_that_there_are(name: str) -> None:
    assert compose("sweep", SweepConfig, [f"+sweep={name}"]).search.space or name == "refine"


def test_who_has_read_enough_ends_a_command_without_a_word() -> None:
    with doors.start("train", "--help") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
