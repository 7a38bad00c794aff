"""Several processes train one run: the same initial values, the same losses, and checkpoints that any number reads."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutune.errors import Refusal
from mutune.training import checkpoint
from mutune.training.config import ParallelConfig
from mutune.training.distribution import require_even
from mutune.training.run import Run
from tests.doors import ROOT
from tests.training.processes import LOW, SAVED, SPEC, STEPS, WAYS, digest, losses
from tests.training.test_rollback import Told
from tests.training.test_rollback import trained as trained_under_guard

CPU = torch.device("cpu")
CLOSE = 1e-5  # nats: what the order of sums may change over the run, in float32
LOW_CLOSE = 1e-3  # nats over five steps, where gains and biases are rounded to bfloat16 too


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes),
        *arguments,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[int, dict[str, Any]]:
    """What so many processes found, four of them first."""
    results = {}
    for processes in (4, 2, 1):
        done = torchrun(processes, "-m", "tests.training.processes", str(folder))
        assert done.returncode == 0, done.stderr
        results[processes] = json.loads((folder / f"{processes}.json").read_text())
    return results


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same run in this process, whose model is not sharded."""
    run = Run(SPEC, CPU)
    initial = digest(run.model)
    records = list(run.records())
    heldout = [record["heldout_loss"] for record in records if "heldout_loss" in record]
    return {"initial": initial, "losses": [record["loss"] for record in records], "heldout": heldout}


def furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_begins_with_the_same_values(
    processes: int, found: dict[int, dict[str, Any]], plain: dict[str, Any]
) -> None:
    assert found[processes]["run"]["initial"] == plain["initial"]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_has_the_same_losses_over_two_stages(
    processes: int, found: dict[int, dict[str, Any]], plain: dict[str, Any]
) -> None:
    assert len(plain["losses"]) == STEPS
    assert plain["losses"][-1] < plain["losses"][0] - 0.5  # it learns, so that there is something to compare
    assert furthest(found[processes]["run"]["losses"], plain["losses"]) < CLOSE
    assert len(plain["heldout"]) == 2  # the windows do not divide evenly
    assert furthest(found[processes]["run"]["heldout"], plain["heldout"]) < CLOSE


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(processes: int, found: dict[int, dict[str, Any]]) -> None:
    run, same = found[processes]["run"], found[processes]["same"]
    assert same["losses"] == run["losses"][SAVED:]
    assert same["final"] == run["final"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_of_four_processes_goes_on_with_fewer(processes: int, found: dict[int, dict[str, Any]]) -> None:
    assert furthest(found[processes]["from_4"]["losses"], found[4]["run"]["losses"][SAVED:]) < CLOSE


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_checkpoint_of_any_number_goes_on_in_one_process_without_torchrun(
    processes: int, found: dict[int, dict[str, Any]], plain: dict[str, Any], folder: Path
) -> None:
    run = Run(replace(SPEC, seed=SPEC.seed), CPU)
    checkpoint.restore(checkpoint.read(folder / f"of_{processes}" / str(SAVED)), run.model, run.optimizer)
    assert furthest(losses(run, SAVED), plain["losses"][SAVED:]) < CLOSE


@pytest.mark.parametrize(
    ("processes", "way"), [*((2, name) for name in WAYS), (2, "parts"), (4, "replicas"), (4, "accumulated")]
)
def test_how_a_run_is_spread_changes_nothing_that_it_computes(
    processes: int, way: str, found: dict[int, dict[str, Any]], plain: dict[str, Any]
) -> None:
    assert furthest(found[processes][way]["losses"], plain["losses"][:5]) < CLOSE


def test_a_sharded_run_in_bfloat16_is_that_of_autocast(found: dict[int, dict[str, Any]], plain: dict[str, Any]) -> None:
    low = losses(Run(LOW, CPU), until=5)
    assert furthest(low, plain["losses"][:5]) > 1e-5  # it does round
    assert furthest(found[1]["bfloat16"]["losses"], low) < LOW_CLOSE


def test_what_the_audit_of_one_process_finds_all_say(found: dict[int, dict[str, Any]]) -> None:
    said = found[2]["audited"]["said"]
    assert said.startswith("process 1 of 2: the audit found")
    assert "Adam's eps" in said


def test_processes_that_read_other_texts_are_refused(found: dict[int, dict[str, Any]]) -> None:
    said = "process 1 of 2 has other text (def; the first has abc); share the files."
    assert found[2]["texts"]["said"] == said


def test_a_checkpoint_that_one_process_does_not_see_is_refused_by_all(found: dict[int, dict[str, Any]]) -> None:
    said = found[2]["unreadable"]["said"]
    assert said.startswith("process 1 of 2: checkpoint ")
    assert f"hidden/checkpoints/{SAVED} cannot be read" in said


@pytest.mark.parametrize("background", [False, True])
def test_where_one_process_cannot_write_the_save_fails_for_all_and_leaves_what_was_there(
    background: bool, found: dict[int, dict[str, Any]]
) -> None:
    full = found[2][f"full_{background}"]
    assert "process 1 could not write its part of a checkpoint" in full["said"]
    assert full["left"] == [str(SAVED)]


def test_processes_go_back_together_and_leave_out_the_same_batches(
    found: dict[int, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    alone = trained_under_guard(tmp_path, "rollback", damage=True)
    assert found[2]["rolled_back"]["skips"] == [[skip.from_step, skip.num_skipped] for skip in alone.skips] != []
    together = Told(folder / "rolled_back", alone.skips)
    assert together.actions() == alone.actions()
    assert furthest(list(together.losses().values()), list(alone.losses().values())) < 10 * CLOSE


def test_a_lost_or_cut_shard_is_named_before_anything_is_loaded(found: dict[int, dict[str, Any]], folder: Path) -> None:
    path = folder / "of_4" / str(SAVED)
    shard = sorted(path.glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    for broken, said in ((None, "is missing"), (whole[:-100], f"has {len(whole) - 100:,} of its {len(whole):,} bytes")):
        shard.unlink()
        if broken is not None:
            shard.write_bytes(broken)
        with pytest.raises(Refusal, match=f"{shard.name} {said}"):
            checkpoint.read(path)
        shard.write_bytes(whole)
    checkpoint.read(path)


def test_a_batch_that_cannot_be_shared_is_refused_with_a_number_of_processes_that_can() -> None:
    with pytest.raises(Refusal, match=r"batch_sequences=6 cannot be shared evenly by 4 processes; .* with 3 of them"):
        require_even([8, 6], 4, ParallelConfig())
    with pytest.raises(Refusal, match=r"parallel\.replicas=3 does not divide the 4 processes"):
        require_even([8], 4, ParallelConfig(replicas=3))
    require_even([7], 1, ParallelConfig())
