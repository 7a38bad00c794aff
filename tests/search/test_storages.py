"""A study on every storage: killed, it ends as an undisturbed one; torn files and databases that go away are borne."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock
from optuna.storages.journal._storage import JournalOperation

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.search.claims import MEMBERS, members
from mutune.search.config import without_password
from mutune.search.storage import CREATE_TRIAL, check_storage, open_storage, open_study, read_study
from tests import doors
from tests.search.databases import postgresql
from tests.soak import record

SWEEP = ["+sweep=smoke", "study=kept", "search.n_trials=8", "search.cohort=4", "workers=2", "run.num_steps=120"]


@pytest.fixture(scope="module")
def database() -> Iterator[tuple[Any, str]]:
    with postgresql() as found:
        yield found


def trials(out: Path, where: str) -> dict[int, tuple[Any, ...]]:
    """Number → parameters, reports, value and state of every finished trial."""
    study = optuna.load_study(study_name="kept", storage=open_storage(out / "sweeps/kept", where))
    return {
        t.number: (t.params, t.intermediate_values, t.value, t.state)
        for t in study.get_trials()
        if t.state.is_finished()
    }


def forget(out: Path, url: str) -> None:
    """Take the study of another test out of the database."""
    storage = open_storage(out, url)
    if "kept" in optuna.get_all_study_names(storage):
        optuna.delete_study(study_name="kept", storage=storage)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("calm")
    doors.run("sweep", *SWEEP, f"out={out}")
    return trials(out, "sqlite")


@pytest.mark.parametrize("seconds", [5.0, pytest.param(30.0, marks=pytest.mark.soak)])
def test_a_database_that_is_gone_for_a_while_is_waited_for(
    seconds: float, calm: dict[int, Any], database: tuple[Any, str], tmp_path: Path
) -> None:
    server, url = database
    forget(tmp_path, url)
    process = doors.start("sweep", *SWEEP, f"search.storage='{url}'", f"out={tmp_path}")
    doors.wait_until(lambda: len(list(tmp_path.glob("sweeps/kept/trials/*/metrics.jsonl"))) >= 2, process)
    server.stop()
    time.sleep(seconds)
    try:
        assert process.poll() is None, process.communicate()
    finally:
        server.start()  # for the tests after this one too
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert re.search(r"storage    does not answer \(.+\); waiting for it", stderr)
    assert trials(tmp_path, url) == calm


@pytest.mark.parametrize("where", ["sqlite", "journal", pytest.param("database", marks=pytest.mark.soak)])
def test_processes_that_run_a_study_together_are_killed_and_it_ends_as_an_undisturbed_one(
    where: str, calm: dict[int, Any], database: tuple[Any, str], tmp_path: Path
) -> None:
    """One of three, then all that are left, then two go on to the end."""
    where = database[1] if where == "database" else where
    if "://" in where:
        forget(tmp_path, where)
    together = [*SWEEP, "workers=1", f"search.storage='{where}'", f"out={tmp_path}"]

    first, *others = [doors.start("sweep", *together) for _ in range(3)]

    def kill_when(begun: int, victims: list["subprocess.Popen[str]"]) -> None:
        doors.wait_until(lambda: len(list(tmp_path.glob("sweeps/kept/trials/*/metrics.jsonl"))) >= begun, others[0])
        for victim in victims:
            os.killpg(victim.pid, signal.SIGKILL)
            victim.communicate()

    kill_when(3, [first])
    kill_when(6, others)
    for process in [doors.start("sweep", *together) for _ in range(2)]:
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "best       trial " in stdout
        assert " · with " in stderr
    assert trials(tmp_path, where) == calm
    assert not members(tmp_path / "sweeps/kept")
    assert where == "sqlite" or not (tmp_path / "sweeps/kept/study.db").exists()
    for path in (tmp_path / "sweeps/kept/trials").glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, len(steps) + 1)), path  # no two processes wrote it


@pytest.mark.soak
def test_a_study_behind_optuna_s_grpc_proxy_ends_as_any_other_also_when_the_proxy_is_gone_for_a_while(
    calm: dict[int, Any], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = (
        "import sys, optuna; from optuna.storages import get_storage, run_grpc_proxy_server;"
        "run_grpc_proxy_server(get_storage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    )
    serve = [sys.executable, "-W", "ignore", "-c", code, f"sqlite:///{tmp_path}/served.db", str(port)]
    where = f"grpc://127.0.0.1:{port}"
    server = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
    process = doors.start("sweep", *SWEEP, f"search.storage='{where}'", f"out={tmp_path}")
    try:
        doors.wait_until(lambda: len(list(tmp_path.glob("sweeps/kept/trials/*/metrics.jsonl"))) >= 2, process)
        server.kill()
        server.wait()
        time.sleep(3.0)
        server = subprocess.Popen(serve, stderr=subprocess.DEVNULL)
        _, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
        assert "storage    does not answer (" in stderr
        assert trials(tmp_path, where) == calm
    finally:
        server.kill()
        server.wait()
    refused = doors.run("sweep", *SWEEP, f"search.storage='{where}'", f"out={tmp_path}", expect=2).stderr
    assert f"search.storage={where} cannot be used (GRPC connection timeout)" in refused


def test_a_file_of_one_host_is_not_joined_from_another(tmp_path: Path) -> None:
    sweep = ["+sweep=smoke", "study=kept", "search.n_trials=2", "run.num_steps=5", f"out={tmp_path}"]
    doors.run("sweep", *sweep)
    with FileLock(tmp_path / "sweeps/kept" / MEMBERS / "elsewhere.1"):
        refused = doors.run("sweep", *sweep, expect=2).stderr
    assert "search.storage=sqlite is for one host, and elsewhere.1 is at this study" in refused
    doors.run("sweep", *sweep)


def test_a_study_of_other_inputs_in_the_same_database_is_refused_or_replaced(
    database: tuple[Any, str], tmp_path: Path
) -> None:
    few = ["+sweep=smoke", "study=shared", "search.n_trials=2", f"search.storage='{database[1]}'"]
    doors.run("sweep", *few, "run.num_steps=8", f"out={tmp_path / 'a'}")
    other = [*few, "run.num_steps=5", f"out={tmp_path / 'b'}"]
    refused = doors.run("sweep", *other, expect=2).stderr
    assert "has a study shared whose inputs were others; choose another study=NAME" in refused
    assert not (tmp_path / "b").exists()
    same = doors.run("sweep", *few, "run.num_steps=8", f"out={tmp_path / 'c'}", expect=2).stderr
    assert f"whose records are not in {tmp_path / 'c'}" in same
    doors.run("sweep", *other, "overwrite=true")
    study = optuna.load_study(study_name="shared", storage=open_storage(tmp_path, database[1]))
    assert len(study.trials) == 2
    assert all(max(t.intermediate_values, default=0) <= 5 for t in study.trials)


def test_first_starts_at_once_in_a_fresh_database_make_its_tables_once(database: tuple[Any, str]) -> None:
    server, url = database
    server.psql("CREATE DATABASE fresh;")
    fresh = url.replace("/postgres?", "/fresh?")
    code = (
        "import sys; from pathlib import Path; from mutune.search.storage import open_study;"
        "open_study(Path(), sys.argv[1], sys.argv[2])"
    )
    starts = [
        subprocess.Popen(
            [sys.executable, "-c", code, f"s{i}", fresh], stderr=subprocess.PIPE, text=True, cwd=doors.ROOT
        )
        for i in range(4)
    ]
    for start in starts:
        _, stderr = start.communicate(timeout=60)
        assert start.returncode == 0, stderr
    assert len(optuna.get_all_study_names(open_storage(Path(), fresh))) == 4


def test_an_overwrite_that_is_refused_leaves_the_study_in_the_database(
    database: tuple[Any, str], tmp_path: Path
) -> None:
    sweep = ["+sweep=smoke", "study=held", "search.n_trials=2", f"search.storage='{database[1]}'", f"out={tmp_path}"]
    doors.run("sweep", *sweep, "run.num_steps=8")
    with FileLock(tmp_path / "sweeps/held" / MEMBERS / "elsewhere.1"):
        refused = doors.run("sweep", *sweep, "run.num_steps=5", "overwrite=true", expect=2).stderr
    assert "overwrite=true replaces what elsewhere.1 is at" in refused
    assert "held" in optuna.get_all_study_names(open_storage(tmp_path, database[1]))


def test_a_database_that_is_down_is_named_and_not_the_folder(tmp_path: Path) -> None:
    (tmp_path / "trials/0").mkdir(parents=True)
    with pytest.raises(Refusal, match=r"^search\.storage=postgresql\+psycopg://me@127\.0\.0\.1:1/db cannot be used"):
        check_storage(tmp_path, "s", "postgresql+psycopg://me@127.0.0.1:1/db")


def test_reading_a_journal_that_is_being_written_leaves_it_alone(tmp_path: Path) -> None:
    open_study(tmp_path, "s", "journal").add_trial(optuna.trial.create_trial(value=1.0))
    path = tmp_path / "study.journal"
    torn = path.read_bytes() + b'{"op_code": 6, "wor'  # an append that has not ended yet
    path.write_bytes(torn)
    read_study(tmp_path, "s", "journal")
    assert path.read_bytes() == torn


@pytest.mark.parametrize("tail", [b'{"op_code": 6, "worker', b'{"op_code": 2}'])
def test_a_torn_last_line_of_a_journal_is_cut(tail: bytes, tmp_path: Path) -> None:
    study = open_study(tmp_path, "s", "journal")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    path = tmp_path / "study.journal"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    check_storage(tmp_path, "s", "journal")
    again = open_study(tmp_path, "s", "journal")
    assert path.read_bytes().startswith(whole)
    assert tail not in path.read_bytes()
    again.add_trial(optuna.trial.create_trial(value=2.0))
    assert [t.value for t in open_study(tmp_path, "s", "journal").trials] == [1.0, 2.0]


def test_a_journal_that_is_damaged_or_lacks_a_trial_is_refused(tmp_path: Path) -> None:
    study = open_study(tmp_path, "s", "journal")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    (tmp_path / "trials/1").mkdir(parents=True)
    with pytest.raises(Refusal, match="lacks trial 1, whose records are there"):
        check_storage(tmp_path, "s", "journal")
    path = tmp_path / "study.journal"
    path.write_bytes(b"garbage\n" + path.read_bytes())
    with pytest.raises(Refusal, match=r"cannot be read as a study \(line 1 is no record\)"):
        check_storage(tmp_path, "s", "journal")


def test_a_lock_on_a_journal_dies_with_its_holder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path, "journal")
    (tmp_path / ".study.journal.lock").touch()  # as a process that was killed leaves it
    started = time.monotonic()
    optuna.create_study(study_name="s", storage=storage)
    assert time.monotonic() - started < 5


def test_trials_are_counted_as_optuna_writes_them() -> None:
    assert CREATE_TRIAL == JournalOperation.CREATE_TRIAL


def test_a_password_is_neither_kept_nor_shown() -> None:
    url = "postgresql+psycopg://me:secret@host/db"
    config = compose("sweep", SweepConfig, ["+sweep=smoke", f"search.storage='{url}'"])
    assert config.search.storage == url
    assert "secret" not in str(config.identity())
    assert "//me@host/db" in str(config.identity())
    assert without_password("postgresql+psycopg://me@host/db?sslmode=require&password=secret&x=1").endswith(
        "?sslmode=require&password=&x=1"
    )


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (
            "postgresql+psycopg://me:secret@127.0.0.1:1/db",
            "=postgresql+psycopg://me@127.0.0.1:1/db cannot",
        ),
        ("mysql+nothing://me:secret@host/db", "search.storage=mysql+nothing://me@host/db"),
        ("stone", "search.storage=stone is unknown; take sqlite, journal, or the URL of a database"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_without_its_password(
    where: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.sweep import main

    assert main([*SWEEP, f"search.storage='{where}'", f"out={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert "secret" not in said
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_full_is_said_so_and_a_rerun_goes_on(calm: dict[int, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True).returncode:
        pytest.skip("this user cannot mount a small disk")
    try:
        failed = doors.run("sweep", *SWEEP, f"out={disk}", expect=1)
        assert re.search("No space left on device|database or disk is full", failed.stderr)
        assert "Traceback" not in failed.stderr
        assert "The same command continues the study." in failed.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        doors.run("sweep", *SWEEP, f"out={disk}")
        assert trials(disk, "sqlite") == calm
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


LONG = ["+sweep=smoke", "study=kept", "model.width=64", "model.depth=4", "run.num_steps=900", "search.n_trials=24"]


@pytest.mark.soak
def test_soak_twenty_kills_on_every_storage(database: tuple[Any, str], tmp_path: Path) -> None:
    """Three workers; a worker, the parent or all of them die at random moments, twenty times a study."""
    rows = []
    for where, sampler in (("sqlite", "tpe"), ("journal", "random"), (database[1], "qmc")):
        kind = where.partition("+")[0]
        asked = [*LONG, f"search.sampler={sampler}", "workers=3", f"search.storage='{where}'"]
        if kind == "postgresql":
            forget(tmp_path, where)
        counts, generator = dict.fromkeys(("worker", "parent", "all"), 0), random.Random(0)
        out = tmp_path / kind
        while sum(counts.values()) < 20:
            victim = generator.choice(list(counts))
            process = doors.start("sweep", *asked, f"out={out}")
            time.sleep(generator.uniform(6.0, 20.0))
            if process.poll() is not None:
                break  # the study ended before its twentieth kill
            if victim == "all":
                os.killpg(process.pid, signal.SIGKILL)
            elif victim == "parent":
                process.kill()
            else:
                for worker in doors.workers_of(process.pid)[:1]:
                    os.kill(worker, signal.SIGKILL)
                time.sleep(generator.uniform(0.0, 5.0))
                process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
            counts[victim] += 1
        doors.run("sweep", *asked, f"out={out}")
        disturbed, calm_out = trials(out, where), tmp_path / f"{kind}-calm"
        doors.run("sweep", *[word for word in asked if "storage" not in word], f"out={calm_out}")
        undisturbed = trials(calm_out, "sqlite")
        seconds = [
            json.loads(lines[-1])["seconds"]
            for path in calm_out.glob("sweeps/kept/trials/*/metrics.jsonl")
            if len(lines := path.read_text().splitlines()) == 900
        ]
        rows.append(
            {
                "storage": kind,
                "sampler": sampler,
                **{f"killed: {name}": count for name, count in counts.items()},
                "trials finished": len(disturbed),
                "whole trials, s": f"{min(seconds):.0f} to {max(seconds):.0f}",
                "equal to an undisturbed study": disturbed == undisturbed,
            }
        )
        assert len(disturbed) == 24
        assert disturbed == undisturbed
    record(
        "sweep_storages",
        "kill -9 at random moments of a sweep with three workers (after a worker's death, SIGTERM to its parent), then "
        "reruns, against an undisturbed study: parameters, reports, values and states of all trials",
        rows,
    )
