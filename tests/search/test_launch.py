"""Jobs of a cluster run a study as its own workers do."""

import shutil
import signal
import time
from pathlib import Path

import pytest

from mutune.errors import Refusal
from mutune.search.launch import Launch, check_launcher, runner
from mutune.search.workers import WorkError
from tests import doors
from tests.search.test_storages import trials
from tests.soak import record

SWEEP = ["+sweep=smoke", "study=kept", "search.n_trials=4", "search.cohort=4", "workers=1", "run.num_steps=20"]
SHARED = ["jobs=2", "search.storage=journal"]


@pytest.mark.soak
@pytest.mark.parametrize("launcher", ["ray", "slurm"])
def test_a_study_run_by_jobs_ends_as_one_of_its_own_workers(launcher: str, tmp_path: Path) -> None:
    if launcher == "slurm" and shutil.which("sbatch") is None:
        pytest.skip("this host has no Slurm")
    alone, jobs = tmp_path / "alone", tmp_path / "jobs"
    doors.run("sweep", *SWEEP, f"out={alone}")
    started = time.monotonic()
    done = doors.run_apart("sweep", *SWEEP, *SHARED, f"launcher={launcher}", f"out={jobs}")
    seconds = time.monotonic() - started
    assert trials(jobs, "journal") == trials(alone, "sqlite")
    assert (jobs / "sweeps/kept/best.yaml").read_bytes() == (alone / "sweeps/kept/best.yaml").read_bytes()
    assert " · with " in done.stderr  # the jobs did the work
    said = "".join(
        path.read_text() for path in (jobs / "sweeps/kept/jobs").iterdir() if path.suffix in (".log", ".out")
    )
    assert said.count("best       trial ") >= 1  # a job of Slurm may conclude after the watcher
    row = {"launcher": launcher, "jobs": 2, "equal to a study of its own workers": True, "s": f"{seconds:.0f}"}
    record(f"launcher_{launcher}", f"A study of four small trials run by jobs of {launcher} on one machine", [row])


@pytest.mark.soak
def test_what_stops_the_watcher_ends_its_jobs_and_a_rerun_goes_on(tmp_path: Path) -> None:
    sweep = [*SWEEP, *SHARED, "run.num_steps=300", "launcher=ray", f"out={tmp_path}"]
    process = doors.start("sweep", *sweep)
    doors.wait_until(lambda: len(list(tmp_path.glob("sweeps/kept/trials/*/metrics.jsonl"))) >= 2, process)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143, stderr
    status = doors.run("sweep", "study=kept", "status=true", f"out={tmp_path}").stdout
    assert "processes  none; the same command continues the study" in status
    assert "best       trial " in doors.run("sweep", *sweep[:-2], f"out={tmp_path}", *["jobs=1"]).stdout


def test_jobs_that_all_end_before_their_work_are_said_so(tmp_path: Path) -> None:
    where = Launch("ray", 1, 1, {})

    def watch() -> None:
        with runner(lambda task: task, where, ["+sweep=nonsense", "launcher=ray", "+resources.x=1"], tmp_path) as run:
            while True:
                assert not list(run([], lambda running: None))
                time.sleep(0.2)

    with pytest.raises(WorkError, match=rf"every job has ended \(0.log: exit code 2\).*{tmp_path}/jobs"):
        watch()
    assert "unknown sweep 'nonsense'" in (tmp_path / "jobs/0.log").read_text()  # and no word about resources


@pytest.mark.parametrize(
    ("launcher", "storage", "sentence"),
    [
        ("ray", "sqlite", r"search\.storage=sqlite is for one host, and launcher=ray may use many"),
        ("ray", "postgresql+psycopg://me:secret@h/d", r"^search\.storage=postgresql\+psycopg://me@h/d has a password"),
    ],
)
def test_a_storage_that_jobs_cannot_use_is_refused(launcher: str, storage: str, sentence: str) -> None:
    with pytest.raises(Refusal, match=sentence) as refused:
        check_launcher(launcher, storage)
    assert "secret" not in str(refused.value)


def test_a_host_without_slurm_is_told_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Refusal, match="launcher=slurm needs the command sbatch"):
        check_launcher("slurm", "journal")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["launcher=pbs"], "launcher=pbs is unknown; known launchers: local, slurm, ray."),
        (["jobs=2"], "jobs=2 is read with launcher=slurm or ray; for example launcher=slurm."),
        (["resources.x=1"], "resources.x is not there yet, so it is added: write +resources.x=..."),
        pytest.param(
            ["launcher=ray", "search.storage=journal", "+resources.nonsense=1"],
            "launcher=ray with resources={'nonsense",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_place_that_does_not_exist_is_refused(words: list[str], sentence: str, tmp_path: Path) -> None:
    refused = doors.run("sweep", *SWEEP, *words, f"out={tmp_path}", expect=2).stderr
    assert sentence in refused
