"""Twenty kills at random moments, of one process and of two: the weights end as those of an undisturbed run."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import doors, soak
from tests.test_train_processes import records, torchrun

KILLS = 20
TARGET = [
    "study=published",
    "target=small",
    "target.name=tiny",
    "target.schedule={kind: linear, warmup_fraction: 0.05}",
]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Of the last checkpoint: tensor for tensor, the parts of each file under a name of their own."""
    newest = max((out / "train/tiny/checkpoints").iterdir(), key=lambda path: int(path.name))
    return {
        f"{file.name} {name}": tensor
        for file in sorted(newest.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def train(transfer: str, out: Path, processes: int, *, after: int | None = None, draw: random.Random) -> bool:
    """Run the command, and kill one of its processes somewhere in a step after so many; whether it was killed."""
    words = [transfer, f"out={out}", "checkpoint_every=5", "threads=1"]
    process = torchrun(processes, *words) if processes > 1 else doors.start("train", *words)
    if after is not None:
        began = last_step(out)
        try:
            doors.wait_until(lambda: last_step(out) >= began + after, process)
        except AssertionError:
            return False  # it ended first
        time.sleep(draw.uniform(0.0, 0.3))
        victims = [process.pid]
        if processes > 1:
            rank, children = str(draw.randrange(2)), psutil.Process(process.pid).children(recursive=True)
            (victim,) = [child.pid for child in children if child.environ().get("RANK") == rank]
            victims = [victim]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=1800)
    assert after is not None or process.returncode == 0, stderr
    return process.returncode != 0


def last_step(out: Path) -> int:
    """How many records are there."""
    path = out / "train/tiny/metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_an_undisturbed_one(
    processes: int, tmp_path: Path
) -> None:
    doors.run("transfer", *TARGET, f"out={tmp_path}")
    transfer = f"transfer={tmp_path / 'transfer/published--tiny/transfer.yaml'}"
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    draw, kills = random.Random(processes), 0
    train(transfer, undisturbed, processes, draw=draw)
    while kills < KILLS and train(transfer, killed, processes, after=draw.randint(1, 35), draw=draw):
        kills += 1
    train(transfer, killed, processes, draw=draw)
    ours, theirs = weights(killed), weights(undisturbed)
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    row = {
        "processes": processes,
        "steps": last_step(killed),
        "kills": kills,
        "records equal": records(killed) == records(undisturbed),
        "weights and moments equal, bit for bit": same,
    }
    assert kills == KILLS
    assert same
    assert records(killed) == records(undisturbed)
    title = (
        f"The target small, {processes} process{'es' if processes > 1 else ''}, killed at random, against undisturbed"
    )
    soak.record(f"target_kill_{processes}", title, [row])
