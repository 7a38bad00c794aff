"""A whole run: what it leaves, and when it counts as diverged."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.data import DataConfig, TokenizerConfig, prepare
from mutune.errors import Refusal
from mutune.training.config import RunSpec
from mutune.training.run import METRICS, check_data, run_to_end

SMOKE = ["+sweep=smoke", "loop.heldout_windows=4", "schedule=constant", "schedule.warmup_fraction=0"]


def spec(num_steps: int, rate: float) -> RunSpec:
    arguments = [f"run.num_steps={num_steps}", f"hyperparameters.learning_rate={rate}"]
    return compose("sweep", SweepConfig, [*SMOKE, *arguments]).spec()


def records(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line, parse_constant=pytest.fail) for line in (directory / METRICS).read_text().splitlines()]


def test_a_run_whose_last_update_breaks_the_weights_has_diverged(tmp_path: Path) -> None:
    result = run_to_end(spec(1, 1e29), tmp_path, "cpu", {})
    assert result.diverged
    assert math.isfinite(result.value)
    assert result.bits_per_byte is None
    (record,) = records(tmp_path)  # which is JSON that any reader accepts
    assert record["diverged"]
    assert "heldout_loss" not in record


def test_such_a_run_ends_where_it_was_measured(tmp_path: Path) -> None:
    broken = replace(spec(5, 1e29), loop=replace(spec(5, 1.0).loop, eval_every=1))
    assert run_to_end(broken, tmp_path, "cpu", {}).diverged
    assert len(records(tmp_path)) == 1


def test_a_context_must_fit_into_the_shorter_split_which_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.txt").write_text("a few words in a line\n\n" * 20)
    corpus = prepare(DataConfig("text", str(tmp_path / "tiny.txt")), TokenizerConfig("bytes"))
    (stage,) = spec(5, 0.01).stages
    wide = replace(spec(5, 0.01), stages=tuple(replace(stage, context_length=c) for c in (8, 99)))
    with pytest.raises(Refusal) as refusal:
        check_data(wide, corpus, "target.stages[{}]")
    sentence = str(refusal.value)
    assert "target.stages[1].context_length=99 does not fit into the 24 held-out tokens of tiny.txt" in sentence
    works = int(sentence.rpartition("=")[2].rstrip("."))
    check_data(replace(wide, stages=(replace(wide.stages[0], context_length=works),)), corpus, "run")
