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


def train(transfer: str, out: Path, processes: int, *, kill_after: float | None = None) -> bool:
    """Run the command, and kill one of its processes after that many seconds of training; whether it was killed."""
    words = [transfer, f"out={out}", "checkpoint_every=20", "threads=1"]
    process = torchrun(processes, *words) if processes > 1 else doors.start("train", *words)
    began = len(records(out))
    if kill_after is not None:
        try:
            doors.wait_until(lambda: len(records(out)) > began or len(records(out)) < began, process)
        except AssertionError:
            return False  # it ended first
        time.sleep(kill_after)
        victims = [process.pid]
        if processes > 1:
            children = psutil.Process(process.pid).children(recursive=True)
            victims = [child.pid for child in children if child.environ().get("RANK") == str(random.randrange(2))]
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
    _, stderr = process.communicate(timeout=1800)
    assert kill_after is not None or process.returncode == 0, stderr
    return process.returncode != 0


@pytest.mark.soak
def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_an_undisturbed_one(tmp_path: Path) -> None:
    doors.run("transfer", *TARGET, f"out={tmp_path}")
    transfer = f"transfer={tmp_path / 'transfer/published--tiny/transfer.yaml'}"
    rows = []
    for processes in (1, 2):
        undisturbed, killed = tmp_path / f"undisturbed{processes}", tmp_path / f"killed{processes}"
        began = time.monotonic()
        train(transfer, undisturbed, processes)
        draw, kills = random.Random(processes), 0
        per_kill = (time.monotonic() - began) / KILLS
        while kills < KILLS and train(transfer, killed, processes, kill_after=draw.uniform(0.0, 1.5 * per_kill)):
            kills += 1
        train(transfer, killed, processes)
        ours, theirs = weights(killed), weights(undisturbed)
        same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
        rows.append(
            {
                "processes": processes,
                "steps": len(records(killed)),
                "kills": kills,
                "records equal": records(killed) == records(undisturbed),
                "weights and moments equal, bit for bit": same,
            }
        )
        assert kills == KILLS
        assert same
        assert records(killed) == records(undisturbed)
    soak.record("target_kill", "A target killed at random, against an undisturbed one", rows)
