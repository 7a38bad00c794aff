"""A whole run: what it leaves, and when it counts as diverged."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.data import DataConfig, TokenizerConfig, prepare
from mutune.errors import Refusal
from mutune.parametrization.finding import Finding
from mutune.parametrization.plan import Plan
from mutune.training import loop, run
from mutune.training.config import LoopConfig, ParallelConfig, RunSpec, StageConfig
from mutune.training.preflight import check_data
from mutune.training.result import CHECKPOINTS, METRICS, RunResult, discard
from mutune.training.run import Run, Stopped, run_to_end

CPU = torch.device("cpu")
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


def tail(directory: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(directory)]


def test_what_a_continued_run_is_was_written_and_judged_at_its_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opinions: list[str] = []

    def opinion(spec: RunSpec, plan: Plan) -> list[Finding]:
        opinions.append("asked")
        return []

    monkeypatch.setattr(run, "second_opinion_of", opinion)
    run_to_end(spec(6, 0.02), tmp_path, "cpu", {}, until=2)
    before = (tmp_path / "config.yaml").stat().st_mtime_ns
    run_to_end(spec(6, 0.02), tmp_path, "cpu", {}, until=4)
    assert (opinions, (tmp_path / "config.yaml").stat().st_mtime_ns) == (["asked"], before)
    (tmp_path / "config.yaml").unlink()
    run_to_end(spec(6, 0.02), tmp_path, "cpu", {})
    assert (tmp_path / "config.yaml").is_file()


def test_a_run_that_pauses_ends_as_one_that_does_not(tmp_path: Path) -> None:
    whole, paused, spec_ = tmp_path / "whole", tmp_path / "paused", spec(40, 0.02)
    expected = run_to_end(spec_, whole, "cpu", {})
    for step in (4, 4, 20):  # the second time it is there already
        result = run_to_end(spec_, paused, "cpu", {}, until=step)
        assert (result.finished, result.num_steps, result.bits_per_byte) == (False, step, None)
        losses = [record["loss"] for record in records(whole)[:step]]
        assert result.value == pytest.approx(sum(losses[-2:]) / 2)  # a twentieth of 40 steps
        assert [path.name for path in (paused / CHECKPOINTS).iterdir()] == [str(step)]
    result = run_to_end(spec_, paused, "cpu", {})
    assert same(result, expected)
    assert tail(paused) == tail(whole)
    seconds = [record["seconds"] for record in records(paused)]
    assert seconds == sorted(seconds)
    assert (paused / CHECKPOINTS / "20").is_dir()  # until the result is kept
    discard(paused)
    assert not (paused / CHECKPOINTS).exists()


def test_a_run_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    spec_ = spec(10, 0.02)
    with pytest.raises(Stopped, match="after step 1"):
        run_to_end(spec_, tmp_path, "cpu", {}, stop=lambda: True)
    assert (tmp_path / CHECKPOINTS / "1").is_dir()
    run_to_end(spec_, tmp_path, "cpu", {})
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 11))


@pytest.mark.parametrize("damage", ["checkpoint", "records", "another run"])
def test_a_checkpoint_that_is_no_use_costs_time_and_nothing_else(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken, spec_ = tmp_path / "whole", tmp_path / "broken", spec(12, 0.02)
    expected = run_to_end(spec_, whole, "cpu", {})
    monkeypatch.setattr(run, "SAVE_SECONDS", 0.0)
    run_to_end(spec(12, 0.03) if damage == "another run" else spec_, broken, "cpu", {}, until=6)
    if damage == "checkpoint":
        state = broken / CHECKPOINTS / "6" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:1000])
    elif damage == "records":
        (broken / METRICS).write_text("".join((broken / METRICS).read_text().splitlines(keepends=True)[:5]))
    capsys.readouterr()
    assert same(run_to_end(spec_, broken, "cpu", {}), expected)
    assert f"begun anew {broken}, whose checkpoint is no use (" in capsys.readouterr().err
    assert tail(broken) == tail(whole)


def same(one: RunResult, other: RunResult) -> bool:
    return replace(one, seconds=0.0) == replace(other, seconds=0.0)


# ------------------------------------------------------------------------------------------------- sequences at a time
def two_stages(rate: float = 0.01, of_all: int | None = None) -> RunSpec:
    stages = StageConfig(context_length=16, batch_sequences=6, num_steps=3), StageConfig(32, 4, 2)
    settings = LoopConfig(heldout_windows=2, micro_sequences=of_all)
    return replace(spec(5, rate), stages=stages, loop=settings)


def passes(patch: pytest.MonkeyPatch, made: Run, start: int = 0) -> tuple[list[int], list[float]]:
    """The sequences per forward pass that each step was made with, and its loss."""
    backward, asked = loop._backward, list[int]()

    def spied(*given: Any) -> float:
        asked.append(given[-1])
        return backward(*given)

    with patch.context() as spy:
        spy.setattr(loop, "_backward", spied)
        return asked, [record["loss"] for record in made.records(start)]


@pytest.mark.parametrize(
    ("own", "of_all", "expected"),
    [
        ((3, 1), None, [3, 3, 3, 1, 1]),
        ((3, 1), 2, [3, 3, 3, 1, 1]),
        (2, 1, [2] * 5),
        (None, 1, [1] * 5),
        (None, None, [6, 6, 6, 4, 4]),
    ],
)
def test_each_stage_has_its_sequences_at_a_time_and_the_losses_are_the_same(
    own: int | tuple[int, ...] | None, of_all: int | None, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = two_stages(of_all=of_all)
    asked, losses = passes(monkeypatch, Run(given, CPU, parallel=ParallelConfig(micro_sequences=own)))
    assert asked == expected
    assert losses == pytest.approx(passes(monkeypatch, Run(two_stages(), CPU))[1], abs=1e-5)


def test_a_run_goes_on_with_the_sequences_of_the_stage_it_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    own = ParallelConfig(micro_sequences=(3, 1))
    assert passes(monkeypatch, Run(two_stages(), CPU, parallel=own), 2)[0] == [3, 1, 1]
    assert passes(monkeypatch, Run(two_stages(), CPU, parallel=own), 3)[0] == [1, 1]


def test_a_run_that_diverges_in_its_first_stage_has_no_second() -> None:
    steps = [record["step"] for record in Run(two_stages(1e29), CPU).steps()]
    assert steps[-1] < 3


def test_held_out_windows_are_read_as_many_at_a_time_as_their_stage_allows() -> None:
    made = Run(two_stages(), CPU, parallel=ParallelConfig(micro_sequences=(3, 1)))
    assert [made._heldout(context).chunk for context in (16, 32)] == [3, 1]


def test_sequences_that_are_not_one_for_each_stage_are_refused() -> None:
    with pytest.raises(Refusal, match=r"^parallel\.micro_sequences=\[3,2,1\] has 3 for a run's 2 stages; for example"):
        Run(two_stages(), CPU, parallel=ParallelConfig(micro_sequences=(3, 2, 1)))
