"""`branch_from=`: a run that leaves another one's checkpoint is the run that it would have been from its start."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from mutune import underway
from tests import doors
from tests.test_train_processes import OF_A_PROCESS, TARGET

CONSTANT = "{kind: constant, warmup_steps: 3}"
DECAYING = "{kind: wsd, warmup_steps: 3, decay_steps: 10, end_ratio: 0.1}"
LINEAR = "{kind: linear, warmup_steps: 3}"
STAGE = "context_length: 32, batch_sequences: 8"
LONG = "{context_length: 64, batch_sequences: 4, num_steps: 10}"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("branches")


def trained(out: Path, name: str, schedule: str, stages: str, *words: str, expect: int = 0) -> str:
    """Transfer to a target of that name and train it; returns what was said on stderr and stdout."""
    own = [word for word in TARGET if not word.startswith(("target.name", "target.schedule", "target.stages"))]
    target = [f"target.name={name}", f"target.schedule={schedule}", f"target.stages=[{stages}]"]
    doors.run("transfer", *own, *target, f"out={out}", "overwrite=true")
    transfer = f"transfer={out}/transfer/published--{name}/transfer.yaml"
    done = doors.run(
        "train", transfer, f"out={out}", "checkpoint_every=10", "keep_every=10", "threads=1", *words, expect=expect
    )
    return done.stderr + done.stdout


def records(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / f"train/{name}/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_A_PROCESS} for line in lines]


@pytest.fixture(scope="module")
def trunk(out: Path) -> str:
    """The key that branches from step 20 of a run of 40 at a constant rate."""
    trained(out, "trunk", CONSTANT, f"{{{STAGE}, num_steps: 40}}")
    return f"branch_from={out}/train/trunk/checkpoints/20"


@pytest.fixture(scope="module")
def decay(out: Path, trunk: str) -> str:
    """What a run says that leaves the trunk to decay to step 30."""
    return trained(out, "decay", DECAYING, f"{{{STAGE}, num_steps: 30}}", trunk)


def test_a_decay_that_leaves_a_trunk_is_the_run_that_decays_there(out: Path, decay: str) -> None:
    said, stages = decay, f"{{{STAGE}, num_steps: 30}}"
    assert "branching  decay at step 20 of 30, by " in said
    (line,) = (line for line in said.splitlines() if line.startswith("branch  "))
    assert line.startswith(
        f"branch     from step 20 of {out}/train/trunk/, 10 steps are left; the base learning rate goes"
    )
    last = records(out, "decay")[-1]["lr"]
    assert line.endswith(f"from 0.002 to 0.002 there, and to {last:.4g} at step 30 (wsd, decay over the last 10 steps)")
    trained(out, "whole", DECAYING, stages)
    assert records(out, "decay") == records(out, "whole")
    assert records(out, "decay")[:20] == records(out, "trunk")[:20]
    assert records(out, "decay")[-1]["lr"] < 0.3 * records(out, "trunk")[-1]["lr"]


@pytest.mark.usefixtures("decay")
def test_a_branch_that_is_stopped_goes_on_from_its_own_checkpoint(
    out: Path, trunk: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    stages = f"{{{STAGE}, num_steps: 30}}"
    with monkeypatch.context() as late:
        late.setattr(underway, "STARTED", underway.STARTED - 3600)
        trained(out, "stopped", DECAYING, stages, trunk, "time_limit=60", expect=143)
    kept = out / "train/trunk/checkpoints/20"
    kept.rename(kept.with_name("gone"))
    try:
        typo = trained(out, "stopped", DECAYING, stages, trunk.replace("/20", "/7"), expect=2)
        assert f"is not to be read, and the run in {out}/train/stopped began at step 20 of its trunk; for exam" in typo
        other = trained(out, "stopped", DECAYING, f"{{{STAGE}, num_steps: 31}}", trunk, "overwrite=true", expect=2)
        assert f"is gone, and known only to the run in {out}/train/stopped, which overwrite=true replaces" in other
        said = trained(out, "stopped", DECAYING, stages, trunk)
    finally:
        kept.with_name("gone").rename(kept)
    assert "resuming   stopped at step 21 of 30" in said
    assert "branch     from step 20 of a run that no longer has that checkpoint" in said
    assert records(out, "stopped") == records(out, "decay")


def test_a_longer_context_goes_on_from_a_finished_run_and_keeps_what_it_read(out: Path, trunk: str) -> None:
    stages = f"{{{STAGE}, num_steps: 40}}, {LONG}"
    end = trunk.replace("checkpoints/20", "checkpoints/40")
    trained(out, "longer", CONSTANT, stages, end)
    history = records(out, "longer")
    assert history[:40] == records(out, "trunk")
    assert [record["context_length"] for record in history[40:]] == [64] * 10
    assert history[-1]["loss"] < history[0]["loss"] - 0.5


@pytest.mark.parametrize(
    ("stages", "schedule", "words", "said"),
    [
        (f"{{{STAGE}, num_steps: 30}}", DECAYING, ["seed=1"], "is of another run (seed: 0 → 1)"),
        (f"{{{STAGE}, num_steps: 20}}", CONSTANT, [], "has done 20 steps, and this run has 20"),
        (
            f"{{{STAGE}, num_steps: 15}}, {LONG}",
            LINEAR,
            [],
            "of which the stages of this run have the first 15 in common",
        ),
    ],
)
def test_what_cannot_be_a_branch_is_refused_before_anything_is_written(
    stages: str, schedule: str, words: list[str], said: str, out: Path, trunk: str
) -> None:
    assert said in trained(out, "wrong", schedule, stages, trunk, *words, "overwrite=true", expect=2)
    assert not (out / "train/wrong").exists()


def test_a_branch_goes_on_where_its_trunk_s_checkpoint_was_damaged_since_and_a_new_one_is_told_of_another(
    out: Path, trunk: str, tmp_path: Path
) -> None:
    stages = f"{{{STAGE}, num_steps: 30}}"
    trained(out, "begun", DECAYING, stages, trunk)
    path = out / "train/trunk/checkpoints/20/state.safetensors"
    shutil.copy(path, tmp_path / "kept")
    os.truncate(path, 100)
    try:
        assert "finished   begun was" in trained(out, "begun", DECAYING, stages, trunk)
        said = trained(out, "fresh", DECAYING, stages, trunk, expect=2)
    finally:
        shutil.copy(tmp_path / "kept", path)
    meta = path.with_name("meta.json")
    kept = meta.read_text()
    meta.write_text(json.dumps({key: value for key, value in json.loads(kept).items() if key != "run"}))
    assert "its meta.json does not say of which run it is" in trained(out, "fresh", DECAYING, stages, trunk, expect=2)
    meta.write_text(kept)
    before = max(int(each.name) for each in path.parents[1].iterdir() if each.name.isdecimal() and int(each.name) < 20)
    assert f"; branch_from={path.parents[1]}/{before} is one before it." in said


def test_a_branch_that_is_started_again_without_its_trunk_is_told_so(out: Path, trunk: str) -> None:
    stages = f"{{{STAGE}, num_steps: 30}}"
    trained(out, "again", DECAYING, stages, trunk)
    said = trained(out, "again", DECAYING, stages, expect=2)
    assert f"{out}/train/again is of a run that began with branch_from=, which has to be given again; for exam" in said


def test_a_checkpoint_that_was_set_aside_is_no_trunk(out: Path, trunk: str) -> None:
    root = out / "train/trunk/checkpoints"
    shutil.copytree(root / "20", root / "20.aside")
    said = trained(out, "aside", DECAYING, f"{{{STAGE}, num_steps: 30}}", f"{trunk}.aside", expect=2)
    shutil.rmtree(root / "20.aside")
    assert f"branch_from={root}/20.aside does not have the number of its step as its name, so that" in said


def test_a_folder_that_is_no_checkpoint_is_refused(out: Path) -> None:
    said = trained(out, "none", DECAYING, f"{{{STAGE}, num_steps: 30}}", "branch_from=nowhere", expect=2)
    assert "branch_from=nowhere is no checkpoint; for example branch_from=runs/train/" in said


def test_checkpoints_that_were_asked_to_stay_do_so_where_a_later_start_does_not_ask(out: Path) -> None:
    own = [word for word in TARGET if not word.startswith(("target.name", "target.schedule", "target.stages"))]
    stages = f"target.stages=[{{{STAGE}, num_steps: 30}}]"
    doors.run("transfer", *own, "target.name=kept", f"target.schedule={CONSTANT}", stages, f"out={out}")
    words = [f"transfer={out}/transfer/published--kept/transfer.yaml", f"out={out}", "threads=1", "checkpoint_every=10"]
    root = out / "train/kept/checkpoints"
    doors.run("train", *words, "keep_every=7")
    assert {int(path.name) for path in root.iterdir() if path.name.isdecimal()} == {7, 14, 21, 28, 30}
    doors.run("train", *words, "resume=14")
    assert {int(path.name) for path in root.iterdir() if path.name.isdecimal()} == {7, 14, 21, 28, 30}
