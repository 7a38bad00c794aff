"""A target that continues: its records must reach its checkpoint, without a gap."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mutune.data import Stage, WindowLoader
from mutune.errors import Refusal
from mutune.training.loop import Record
from mutune.training.resume import _records_until
from mutune.training.sentences import diverged, read_again, stopped
from mutune.training.target import Target
from tests import doors
from tests.test_train_processes import TARGET


def write(path: Path, steps: int) -> list[str]:
    lines = [json.dumps({"step": step, "loss": 5.0}) + "\n" for step in range(1, steps)]
    lines.append(json.dumps({"step": steps, "heldout_loss": 4.0}) + "\n")
    path.write_text("".join(lines))
    return lines


def test_records_after_the_checkpoint_are_dropped_and_a_torn_line_there_is_no_concern(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 8)
    path.write_text("".join(lines[:6]) + '{"ste')
    assert _records_until(path, 5, finished=False) == lines[:5]
    assert _records_until(path, 0, finished=False) == []
    assert _records_until(tmp_path / "none", 0, finished=False) == []


@pytest.mark.parametrize("line", ['{"ste', "[]\n", "null\n", "\n", '{"step": 9}\n', "{}\n"])
@pytest.mark.parametrize("index", [0, 3, 7])
def test_a_record_that_is_damaged_before_the_checkpoint_is_refused_by_its_step(
    index: int, line: str, tmp_path: Path
) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write(path, 8)
    lines[index] = line
    path.write_text("".join(lines))
    with pytest.raises(Refusal, match=rf"lacks the whole record of step {index + 1}, though .* step 8; restore"):
        _records_until(path, 8, finished=True)


@pytest.mark.parametrize("kept", [0, 4, 7])
def test_records_that_end_before_the_checkpoint_are_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(write(path, 8)[:kept]))
    with pytest.raises(Refusal, match=rf"lacks the whole record of step {kept + 1}"):
        _records_until(path, 8, finished=True)
    path.unlink()
    with pytest.raises(Refusal, match="lacks the whole record of step 1,"):
        _records_until(path, 8, finished=True)


def test_a_finished_run_must_have_been_measured(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 8)
    with pytest.raises(Refusal, match="step 7"):
        _records_until(path, 7, finished=True)
    assert len(_records_until(path, 7, finished=False)) == 7


def test_a_diverged_run_names_no_checkpoint_of_the_weights_thatdiverged(tmp_path: Path) -> None:
    record = {"step": 10, "loss": 99.0, "grad_norm": 1.0}
    assert "no checkpoint is before it" in diverged(record, tmp_path / "none")
    (tmp_path / "9").mkdir()  # nine updates made the loss of record 10
    assert "no checkpoint is before it" in diverged(record, tmp_path)
    (tmp_path / "8").mkdir()
    assert f"the newest checkpoint before it is {tmp_path}/8. " in diverged(record, tmp_path)


def test_a_run_that_is_stopped_names_the_checkpoint_that_it_goes_on_from(tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    begun = "stopped    after step 1,013 of 2,000: Ctrl-C; "
    assert (
        stopped(run, 1013, 2000, "Ctrl-C")
        == f"{begun}no checkpoint was saved yet, so that the same command begins anew"
    )
    for step in (900, 1000):
        (run / f"checkpoints/{step}").mkdir(parents=True)
    (run / "checkpoints/1100.aside").mkdir()
    said = f"{begun}the newest checkpoint is {run}/checkpoints/1000, from which the same command goes on"
    assert stopped(run, 1013, 2000, "Ctrl-C") == said


def test_a_second_ctrl_c_does_not_wait_and_says_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(self: Target, start: int, stop: Callable[[], bool]) -> Iterator[Record]:
        for record in real(self, start, stop):
            if record["step"] == 7:
                os.kill(os.getpid(), signal.SIGINT)
                assert stop()
                os.kill(os.getpid(), signal.SIGINT)
            yield record

    real = Target.records
    doors.run("transfer", *TARGET, f"out={tmp_path}")
    words = [f"transfer={tmp_path}/transfer/published--tiny/transfer.yaml", f"out={tmp_path}", "checkpoint_every=5"]
    monkeypatch.setattr(Target, "records", twice)
    said = doors.run("train", *words, "threads=1", expect=130).stderr
    kept = f"the newest checkpoint is {tmp_path}/train/tiny/checkpoints/5, from which the same command goes on"
    assert f"stopped    after step 6 of 60: at once; {kept}\n" in said


def test_a_stage_that_finds_too_little_unread_text_says_that_it_reads_all_of_it_again() -> None:
    whole, added = Stage(100, 50, 2), Stage(50, 100, 2)
    for stage, expected in (
        (added, "stage 2 reads text afresh: of what no step before it has read, there are fewer whole windows of 50 "),
        (None, ""),
    ):
        stages = [whole, stage] if stage else [whole]
        loader = WindowLoader(np.arange(10_000, dtype=np.uint16), stages, 0, extends=[[whole]] if stage else [])
        run: Any = SimpleNamespace(loader=loader, corpus=SimpleNamespace(name="text"))
        assert "".join(read_again(run)).startswith(f"note       {expected}" if expected else "")
        assert bool(read_again(run)) is bool(expected)
