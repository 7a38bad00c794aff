"""Records for TensorBoard and Weights & Biases: what is written is what was measured, and nothing is needed unasked."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from mutune.errors import Refusal
from mutune.training.writers import numbers, open_writers, require_writers

RECORDS: list[dict[str, Any]] = [
    {"step": step, "loss": 4.0 - step / 8, "lr": 0.01, "diverged": False, "note": "text"} for step in (1, 2, 3)
]


def test_every_number_of_a_record_is_drawn_over_its_step() -> None:
    assert numbers(RECORDS[0]) == {"loss": 3.875, "lr": 0.01, "diverged": 0.0}


def test_nobody_asked_for_is_nobody_written_to(tmp_path: Path) -> None:
    assert open_writers([], tmp_path / "run", "run", {}) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mutune.training.writers.find_spec", lambda _: None)
    with pytest.raises(Refusal, match=rf"^writers=\['{name}'\] needs .* pip install 'mutune\[{name}\]'\.$"):
        require_writers([name])
    with pytest.raises(Refusal):
        open_writers([name], tmp_path / "run", "run", {})
    assert list(tmp_path.iterdir()) == []


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads of the events in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(each.step, each.value) for each in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("default")  # TensorBoard's own
def test_tensorboard_reads_what_was_written_and_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (writer,) = open_writers(["tensorboard"], tmp_path, "run", {})
    for record in RECORDS:
        writer.write(record)
    writer.close()
    assert read(tmp_path / "tensorboard")["loss"] == [(1, 3.875), (2, 3.75), (3, 3.625)]
    (again,) = open_writers(["tensorboard"], tmp_path, "run", {}, start_step=1)
    again.write({"step": 2, "loss": 9.0})
    again.close()
    assert read(tmp_path / "tensorboard")["loss"] == [(1, 3.875), (2, 9.0)]


@pytest.mark.filterwarnings("default")
def test_tensorboard_forgets_the_steps_that_a_run_goes_back_over(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (writer,) = open_writers(["tensorboard"], tmp_path, "run", {})
    for record in RECORDS:
        writer.write(record)
    writer.rewind(1)
    writer.write({"step": 2, "loss": 9.0})
    writer.close()
    assert read(tmp_path / "tensorboard")["loss"] == [(1, 3.875), (2, 9.0)]


def test_wandb_is_given_the_run_and_every_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said: list[Any] = []
    axes: dict[str, str | None] = {}

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            axes[name] = step_metric

        def log(self, values: dict[str, float]) -> None:  # over W&B's own count, which only rises
            said.append(values)

        def finish(self) -> None:
            said.append("finished")

    class Package:
        __spec__ = None

        @staticmethod
        def init(**given: Any) -> Run:
            said.append(given)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Package)
    monkeypatch.setattr("mutune.training.writers.find_spec", lambda _: Package)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for _ in "ab":
        (writer,) = open_writers(["wandb"], tmp_path, "small", {"seed": 3})
        writer.write(RECORDS[0])
        writer.close()
    first, logged, finished, second, *_ = said
    assert (first["project"], first["name"], first["config"], first["dir"]) == (
        "mutune",
        "small",
        {"seed": 3},
        str(tmp_path),
    )
    assert first["resume"] == "allow"
    assert first["id"] == second["id"]  # the same run goes on
    assert logged == {"step": 1, "loss": 3.875, "lr": 0.01, "diverged": 0.0}
    assert axes == {"step": None, "*": "step"}
    assert finished == "finished"


@pytest.mark.filterwarnings("default")
def test_wandb_offline_keeps_in_the_run_s_folder_also_the_steps_that_are_made_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (writer,) = open_writers(["wandb"], tmp_path, "small", {"seed": 3})
    for record in RECORDS:
        writer.write(record)
    writer.rewind(1)
    writer.write({"step": 2, "loss": 9.0})
    writer.close()
    (log,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    history = history_of(log)
    assert [(each["step"], each["loss"]) for each in history] == [(1, 3.875), (2, 3.75), (3, 3.625), (2, 9.0)]


def history_of(path: Path) -> list[dict[str, float]]:
    """What was logged to W&B's file: a LevelDB log of protocol buffers, behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, begun, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        if left < 7 or kind == 0:  # the rest of a block is not used
            place += left
            continue
        begun, place = begun + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, begun = Record.FromString(begun), b""
            if record.HasField("history"):
                items = record.history.item
                found.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return found
