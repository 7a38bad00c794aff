"""A study survives: kill -9 of everything, SIGTERM, a rerun, a larger total; and equals an undisturbed one."""

import gc
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml

from mutune.search.claims import host
from tests import doors, soak

#: A quick study: TPE takes over after the first cohort, so later parameters depend on earlier losses.
QUICK = [
    "+sweep=smoke",
    "study=kill",
    "model.width=32",
    "search.sampler=tpe",
    "search.n_startup_trials=4",
    "search.cohort=4",
    "workers=2",
]


def finished(out: Path) -> dict[int, tuple[dict[str, Any], float]]:
    """Trial number → (parameters, value) of every finished trial."""
    path = out / "sweeps" / "kill" / "study.db"
    if not path.exists():
        return {}
    study = optuna.load_study(study_name="kill", storage=f"sqlite:///{path}")
    return {t.number: (t.params, t.value) for t in study.trials if t.state.is_finished() and t.value is not None}


def mid_step(out: Path, done: int) -> bool:
    """Whether at least `done` trials are finished and one more is somewhere between its first and its last step."""
    records = [path.read_text().count("\n") for path in out.glob("sweeps/kill/trials/*/metrics.jsonl")]
    return sum(count >= 2 for count in records) > done and len(finished(out)) >= done


def kill_and_compare(
    calm: Path, disturbed: Path, arguments: list[str], done_before_kill: int, whole_group: bool
) -> dict[str, Any]:
    """Kill a study in mid-step, run it again, and compare it with the undisturbed one of `calm`; returns the counts."""
    process = doors.start("sweep", *arguments, f"out={disturbed}")
    doors.wait_until(lambda: mid_step(disturbed, done_before_kill), process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    if whole_group:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = finished(disturbed)
    written = {n: (disturbed / f"sweeps/kill/trials/{n}/metrics.jsonl").stat().st_mtime_ns for n in before}
    time.sleep(1.0)
    alive = [pid for pid in children if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]
    assert not alive, f"workers outlived their parent: {alive}"

    doors.run("sweep", *arguments, f"out={disturbed}")
    for number, stamp in written.items():
        again = (disturbed / f"sweeps/kill/trials/{number}/metrics.jsonl").stat().st_mtime_ns
        assert again == stamp, f"trial {number} was finished and ran again"
    assert finished(disturbed) == finished(calm)
    best = [yaml.safe_load((out / "sweeps/kill/best.yaml").read_text()) for out in (calm, disturbed)]
    assert best[0] == best[1]
    return {"trials": len(finished(calm)), "finished before the kill": len(before), "equal": True}


@pytest.mark.parametrize("whole_group", [True, False], ids=["everything", "parent-only"])
def test_a_killed_study_ends_with_the_trials_of_an_undisturbed_one(tmp_path: Path, whole_group: bool) -> None:
    arguments = [*QUICK, "search.n_trials=9", "run.num_steps=90"]
    doors.run("sweep", *arguments, f"out={tmp_path / 'calm'}")
    counts = kill_and_compare(tmp_path / "calm", tmp_path / "disturbed", arguments, 4, whole_group)
    assert counts["trials"] == 9


@pytest.mark.soak
def test_soak_kill_nine_with_trials_of_ten_seconds(tmp_path: Path) -> None:
    arguments = [*QUICK, "model.width=64", "model.depth=4", "search.n_trials=12", "run.num_steps=6000"]
    calm, rows = tmp_path / "calm", []
    doors.run("sweep", *arguments, f"out={calm}")
    for i, done in enumerate((0, 3, 6, 9)):
        disturbed = tmp_path / str(i)
        counts = kill_and_compare(calm, disturbed, arguments, done, whole_group=i % 2 == 0)
        records = [path.read_text().splitlines() for path in disturbed.glob("sweeps/kill/trials/*/metrics.jsonl")]
        shortest = min(float(yaml.safe_load(lines[-1])["seconds"]) for lines in records)
        assert shortest > 10
        rows.append({"killed": "whole group" if i % 2 == 0 else "parent only", **counts, "shortest trial, s": shortest})
    soak.record("sweep_kill", "kill -9 of a sweep in mid-step, then a rerun, against an undisturbed study", rows)


def test_sigterm_ends_a_sweep_with_143_and_a_rerun_continues(tmp_path: Path) -> None:
    arguments = [*QUICK, "search.n_trials=4", "run.num_steps=200", f"out={tmp_path}"]
    process = doors.start("sweep", *arguments)
    doors.wait_until(lambda: mid_step(tmp_path, 0), process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 143
    assert "terminated; the same command continues" in stderr
    assert "Traceback" not in stderr
    saved = list(tmp_path.glob("sweeps/kill/trials/*/checkpoints/*"))
    assert saved
    for checkpoint in saved:  # nothing that was done is lost
        records = (checkpoint.parent.parent / "metrics.jsonl").read_text().splitlines()
        assert len(records) == int(checkpoint.name)
    assert any(int(checkpoint.name) not in (20, 100) for checkpoint in saved)  # besides those that only wait
    kept = {path: path.read_text() for path in tmp_path.glob("sweeps/kill/trials/*/metrics.jsonl")}
    doors.run("sweep", *arguments)
    assert sorted(finished(tmp_path)) == [0, 1, 2, 3]
    for path, before in kept.items():
        assert path.read_text().startswith(before)  # it went on, and did not begin again
    assert not list(tmp_path.glob("sweeps/kill/trials/*/checkpoints"))


def test_trials_pause_where_half_of_a_cohort_stops(tmp_path: Path) -> None:
    arguments = [*QUICK, "search.sampler=random", "search.n_trials=4", "run.num_steps=40", f"out={tmp_path}"]
    done = doors.run("sweep", *arguments, "dry_run=true")
    assert "halving: 0.5 go on after 4 steps, 0.5 go on after 20 steps" in done.stdout
    doors.run("sweep", *arguments)
    study = optuna.load_study(study_name="kill", storage=f"sqlite:///{tmp_path}/sweeps/kill/study.db")
    steps = sorted(len(path.read_text().splitlines()) for path in tmp_path.glob("sweeps/kill/trials/*/metrics.jsonl"))
    assert steps == [4, 4, 20, 40]
    by_state = [t.state.name for t in study.trials]
    assert sorted(by_state) == ["COMPLETE", "PRUNED", "PRUNED", "PRUNED"]
    at_first = {t.number: t.intermediate_values[4] for t in study.trials}
    gone = [t.number for t in study.trials if list(t.intermediate_values) == [4]]
    assert max(at_first, key=lambda n: at_first[n]) in gone
    again = doors.run("sweep", *arguments, "search.pruner=none", expect=2)
    assert "config.search.pruner: None → none" in again.stderr


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    arguments = [*QUICK, "search.n_trials=4", "run.num_steps=200", f"out={tmp_path}"]
    process = doors.start("sweep", *arguments)
    doors.wait_until(lambda: mid_step(tmp_path, 0), process)
    os.kill(doors.workers_of(process.pid)[0], signal.SIGKILL)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert sorted(finished(tmp_path)) == [0, 1, 2, 3]


def test_a_finished_study_returns_at_once_and_a_larger_total_continues_it(tmp_path: Path) -> None:
    arguments = [*QUICK, "run.num_steps=5", f"out={tmp_path}"]
    doors.run("sweep", *arguments, "search.n_trials=3")
    first = finished(tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweeps/kill/trials/*/*")}
    again = doors.run("sweep", *arguments, "search.n_trials=3")
    assert {path: path.stat().st_mtime_ns for path in written} == written  # no trial ran
    assert "best       trial" in again.stdout
    assert finished(tmp_path) == first
    doors.run("sweep", *arguments, "search.n_trials=5")
    assert {number: finished(tmp_path)[number] for number in first} == first
    assert len(finished(tmp_path)) == 5


def test_a_changed_search_space_is_refused_with_the_difference(tmp_path: Path) -> None:
    arguments = [*QUICK, "run.num_steps=5", "search.n_trials=2", f"out={tmp_path}"]
    doors.run("sweep", *arguments)
    gc.collect()  # closes SQLite's connections, whose log then goes into the file
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = doors.run("sweep", *arguments, "search.space.learning_rate.high=0.5", expect=2)
    assert "config.search.space.learning_rate.high: 0.25 → 0.5" in refused.stderr
    assert "overwrite=true" in refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    doors.run("sweep", *arguments, "search.space.learning_rate.high=0.5", "overwrite=true")


def test_a_diverged_trial_is_an_observation_and_cannot_win(tmp_path: Path) -> None:
    arguments = [*QUICK, "run.num_steps=20", "search.n_trials=3", "search.sampler=random", f"out={tmp_path}"]
    space = ["~search.space.learning_rate.low", "~search.space.learning_rate.high"]
    space.append("+search.space.learning_rate.values=[1.0e+4, 1.0e-2, 1.0e-3]")
    doors.run("sweep", *arguments, "search.sampler=grid", "search.n_trials=null", *space, "search.initial=[]")
    study = optuna.load_study(study_name="kill", storage=f"sqlite:///{tmp_path}/sweeps/kill/study.db")
    wild = study.trials[0]
    assert wild.user_attrs["diverged"]
    assert wild.value is not None
    assert wild.value >= 6.93  # ln(1024)
    assert yaml.safe_load((tmp_path / "sweeps/kill/best.yaml").read_text())["trial"] == 1


def test_a_running_study_can_be_looked_at_and_not_replaced(tmp_path: Path) -> None:
    arguments = [*QUICK, "search.n_trials=8", "run.num_steps=900", f"out={tmp_path}"]
    process = doors.start("sweep", *arguments)
    try:
        doors.wait_until(lambda: mid_step(tmp_path, 0), process)
        training = re.compile(r"trial \d +step \d+/900, loss \d\.\d{4}, last record \d+ s ago")
        status = ""
        while not training.search(status):  # at some moments all of a cohort wait
            status = doors.run("sweep", "study=kill", "status=true", f"out={tmp_path}").stdout
            assert "study      kill: " in status
            assert f"processes  {host()}.{process.pid}\n" in status, status
        refused = doors.run("sweep", *arguments, "overwrite=true", expect=2).stderr
        assert f"overwrite=true replaces what {host()}.{process.pid} is at; wait for it or stop it" in refused
    finally:
        process.kill()
        process.communicate()
    idle = doors.run("sweep", "study=kill", "status=true", f"out={tmp_path}").stdout
    assert "processes  none; the same command continues the study" in idle
    assert "study=other does not exist" in doors.run("sweep", "study=other", "status=true", expect=2).stderr
