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
from mutune.search.storage import read_study
from mutune.search.trial import trial_spec
from tests import doors
from tests.test_refusals import refuse
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
    found = read_study(out / "sweeps" / study, study, "sqlite")
    return [] if found is None else found.trials


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
        (["+sweep=refine", "study=first", "schedule=cosine"], "schedule is that of study=first"),
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

    def files() -> list[Path]:
        return sorted(path for path in out.rglob("*") if not path.name.startswith("study.db-"))  # SQLite's come and go

    before = files()
    assert main([*arguments, f"out={out}"]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert files() == before


def test_a_study_that_is_settled_ends_by_itself(tmp_path: Path) -> None:
    arguments = [*FIRST, "search.n_trials=40", "search.stop_regret=9", f"out={tmp_path}"]
    done = doors.run("sweep", *arguments)
    assert len(trials(tmp_path, "first")) == 8  # the first cohort
    assert "regret     the best trial is expected" in done.stdout
    assert "stopped    after 8 trials, by search.stop_regret=9.0" in done.stdout
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            [
                "+search.space.schedule_kind={values: [wsd]}",
                "+search.space.decay_fraction={values: [0.9]}",
                "+search.space.warmup_fraction={values: [0.2]}",
            ],
            "search.space.schedule_kind=wsd with search.space.decay_fraction=0.9",
        ),
        (["+search.space.warmup_fraction={values: [1.0]}"], "search.space.warmup_fraction=1.0 cannot be run"),
        (["+search.space.end_ratio={low: 0.0, high: 1.0}"], "for example search.space.end_ratio={values: [0.0, 0.1]}"),
        (
            ["+search.space.seed={values: [0, 1]}", "search.pruner=halving"],
            "which tells nothing where search.space.seed differs",
        ),
        (["search.storage='sqlite:///x.db'"], "search.storage=sqlite:///x.db is unknown"),
    ],
)
def test_spaces_that_no_run_can_have_are_refused(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refuse("sweep", ["+sweep=smoke", "search.initial=[]", *arguments], tmp_path / "runs", capsys)


def test_a_searched_warm_up_stands_before_steps_that_were_set() -> None:
    spec = compose("sweep", SweepConfig, ["+sweep=smoke", "schedule.warmup_steps=5"]).spec()
    assert trial_spec(spec, {"warmup_fraction": 0.5}).schedule.warmup(60) == 30
    assert trial_spec(spec, {}).schedule.warmup(60) == 5


def test_the_first_trial_of_a_schedule_sweep_is_the_study_s_best_whatever_the_lists_hold(tmp_path: Path) -> None:
    first = ["+sweep=smoke", "study=odd", "run.num_steps=5", "search.n_trials=2", "search.pruner=none", "seed=3"]
    doors.run("sweep", *first, "schedule.end_ratio=0.03", f"out={tmp_path}")
    config = follow(compose("sweep", SweepConfig, ["+sweep=schedule", "study=odd", f"out={tmp_path}"]))
    assert config.search.space["end_ratio"]["values"] == [0.0, 0.0085, 0.1, 0.03]
    assert config.seed == 3
    assert config.spec().schedule.end_ratio == 0.03


def test_a_smaller_total_finishes_what_has_begun(tmp_path: Path) -> None:
    arguments = [*FIRST[:2], "search.pruner=halving", "run.num_steps=400", "search.cohort=4", f"out={tmp_path}"]
    process = doors.start("sweep", *arguments, "search.n_trials=8")

    def pruned() -> bool:
        begun = list(tmp_path.glob("sweeps/first/trials/*/metrics.jsonl"))
        return len(begun) == 4 and any(t.state.name == "PRUNED" for t in trials(tmp_path, "first"))

    doors.wait_until(pruned, process)
    process.kill()
    process.communicate()
    doors.run("sweep", *arguments, "search.n_trials=2")
    states = [t.state.name for t in trials(tmp_path, "first")]
    assert sorted(states) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
