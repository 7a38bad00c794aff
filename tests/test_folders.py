"""Result folders: nothing is adopted, mixed or thrown away in silence."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from mutune import folders
from mutune.errors import Refusal
from mutune.folders import check_claim, claim

INPUTS = {"run": {"seed": 0}, "data_hash": "abc"}
OTHERS = {"run": {"seed": 5}, "data_hash": "abc"}


def made(directory: Path, inputs: dict[str, Any] = INPUTS) -> Path:
    """A claimed folder with results of two kinds in it."""
    directory.mkdir(parents=True)
    claim(directory, inputs, "name", overwrite=False)
    (directory / "best.yaml").write_text("trial: 3")
    (directory / "ladder" / "w32").mkdir(parents=True)
    (directory / folders.LOCK).touch()
    return directory


def test_the_same_inputs_claim_a_folder_again_with_or_without_overwrite(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    for overwrite in (False, True):
        claim(folder, INPUTS, "name", overwrite)
        assert (folder / "best.yaml").read_text() == "trial: 3"


def test_other_inputs_are_refused_and_replace_everything_only_with_overwrite(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    with pytest.raises(Refusal, match=r"other inputs \(run\.seed: 0 → 5\); choose another name=NAME, or .*overwrite"):
        claim(folder, OTHERS, "name", overwrite=False)
    claim(folder, OTHERS, "name", overwrite=True)
    assert {entry.name for entry in folder.iterdir()} == {"config.yaml", ".lock"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["inputs"] == OTHERS


def test_what_tells_by_itself_what_it_belongs_to_survives_an_overwrite(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    claim(folder, OTHERS, "name", overwrite=True, keep=("ladder",))
    assert (folder / "ladder" / "w32").is_dir()
    assert not (folder / "best.yaml").exists()


def test_results_without_a_config_are_nobodys(tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    (folder / "config.yaml").unlink()
    with pytest.raises(Refusal, match=r"x holds best\.yaml, ladder but no config\.yaml, .*overwrite=true"):
        claim(folder, INPUTS, "name", overwrite=False)
    assert not (folder / "config.yaml").exists()
    claim(folder, INPUTS, "name", overwrite=True)
    assert {entry.name for entry in folder.iterdir()} == {"config.yaml", ".lock"}


def test_a_lock_and_a_torn_config_of_a_killed_start_are_no_results(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.77.partial").write_text("inpu")
    claim(tmp_path, INPUTS, "name", overwrite=False)
    assert (tmp_path / "config.yaml").exists()


def test_a_clearing_that_was_cut_off_leaves_nothing_that_could_be_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made(tmp_path / "x")
    with monkeypatch.context() as cut:
        cut.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            claim(folder, OTHERS, "name", overwrite=True)
    for inputs in (INPUTS, OTHERS):
        with pytest.raises(Refusal, match=r"but no config\.yaml"):
            check_claim(folder, inputs, "name", overwrite=False)


@pytest.mark.parametrize("text", ["inputs: null\n", "inputs: 3\n", "- 1\n", "{", "versions: {}\n", ""])
def test_a_damaged_config_is_refused_and_can_be_overwritten(text: str, tmp_path: Path) -> None:
    folder = made(tmp_path / "x")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(Refusal, match=r"config\.yaml does not say which inputs made the results beside it; .*"):
        claim(folder, INPUTS, "name", overwrite=False)
    claim(folder, INPUTS, "name", overwrite=True)
    assert not (folder / "best.yaml").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_where_the_folder_would_be_is_never_touched(overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / "small").write_text("mine")
    with pytest.raises(Refusal, match=r"small is a file; choose another name=NAME\.$"):
        check_claim(tmp_path / "small", INPUTS, "name", overwrite)
    assert (tmp_path / "small").read_text() == "mine"
