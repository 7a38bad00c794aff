"""`mutune.train dry_run=true` refuses what the run would refuse at its start, in the same words, and writes nothing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mutune.folders import locked
from tests import doors
from tests.test_train_processes import TARGET

SHORT = "target.stages=[{context_length: 32, batch_sequences: 8, num_steps: 20}]"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, `tiny`, and the transfer file it came from."""
    out = tmp_path_factory.mktemp("house")
    doors.run("transfer", *TARGET, SHORT, f"out={out}")
    doors.run("train", transfer(out), f"out={out}", "checkpoint_every=5", "threads=1")
    return out


def transfer(out: Path) -> str:
    return f"transfer={out / 'transfer/published--tiny/transfer.yaml'}"


def files(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def refused(house: Path, out: Path, *words: str) -> str:
    """What both the dry run and the run say, who leave everything as it was."""
    before = files(out)
    said = [doors.run("train", transfer(house), f"out={out}", *more, *words, expect=2).stderr for more in (DRY, [])]
    assert said[0] == said[1]
    assert said[0].count("\n") == 1
    assert files(out) == before
    return said[0]


DRY = ["dry_run=true"]


def without_records(run: Path) -> None:
    (run / "metrics.jsonl").write_text("")


def cut(run: Path) -> None:
    with (run / "checkpoints/20/state.safetensors").open("r+b") as file:
        file.truncate(1000)


def of_another_plan(run: Path) -> None:
    path = run / "checkpoints/20/meta.json"
    meta = json.loads(path.read_text())
    meta["plan"]["parameters"]["wte.weight"]["lr_mult"] = 0.5
    path.write_text(json.dumps(meta))


def of_other_text(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["inputs"]["data_hash"] = "another"
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def of_a_damaged_guard(run: Path) -> None:
    path = run / "checkpoints/20/meta.json"
    meta = json.loads(path.read_text())
    meta["guard"]["skips"] = [[5]]
    path.write_text(json.dumps(meta))


def without_its_config(run: Path) -> None:
    (run / "config.yaml").write_text("")


def swapped(run: Path) -> None:
    root = run / "checkpoints"
    for old, new in (("15", "kept"), ("20", "15"), ("kept", "20")):
        (root / old).rename(root / new)


def empty(run: Path) -> None:
    (run / "checkpoints/99").mkdir()


def of_a_damaged_note(run: Path) -> None:
    (run / "checkpoints/kept_every.json").write_text("[")


def of_a_file_for_checkpoints(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").write_text("")


def as_it_is(run: Path) -> None:
    """Change nothing."""


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (as_it_is, ["seed=1"], "holds results of other inputs (run.seed: 0 → 1); choose another name=NAME, or"),
        (of_other_text, [], "holds results of other inputs (data_hash: another → "),
        (as_it_is, ["resume=7"], "resume=7 has no checkpoint under "),
        (as_it_is, ["seed=1", "overwrite=true", "resume=15"], "resume=15 is a checkpoint of the run in "),
        (
            without_records,
            [],
            "metrics.jsonl lacks the whole record of step 1, though there is a checkpoint of step 20",
        ),
        (cut, [], "checkpoint {out}/train/tiny/checkpoints/20 is damaged (state.safetensors has 1,000 of its "),
        (of_another_plan, [], "was written by another run: plan.parameters.wte.weight.lr_mult is 0.5 there"),
        (
            of_a_damaged_guard,
            [],
            "checkpoints/20/meta.json is damaged where it says what the guard knew (guard.skips has [5])",
        ),
        (
            without_its_config,
            [],
            "config.yaml does not say which inputs made the results beside it; choose another",
        ),
        (swapped, [], "checkpoints/20 is that of step 15 by its own meta.json; give it back its name, or: resume=15 "),
        (empty, [], "checkpoints/99 cannot be read ([Errno 2] No such file or directory: "),
        (
            of_a_damaged_note,
            [],
            "kept_every.json is damaged (Expecting value: line 1 column 2 (char 1)); restore it, or",
        ),
        (of_a_file_for_checkpoints, [], "{out}/train/tiny/checkpoints is a file; move it away, or choose another name"),
        (as_it_is, ["parallel.replicas=2"], "parallel.replicas=2 does not divide the 1 process; for example parall"),
        (as_it_is, ["branch_from={out}/train/tiny/checkpoints/20", "name=other"], "has done 20 steps, and this run"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    change: Callable[[Path], None], words: list[str], sentence: str, house: Path, tmp_path: Path
) -> None:
    shutil.copytree(house / "train", tmp_path / "train")
    change(tmp_path / "train/tiny")
    said = refused(house, tmp_path, *(word.format(out=tmp_path) for word in words))
    assert sentence.format(out=tmp_path) in said


def test_a_dry_run_refuses_a_folder_that_another_process_trains_in(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house / "train", tmp_path / "train")
    with locked(tmp_path / "train/tiny", "name"):
        assert "is in use by another mutune process; wait for it" in refused(house, tmp_path)
    doors.run("train", transfer(house), f"out={tmp_path}", *DRY)  # which is over


def test_a_dry_run_of_a_branch_looks_into_its_trunk(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house / "train", tmp_path / "train")
    doors.run("transfer", *TARGET, SHORT.replace("20", "30"), f"out={tmp_path}")
    words = [f"branch_from={tmp_path}/train/tiny/checkpoints/20", "name=longer"]
    said = doors.run("train", transfer(tmp_path), f"out={tmp_path}", *DRY, *words).stdout
    assert f"branch     from step 20 of {tmp_path}/train/tiny/, 10 steps are left" in said
    assert not (tmp_path / "train/longer").exists()
    assert "stands " not in said  # of its own it has done nothing yet
    without_records(tmp_path / "train/tiny")
    said = doors.run("train", transfer(tmp_path), f"out={tmp_path}", *DRY, *words, expect=2).stderr
    assert "metrics.jsonl lacks the whole record of step 1" in said


def test_a_dry_run_of_a_run_that_may_go_on_leaves_everything_as_it_was(house: Path) -> None:
    before = files(house)
    over, on = "at step 20 of 20; only its figures and report", "at step 15 of 20; the same command goes on from there"
    for words, stands in (
        ([], over),
        (["resume=15"], on),
        (["name=another"], None),
        (["seed=1", "overwrite=true"], None),
        (["device=cpu"], over),
    ):
        said = doors.run("train", transfer(house), f"out={house}", *DRY, *words).stdout
        assert said.endswith(f"leave out dry_run=true to {'go on' if stands else 'start'}.\n")
        assert ("replaces   " in said) == ("overwrite=true" in words)
        assert "\ntext       sotu has " in said
        assert (f"stands     tiny {stands}" in said) if stands else ("stands " not in said)
    assert files(house) == before


def test_of_several_processes_only_the_first_tells_a_price(
    house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (("TORCHELASTIC_RUN_ID", "a"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(key, value)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        said = doors.run("train", transfer(house), f"out={tmp_path}", *DRY).stdout
        assert ("parameters " in said) == (rank == "0")


def test_on_named_hardware_replicas_are_held_against_its_gpus(house: Path, tmp_path: Path) -> None:
    words = [transfer(house), f"out={tmp_path}", *DRY, "hardware=h100-sxm", "gpus=8"]
    doors.run("train", *words, "parallel.replicas=2")
    said = doors.run("train", *words, "parallel.replicas=3", expect=2).stderr
    assert "parallel.replicas=3 does not divide gpus=8" in said


@pytest.mark.parametrize(
    "schedule", ["{kind: linear, warmup_steps: 3}", "{kind: wsd, warmup_steps: 0, decay_steps: 5}"]
)
def test_a_dry_run_names_the_rates_by_the_steps_that_the_records_have(schedule: str, tmp_path: Path) -> None:
    stages = "target.stages=[{context_length: 32, batch_sequences: 8, num_steps: 6, end_ratio: 0.5}," + SHORT[15:]
    doors.run("transfer", *TARGET, f"target.schedule={schedule}", stages, f"out={tmp_path}")
    said = doors.run("train", transfer(tmp_path), f"out={tmp_path}", *DRY).stdout
    (line,) = (line for line in said.splitlines() if line.startswith("schedule"))
    rates = dict(re.findall(r"step (\d+): ([\d.e-]+)", line))
    doors.run("train", transfer(tmp_path), f"out={tmp_path}", "threads=1")
    found = [json.loads(line) for line in (tmp_path / "train/tiny/metrics.jsonl").read_text().splitlines()]
    assert rates == {step: f"{found[int(step) - 1]['lr']:.5g}" for step in rates}
    assert {"1", "6", "26"} <= rates.keys()
    assert max(record["lr"] for record in found) == found[3 if "linear" in schedule else 0]["lr"]
    assert ("4" in rates) == ("linear" in schedule)
    assert ("wsd, decay over the last 5 steps, warm-up 0 steps" in line) == ("wsd" in schedule)
