"""Runs whose stages mix corpora, and runs that go on from others: their identity, and what is held out."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mutune.compose import build, compose
from mutune.config import SweepConfig
from mutune.data.config import DataConfig, MixedData, TokenizerConfig
from mutune.errors import Refusal
from mutune.training.checkpoint import check_meta, newest, save
from mutune.training.config import RunSpec, StageConfig, first_steps
from mutune.training.preflight import check_corpora
from mutune.training.run import Run, _identity, corpora_of, run_to_end, window_loader
from mutune.training.schedule import ScheduleConfig, branch_schedule
from tests import doors
from tests.data.conftest import prose

CPU = torch.device("cpu")
SHORT, LONG = StageConfig(32, 4, 6), StageConfig(64, 2, 4)


@pytest.fixture(autouse=True)
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "main.txt").write_text(prose(200))
    (tmp_path / "other.txt").write_text(prose(400)[60_000:].replace("a", "o"))
    return tmp_path


def mixture(texts: Path, weight: float = 0.5) -> tuple[MixedData, ...]:
    main, other = str(texts / "main.txt"), str(texts / "other.txt")
    return MixedData("text", main, 1 - weight), MixedData("text", other, weight)


def spec(texts: Path, *stages: StageConfig, extends: Sequence[Sequence[StageConfig]] | None = None) -> RunSpec:
    proxy = compose("sweep", SweepConfig, ["+sweep=smoke", "loop.heldout_windows=4"]).spec()
    before = None if extends is None else tuple(map(tuple, extends))
    data, tokenizer = DataConfig("text", str(texts / "main.txt")), TokenizerConfig("bpe", 300)
    return replace(proxy, data=data, tokenizer=tokenizer, stages=stages, extends=before)


def test_a_mixture_trains_and_is_held_out_on_the_main_corpus(texts: Path) -> None:
    mixed, alone = (spec(texts, replace(SHORT, data=data)) for data in (mixture(texts), None))
    run, plain = Run(mixed, CPU), Run(alone, CPU)
    records = list(run.records())
    assert records[-1]["heldout_loss"] < records[0]["loss"]
    assert np.array_equal(run._heldout(32).windows, plain._heldout(32).windows)
    assert run.corpus.tokenizer.content_hash == plain.corpus.tokenizer.content_hash
    ours = {window.tobytes() for step in range(6) for window in run.loader.batch(step)}
    assert len(ours) == 24
    assert sum(window.tobytes() in ours for step in range(6) for window in plain.loader.batch(step)) < 24


def test_a_run_without_mixtures_has_the_identity_that_it_had(texts: Path) -> None:
    run = Run(spec(texts, SHORT), CPU)
    said = _identity(run)
    assert said["data_hash"] == run.corpus.content_hash
    assert said["run"]["stages"] == [
        {"context_length": 32, "batch_sequences": 4, "num_steps": 6, "end_ratio": None},
    ]
    assert set(said["run"]["schedule"]) == {"kind", "warmup_fraction", "warmup_steps", "end_ratio", "decay_fraction"}
    assert "extends" not in said["run"]


def test_a_checkpoint_is_refused_where_any_text_of_the_mixture_has_changed(texts: Path) -> None:
    mixed = spec(texts, replace(SHORT, data=mixture(texts)))
    run = Run(mixed, CPU)
    save(texts / "checkpoints", 0, run.model, run.optimizer, run.plan, _identity(run), keep=1)
    found = newest(texts / "checkpoints")
    assert found is not None
    check_meta(found, run.plan, _identity(Run(mixed, CPU)))
    (texts / "other.txt").write_text(prose(401)[60_000:])
    with pytest.raises(Refusal, match="was written by another run: data_hash is"):
        check_meta(found, run.plan, _identity(Run(mixed, CPU)))


def test_weights_are_part_of_what_a_run_is(texts: Path) -> None:
    one, other = (Run(spec(texts, replace(SHORT, data=mixture(texts, weight))), CPU) for weight in (0.5, 0.25))
    assert _identity(one)["data_hash"] == _identity(other)["data_hash"]
    assert _identity(one)["run"] != _identity(other)["run"]


def test_a_mixed_run_that_pauses_ends_as_one_that_does_not(texts: Path) -> None:
    mixed = spec(texts, replace(SHORT, data=mixture(texts)), LONG)
    whole = run_to_end(mixed, texts / "whole", "cpu", {})
    run_to_end(mixed, texts / "paused", "cpu", {}, until=3)
    paused = run_to_end(mixed, texts / "paused", "cpu", {})
    assert replace(paused, seconds=0.0) == replace(whole, seconds=0.0)
    stored = yaml.safe_load((texts / "paused" / "config.yaml").read_text())
    assert build(RunSpec, stored["run"]) == mixed
    assert stored["data_hash"] == corpora_of(mixed).content_hash


def test_a_text_too_short_for_its_stages_context_is_refused(texts: Path) -> None:
    (texts / "other.txt").write_text("a word\n\n" * 30)
    mixed = spec(texts, SHORT, replace(StageConfig(256, 1, 4), data=mixture(texts)))
    message = (
        r"target\.stages\[1\]\.context_length=256 does not fit into the .* training tokens of other\.txt, which is"
    )
    with pytest.raises(Refusal, match=message):
        check_corpora(mixed, corpora_of(mixed), "target.stages[{}]")


def test_a_run_that_goes_on_reads_what_it_read_and_then_what_is_new(texts: Path) -> None:
    before = spec(texts, SHORT)
    longer = spec(texts, SHORT, LONG, extends=[[SHORT]])
    corpora = corpora_of(longer)
    old, new = window_loader(before, corpora), window_loader(longer, corpora)
    assert all(np.array_equal(old.batch(step), new.batch(step)) for step in range(6))
    plain = window_loader(replace(longer, extends=None), corpora)
    assert not all(np.array_equal(plain.batch(step), new.batch(step)) for step in range(6))
    assert build(RunSpec, longer.as_dict()) == longer


@pytest.mark.parametrize(
    ("step", "more", "steps"), [(1, 0, [1]), (6, 0, [6]), (6, 5, [11]), (7, 3, [6, 4]), (10, 0, [6, 4])]
)
def test_a_branch_has_the_first_stages_of_its_trunk(step: int, more: int, steps: list[int]) -> None:
    branch = first_steps((SHORT, LONG), step, more)
    assert [stage.num_steps for stage in branch] == steps
    assert [stage.context_length for stage in branch] == [32, 64][: len(steps)]


def test_a_trunk_has_the_step_that_a_branch_leaves_it_at() -> None:
    for step in (0, 11):
        with pytest.raises(Refusal, match=f"step={step} must be a whole number at least 1 and at most 10"):
            first_steps((SHORT, LONG), step)


def test_a_decay_that_leaves_a_trunk_reads_and_rates_its_first_steps(texts: Path) -> None:
    trunk = replace(spec(texts, SHORT, LONG), schedule=ScheduleConfig("constant", 0.2))
    branch = replace(
        trunk,
        stages=first_steps(trunk.stages, 8, more=6),
        schedule=branch_schedule(trunk.schedule, trunk.num_steps, 8, 6),
        extends=(trunk.stages,),
    )
    old, new = Run(trunk, CPU), Run(branch, CPU)
    assert branch.num_steps == 14
    for ours, theirs in zip(islice(old.steps(), 8), islice(new.steps(), 8), strict=True):
        assert ours == theirs
    assert list(new.steps(8))[-1]["lr"] == pytest.approx(branch.hyperparameters.learning_rate / 6)


def test_the_command_trains_a_target_of_shares_and_mixtures(texts: Path) -> None:
    shape = [
        "target.model.width=16",
        "target.model.depth=1",
        "target.name=mixed",
        "target.loop.heldout_windows=2",
        "target.loop.divergence_factor=9",
    ]
    data = f"[{{source: text, path: {texts}/main.txt, weight: 3}}, {{source: text, path: {texts}/other.txt}}]"
    stages = (
        "target.stages=[{context_length: 16, batch_sequences: 4, share: 0.75}, "
        f"{{context_length: 64, batch_sequences: 1, share: 0.25, data: {data}}}]"
    )
    text = [
        f"++target.data={{source: text, path: {texts}/main.txt}}",
        "++target.tokenizer={kind: bpe, vocab_size: 300}",
        "++target.schedule={kind: linear, warmup_steps: 2}",
    ]
    words = ["study=published", "target=small", *shape, stages, "target.tokens=1280", *text, f"out={texts}/runs"]
    doors.run("transfer", *words)
    file = texts / "runs/transfer/published--mixed/transfer.yaml"
    stored = yaml.safe_load(file.read_text())["target"]
    assert [stage["num_steps"] for stage in stored["stages"]] == [15, 5]
    assert "tokens" not in stored
    priced = doors.run("train", f"transfer={file}", f"out={texts}/runs", "dry_run=true").stdout
    assert f"0.25 of all tokens; of {texts}/main.txt 0.75, {texts}/other.txt 0.25" in priced
    doors.run("train", f"transfer={file}", f"out={texts}/runs")
    assert len((texts / "runs/train/mixed/metrics.jsonl").read_text().splitlines()) == 20
    (texts / "other.txt").write_text(prose(402)[60_000:])
    refused = doors.run("train", f"transfer={file}", f"out={texts}/runs", expect=2).stderr
    assert "holds results of other inputs (data_hash:" in refused
