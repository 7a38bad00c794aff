"""What is beside a study's storage must be in it, and what a study leaves for others must be whole."""

import contextlib
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from mutune.errors import Refusal
from mutune.search.config import FILES
from mutune.search.results import check_best, load_study
from mutune.search.storage import check_storage, open_study
from mutune.training.schedule import ScheduleConfig
from tests import doors, studies


def stored(folder: Path, trials: int = 2) -> Path:
    """A study with trials in its storage and their folders beside it."""
    (folder / "trials").mkdir(parents=True)
    study = open_study(folder, "s")
    for number in range(trials):
        study.add_trial(create_trial(state=TrialState.RUNNING, params={}, distributions={}))
        (folder / "trials" / str(number)).mkdir()
    study._storage.remove_session()
    with contextlib.closing(sqlite3.connect(folder / FILES["sqlite"])) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it is in the one file now
    for log in folder.glob("study.db-*"):
        log.unlink()
    return folder


def test_a_whole_study_and_an_empty_folder_are_accepted_and_left_as_they_are(tmp_path: Path) -> None:
    folder = stored(tmp_path / "x")
    (folder / "trials" / "notes.txt").touch()
    before = (folder / FILES["sqlite"]).read_bytes()
    check_storage(folder, "s", "sqlite")
    check_storage(tmp_path / "none", "s", "sqlite")
    assert (folder / FILES["sqlite"]).read_bytes() == before
    assert not list(folder.glob("*.db-journal"))


def gone(path: Path) -> None:
    path.unlink()


def garbage(path: Path) -> None:
    path.write_bytes(b"not a database " * 999)


def cut(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def older(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM trials WHERE number = 1")


@pytest.mark.parametrize("damage", [gone, garbage, cut, empty, folder, older], ids=lambda f: f.__name__)
def test_a_storage_without_what_is_beside_it_is_refused_in_one_sentence(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    study = stored(tmp_path / "x")
    damage(study / FILES["sqlite"])
    with pytest.raises(Refusal, match=r"study\.db .*; restore it, or remove .*x to start the study over\.$"):
        check_storage(study, "s", "sqlite")


def test_best_values_without_a_storage_are_refused(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").touch()
    with pytest.raises(Refusal, match=r"study\.db is missing beside the study's results"):
        check_storage(tmp_path, "s", "sqlite")


def test_a_study_whose_storage_was_lost_is_not_started_over(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mutune.sweep import main

    folder = studies.write_study(out, "mine")
    before = {path: path.read_bytes() for path in folder.rglob("*.yaml")}
    assert main([*studies.SWEEP, "study=mine", f"out={out}"]) == 2
    assert "study.db is missing beside the study's results" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in folder.rglob("*.yaml")} == before


CONFIGS = [
    "inputs: null",
    "inputs: {config: {}}",
    "versions: {}",
    "- 1",
    "inputs: {config: {}, data_hash: x}\nversions: 3",
]


@pytest.mark.parametrize("text", CONFIGS)
def test_a_damaged_config_of_a_study_is_refused(text: str, tmp_path: Path) -> None:
    folder = studies.write_study(tmp_path, "mine")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(Refusal, match=r"config.*(is damaged|holds no keys)"):
        load_study(tmp_path / "sweeps", "mine")


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("params", [], "params=[] must be a group of keys"),
        ("params", None, "params=null must be a group of keys"),
        ("trial", "three", "trial=three must be a whole number"),
        ("hyperparameters", {"learning_rate": -1}, "hyperparameters.learning_rate=-1.0 must be"),
    ],
)
def test_damaged_best_values_are_refused(key: str, value: object, sentence: str, tmp_path: Path) -> None:
    folder = studies.write_study(tmp_path, "mine")
    doors.edit_yaml(folder / "best.yaml", key, value=value)
    with pytest.raises(Refusal) as refusal:
        load_study(tmp_path / "sweeps", "mine")
    assert "best.yaml is damaged" in str(refusal.value)
    assert sentence in str(refusal.value)


def test_best_values_without_one_of_their_keys_are_refused(tmp_path: Path) -> None:
    folder = studies.write_study(tmp_path, "mine")
    (folder / "best.yaml").write_text("study: mine")
    with pytest.raises(Refusal, match="trial is missing"):
        load_study(tmp_path / "sweeps", "mine")


def test_best_values_that_were_edited_are_refused(tmp_path: Path) -> None:
    folder = studies.write_study(tmp_path, "mine")
    true = load_study(tmp_path / "sweeps", "mine").best.hyperparameters
    check_best(load_study(tmp_path / "sweeps", "mine"), ["learning_rate"], true, ScheduleConfig())
    with pytest.raises(Refusal, match=r"differ in params\.learning_rat"):
        check_best(load_study(tmp_path / "sweeps", "mine"), ["learning_rat"], true, ScheduleConfig())
    doors.edit_yaml(folder / "best.yaml", "hyperparameters", "learning_rate", value=0.5)
    with pytest.raises(
        Refusal, match=r"learning_rate=0\.5, but trial 0 had 0\.0\d+; .* with hyperparameters\.learning_rate=0\.5\."
    ):
        check_best(load_study(tmp_path / "sweeps", "mine"), ["learning_rate"], true, ScheduleConfig())


def test_a_study_that_was_copied_without_its_storage_still_transfers(tmp_path: Path) -> None:
    folder = studies.write_study(tmp_path, "mine")
    shutil.copytree(folder, tmp_path / "sweeps" / "copy")
    assert load_study(tmp_path / "sweeps", "copy").best.trial == 0
