"""A sweep that goes on from a finished study: its run, its values, a space around them; and leaders confirmed."""

import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.follow import follow
from tests import doors
from tests.test_transfer_and_train import TINY_LADDER, TINY_TARGET

FIRST = ["+sweep=smoke", "study=first", "run.num_steps=20", "search.n_trials=8", "search.pruner=none"]
TARGET = [*TINY_TARGET, *TINY_LADDER]
FEW = ["search.n_trials=3", "search.confirm=1", "search.confirm_seeds=1"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study."""
    out = tmp_path_factory.mktemp("out")
    doors.run("sweep", *FIRST, f"out={out}")
    return out


def best(out: Path, study: str) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load((out / f"sweeps/{study}/best.yaml").read_text())
    return data


def trials(out: Path, study: str) -> list[optuna.trial.FrozenTrial]:
    return optuna.load_study(study_name=study, storage=f"sqlite:///{out}/sweeps/{study}/study.db").trials


def test_the_schedule_is_tuned_from_the_study_s_best_and_carried_to_the_target(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "sweeps", tmp_path / "sweeps")
    before = (tmp_path / "sweeps/first/best.yaml").read_bytes()
    done = doors.run("sweep", "+sweep=schedule", "study=first", *FEW, f"out={tmp_path}")
    assert "study=first-schedule" in done.stdout
    assert (tmp_path / "sweeps/first/best.yaml").read_bytes() == before
    old, new = best(tmp_path, "first"), best(tmp_path, "first-schedule")
    made = trials(tmp_path, "first-schedule")
    assert made[0].params["learning_rate"] == old["hyperparameters"]["learning_rate"]
    assert (made[0].params["schedule_kind"], made[0].params["warmup_fraction"]) == ("linear", 0.05)
    assert all(t.state == optuna.trial.TrialState.COMPLETE for t in made)  # full decays only
    schedule = new["schedule"]
    for name, key in (("schedule_kind", "kind"), ("end_ratio", "end_ratio"), ("warmup_fraction", "warmup_fraction")):
        assert schedule[key] == new["params"][name]
    run = yaml.safe_load((tmp_path / f"sweeps/first-schedule/trials/{new['trial']}/config.yaml").read_text())["run"]
    assert run["schedule"] == schedule
    doors.run("transfer", "study=first-schedule", *TARGET, f"out={tmp_path}")
    transfer = yaml.safe_load((tmp_path / "transfer/first-schedule--tiny/transfer.yaml").read_text())
    assert transfer["schedule"] == schedule
    assert transfer["provenance"]["heldout_loss"] == new["heldout_loss"]


def test_a_refined_space_lies_within_the_study_s_and_around_its_best(out: Path) -> None:
    config = follow(compose("sweep", SweepConfig, ["+sweep=refine", "study=first", f"out={out}"]))
    rate = best(out, "first")["hyperparameters"]["learning_rate"]
    ((name, data),) = config.search.space.items()
    assert name == "learning_rate"
    assert 0.002 <= data["low"] < rate < data["high"] <= 0.25
    assert data["high"] / data["low"] < 0.25 / 0.002
    assert (config.study, config.run.num_steps, config.model.width) == ("first-refine", 20, 16)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["+sweep=schedule", "study=nothing"], "study=nothing does not exist"),
        (["+sweep=schedule", "study=first", "model.width=64"], "model.width is that of study=first"),
        (["+sweep=refine", "study=first", "schedule=cosine"], "schedule.kind is that of study=first"),
        (
            ["+sweep=schedule", "study=first", "search.space.learning_rate.octaves=0"],
            "search.space.learning_rate.octaves=0 must be a finite number above 0",
        ),
        (
            ["+sweep=schedule", "study=first", "search.pruner=halving"],
            "search.pruner=halving compares trials on the way, which tells nothing where search.space.schedule_kind",
        ),
        (["+sweep=schedule", "study=first", "search.space.end_ratio.values=[2]"], "end_ratio.values[0]=2 must be"),
        (["+sweep=smoke", "follows=nobody"], "follows=nobody is unknown"),
        (["+sweep=smoke", "search.pruner=hyperbland"], "search.pruner=hyperbland is unknown; known pruners: halving"),
        (["+sweep=smoke", "search.stop_regret=0"], "search.stop_regret=0.0 must be a finite number above 0"),
        (
            ["+sweep=valley", "search.confirm=2"],
            "search.confirm=2 runs leaders by other seeds, which search.space.seed",
        ),
    ],
)
def test_what_cannot_follow_is_refused(
    out: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.sweep import main

    before = sorted(out.rglob("*"))
    assert main([*arguments, f"out={out}"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(out.rglob("*")) == before


def test_a_study_that_is_settled_ends_by_itself(tmp_path: Path) -> None:
    arguments = [*FIRST, "search.n_trials=40", "search.stop_regret=9", f"out={tmp_path}"]
    done = doors.run("sweep", *arguments)
    assert len(trials(tmp_path, "first")) == 8  # the first cohort
    assert "regret     the best trial is expected" in done.stdout
    doors.run("sweep", *arguments)
    assert len(trials(tmp_path, "first")) == 8


def test_leaders_are_confirmed_once(tmp_path: Path) -> None:
    arguments = [*FIRST, "search.n_trials=4", "search.confirm=2", f"out={tmp_path}"]
    done = doors.run("sweep", *arguments)
    assert done.stdout.count("confirmed  trial") == 2
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweeps/first/confirm/*/metrics.jsonl")}
    assert len(stamps) == 4
    said = best(tmp_path, "first")
    assert said["heldout_loss"] == said["confirmed"][0]["mean"]
    assert said["trial"] == said["confirmed"][0]["trial"]
    own = [t.value for t in trials(tmp_path, "first") if t.number == said["trial"]]
    assert said["confirmed"][0]["losses"][0] == own[0]
    doors.run("sweep", *arguments)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert best(tmp_path, "first") == said
    doors.run("transfer", "study=first", *TARGET, f"out={tmp_path}")
    copied = [json.loads(path.read_text()) for path in tmp_path.glob("transfer/first--tiny/ladder/*/result.json")]
    again = [json.loads((path.parent / "result.json").read_text())["value"] for path in stamps]
    assert {row["value"] for row in copied} & set(again)  # the ladder need not make them again
