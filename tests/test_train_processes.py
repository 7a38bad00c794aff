"""`mutune.train` under torchrun, and what a long run needs: time limits, lost processes, earlier checkpoints."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from mutune import underway
from mutune.config import SweepConfig, TrainConfig
from mutune.training.resume import remember_spent, spent
from tests import doors

TARGET = [
    "study=published",
    "hyperparameters.init_std=0.02",
    "hyperparameters.learning_rate=0.002",
    "hyperparameters.embedding_multiplier=1",
    "target=small",
    "target.name=tiny",
    "target.model.width=32",
    "target.model.depth=2",
    "target.model.num_heads=2",
    "target.tokenizer={kind: bytes}",
    "target.schedule={kind: linear, warmup_steps: 3}",
    "target.stages=[{context_length: 32, batch_sequences: 8, num_steps: 40},"
    "{context_length: 64, batch_sequences: 4, num_steps: 20}]",
    "target.loop.heldout_windows=6",
]
#: What a record says of its process: when it was made, and what a probe has seen since the one before it.
OF_A_PROCESS = {"seconds", "tokens_per_second", "memory_bytes", "moved", "moved_tensor", "frozen"}
CLOSE = 1e-5  # nats: what the order of sums may change, in float32


@pytest.fixture(scope="module")
def transfer(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("transfer")
    doors.run("transfer", *TARGET, f"out={out}")
    return f"transfer={out / 'transfer/published--tiny/transfer.yaml'}"


@pytest.fixture(scope="module")
def undisturbed(transfer: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The records of one process without torchrun."""
    out = tmp_path_factory.mktemp("undisturbed")
    doors.run("train", *arguments(transfer, out))
    return records(out)


def arguments(transfer: str, out: Path, *more: str) -> list[str]:
    return [transfer, f"out={out}", "checkpoint_every=5", "keep_checkpoints=20", "threads=1", *more]


def records(out: Path) -> list[dict[str, Any]]:
    path = out / "train/tiny/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key not in OF_A_PROCESS} for line in lines]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in found]


def furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def saved(out: Path) -> set[str]:
    return {path.name for path in (out / "train/tiny/checkpoints").iterdir()}


def torchrun(processes: int, *words: str) -> "subprocess.Popen[str]":
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        "-m",
        "mutune.train",
        *words,
    ]
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=doors.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(doors.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupted(transfer: str, out: Path, end: Callable[["subprocess.Popen[str]"], None]) -> str:
    """Two processes train until ten records are there, and are ended; returns what they said."""
    process = torchrun(2, *arguments(transfer, out))
    doors.wait_until(lambda: len(records(out)) >= 12, process)
    end(process)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "finished" not in stdout
    return stderr


def kill_the_second(process: "subprocess.Popen[str]") -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    (victim,) = [child for child in children if child.environ().get("RANK") == "1"]
    victim.kill()


def test_a_killed_process_ends_the_run_in_words_and_the_rerun_goes_on_with_one(
    transfer: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    stderr = interrupted(transfer, tmp_path, kill_the_second)
    assert "mutune.train: another process of tiny is gone (" in stderr
    assert "from which the same command goes on, with as many processes or others" in stderr
    assert "Signal 9 (SIGKILL)" in stderr  # torchrun's report
    assert "10" in saved(tmp_path)
    again = doors.run("train", *arguments(transfer, tmp_path))
    assert "resuming   tiny at step " in again.stderr
    assert furthest(losses(records(tmp_path)), losses(undisturbed)) < CLOSE


def test_sigterm_is_saved_at_one_step_by_all(transfer: str, undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    stderr = interrupted(transfer, tmp_path, lambda process: process.send_signal(signal.SIGTERM))
    assert stderr.count("the same command continues") == 1
    assert f'File "{doors.ROOT}/mutune' not in stderr  # the traceback there is torchrun's own
    last = len(records(tmp_path))
    assert str(last) in saved(tmp_path)
    assert furthest(losses(records(tmp_path)), losses(undisturbed)[:last]) < CLOSE


def test_processes_keep_the_checkpoints_that_the_first_was_asked_to_keep(transfer: str, tmp_path: Path) -> None:
    process = torchrun(2, *arguments(transfer, tmp_path, "keep_every=7"))
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert {"7", "14", "56", "60"} <= saved(tmp_path)


def test_processes_that_cannot_share_a_batch_are_refused_in_one_sentence(transfer: str, tmp_path: Path) -> None:
    process = torchrun(3, *arguments(transfer, tmp_path))
    _, stderr = process.communicate(timeout=120)
    sentence = "target.stages[0].batch_sequences=8 cannot be shared evenly by 3 processes"
    assert stderr.count(sentence) == 1
    assert not (tmp_path / "train").exists()


def test_a_time_limit_saves_and_the_same_command_goes_on_bit_for_bit(
    transfer: str, undisturbed: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(underway, "STARTED", underway.STARTED - 3600)
    stopped = doors.run("train", *arguments(transfer, tmp_path, "time_limit=60"), expect=143)
    kept = f"the newest checkpoint is {tmp_path}/train/tiny/checkpoints/1, from which the same command goes on"
    assert f"stopped    after step 1 of 60: time_limit=60 minutes are over; {kept}\n" in stopped.stderr
    doors.run("train", *arguments(transfer, tmp_path))
    assert records(tmp_path) == undisturbed


LAUNCHED = {"TORCHELASTIC_RUN_ID": "a", "RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize(
    ("key", "targets", "environment", "threads", "why"),
    [
        (3, 5, {"OMP_NUM_THREADS": "7"}, 3, "threads="),
        (None, 5, {"OMP_NUM_THREADS": "7"}, 5, "target.loop.threads"),
        (None, None, {"OMP_NUM_THREADS": "7"}, 7, "OMP_NUM_THREADS"),
        (None, None, {"OMP_NUM_THREADS": "1"}, 1, "OMP_NUM_THREADS"),
        (None, None, {"OMP_NUM_THREADS": "7,2"}, 7, "OMP_NUM_THREADS"),
        (None, None, {"OMP_NUM_THREADS": "0"}, 16, "cores"),
        (None, None, {"OMP_NUM_THREADS": "many"}, 16, "cores"),
        (None, None, {}, 16, "cores"),
        (None, None, {"OMP_NUM_THREADS": "1", **LAUNCHED}, 4, "its share of the cores"),  # as torchrun sets it
        (None, None, {"OMP_NUM_THREADS": "7", **LAUNCHED}, 7, "OMP_NUM_THREADS"),
        (1, None, {"OMP_NUM_THREADS": "7", **LAUNCHED}, 1, "threads="),
    ],
)
def test_threads_are_those_of_the_key_else_of_the_environment_else_the_cores(
    key: int | None,
    targets: int | None,
    environment: dict[str, str],
    threads: int,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mutune import train

    monkeypatch.setattr(train, "default_workers", lambda: 16)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = SweepConfig().spec()
    spec = replace(spec, loop=replace(spec.loop, threads=targets))
    assert train._threads(TrainConfig(threads=key), spec) == (threads, why)


def test_a_run_says_how_many_threads_it_has_and_why(
    transfer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(underway, "STARTED", underway.STARTED - 3600)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    words = [word for word in arguments(transfer, tmp_path, "time_limit=60") if word != "threads=1"]
    said = doors.run("train", *words, expect=143).stderr
    assert "60 steps, by 2 threads (OMP_NUM_THREADS) → " in said.splitlines()[0]


def test_an_earlier_checkpoint_is_used_when_asked_for_and_the_newer_are_set_aside(
    transfer: str, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    doors.run("train", *arguments(transfer, tmp_path))
    state = tmp_path / "train/tiny/checkpoints/60/state.safetensors"
    size = state.stat().st_size
    os.truncate(state, 1000)
    refused = doors.run("train", *arguments(transfer, tmp_path), expect=2)
    before = saved(tmp_path)
    cut = f"is damaged (state.safetensors has 1,000 of its {size:,} bytes); resume=55 goes on from the one before it."
    assert cut in refused.stderr
    os.truncate(state.parents[1] / "55/state.safetensors", 1000)
    refused = doors.run("train", *arguments(transfer, tmp_path, "resume=55"), expect=2)
    assert "resume=50 goes on from the one before it" in refused.stderr
    assert saved(tmp_path) == before  # nothing was set aside
    missing = doors.run("train", *arguments(transfer, tmp_path, "resume=7"), expect=2)
    assert "resume=7 has no checkpoint under " in missing.stderr
    resumed = doors.run("train", *arguments(transfer, tmp_path, "resume=45"))
    assert "resuming   tiny at step 45 of 60" in resumed.stderr
    folder = tmp_path / "train/tiny/checkpoints"
    size = sum(file.stat().st_size for step in (50, 55, 60) for file in (folder / f"{step}.aside").iterdir())
    assert (
        f"set aside  the newer checkpoints 50, 55, 60: {folder}/<step>.aside, {size / 2**20:.0f} MiB;" in resumed.stderr
    )
    assert records(tmp_path) == undisturbed
    assert {"50.aside", "55.aside", "60.aside", "60"} <= saved(tmp_path)
    again = doors.run("train", *arguments(transfer, tmp_path, "resume=45"))  # as a job does that is started again
    assert "finished   tiny was" in again.stderr
    assert (
        "note       resume=45 was done before, and the run goes on from what it has reached since; to go back there "
        f"once more, remove {folder}/gone_back.json" in again.stderr
    )


def test_seconds_and_cost_are_those_of_all_starts_and_of_steps_made_again(transfer: str, tmp_path: Path) -> None:
    priced, path = arguments(transfer, tmp_path, "gpu_hour=3600"), tmp_path / "train/tiny/metrics.jsonl"
    doors.run("train", *priced)
    first = json.loads(path.read_text().splitlines()[-1])
    assert first["cost"] == pytest.approx(first["seconds"])
    with path.open("a") as lines:
        lines.write('{"step": 61, "loss": 1')  # as a kill leaves it
    kept = [json.loads(line) for line in path.read_text().splitlines()[:40]]
    so_far = spent(path.parent, [])
    assert so_far == (first["seconds"], first["cost"])
    remember_spent(path.parent, *so_far)  # by a start that is killed before its first record, without a newline
    path.write_text("\n".join(json.dumps(record) for record in kept))
    doors.run("train", *priced, "resume=40")
    last = [json.loads(line) for line in path.read_text().splitlines()][40:]
    assert all(record["cost"] > first["cost"] for record in last)
    assert last[0]["seconds"] > first["seconds"]
    assert last[-1]["cost"] == pytest.approx(last[-1]["seconds"])
