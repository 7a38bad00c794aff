"""A run that meets damaged text goes back, reads on behind it, and ends as if it had not been there."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from mutune.compose import build
from mutune.config import SweepConfig
from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.segments import MAIN, Stage, steps_skipped
from mutune.data.windows import Skip, WindowLoader
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.training import checkpoint, loop
from mutune.training import target as target_module
from mutune.training.alarms import GuardConfig
from mutune.training.branch import branch
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.guard import Guard
from mutune.training.loop import Loss, Record
from mutune.training.resume import _records_until, restore
from mutune.training.run import Run
from mutune.training.target import Paused, Target
from mutune.training.throughput import Rates, Throughput
from mutune.training.world import World
from tests.data.conftest import prose
from tests.training.guarded import CPU, guard_of

BAD = range(80, 84)  # batches whose text is random tokens
EVERY = 20
SPEC = replace(
    SweepConfig().spec(),
    model=ModelConfig(width=32, depth=2, head_size=16),
    base=BaseConfig(width=32, depth=2),
    hyperparameters=replace(SweepConfig().hyperparameters, learning_rate=2**-7),
    stages=(StageConfig(context_length=32, batch_sequences=8, num_steps=120),),
    loop=LoopConfig(heldout_windows=4, audit_every=0),
)


def measured(step: int, cost: float) -> Throughput:
    return Throughput(SPEC, "cpu", Rates(), start_step=step, cost=cost)


def target_of(
    run: Run,
    folder: Path,
    guard: Guard,
    kept: Callable[[list[int]], list[int]] = lambda s: s,
    meta: dict[str, Any] | None = None,
) -> Target:
    return Target(
        run,
        folder,
        guard,
        meta=meta or {},
        every=[EVERY],
        kept=kept,
        background=False,
        say=lambda text: None,
        measure=measured,
    )


def damaged(loader: WindowLoader) -> np.ndarray:
    """The loader's tokens with the windows of the bad batches overwritten."""
    tokens, (segment,) = loader.corpora[MAIN].copy(), loader.segments
    for step in BAD:
        reading, positions = segment.readings[MAIN], np.arange(8 * step, 8 * (step + 1))
        for start in reading.starts(positions, 32, segment.keys(SPEC.seed, MAIN)):
            places = reading.indices(np.array([start]), 33)
            tokens[places] = np.random.default_rng(start).integers(1024, size=33)
    return tokens


@dataclass
class Told:
    """What a run under a guard left: its records, its alarms, and how it ended."""

    folder: Path
    skips: tuple[Skip, ...]
    paused: str = ""
    said: list[str] = field(default_factory=list)

    def losses(self) -> dict[int, float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return {record["step"]: record["loss"] for record in map(json.loads, lines)}

    def actions(self) -> list[str]:
        path = self.folder / "alarms.jsonl"
        return [json.loads(line)["action"] for line in path.read_text().splitlines()] if path.exists() else []


def trained(folder: Path, policy: str, damage: bool, world: World | None = None) -> Told:
    """Train to the end, or until paused, with a checkpoint every `EVERY` steps; so does each of a `world`."""
    folder.mkdir(exist_ok=True)
    run, guard = Run(SPEC, CPU, world), guard_of(SPEC, GuardConfig(policy=policy))
    if damage:
        run.loader.corpora[MAIN] = damaged(run.loader)
    target, said = target_of(run, folder, guard), list[str]()
    target.say = said.append
    try:
        for _ in target.records(0, lambda: False):
            pass
    except Paused as paused:
        return Told(folder, guard.skips, str(paused), said)
    return Told(folder, guard.skips, said=said)


def test_damaged_batches_are_skipped_and_the_run_ends_like_one_that_never_met_them(tmp_path: Path) -> None:
    told, clean = trained(tmp_path / "a", "rollback", damage=True), trained(tmp_path / "b", "rollback", damage=False)
    assert clean.actions() == []
    assert [action for action in told.actions() if action != "warn"] == ["rollback"] * len(told.skips)
    assert 1 <= len(told.skips) <= 2
    ours, theirs = told.losses(), clean.losses()
    assert list(ours) == list(range(1, 121))
    assert fmean(ours[step] for step in range(90, 121)) == pytest.approx(
        fmean(theirs[step] for step in range(90, 121)), abs=0.1
    )
    assert max(ours[step] for step in range(60, 121)) < 1.2 * theirs[60]
    assert {step: ours[step] for step in range(1, 61)} == {step: theirs[step] for step in range(1, 61)}
    assert any(f"{told.folder}/checkpoints/<step>.aside, " in line for line in told.said)
    aside = [json.loads(line) for line in (told.folder / "rolled_back.jsonl").read_text().splitlines()]
    assert max(record["loss"] for record in aside) > 1.2 * theirs[60]  # what was left out can still be looked at


def test_a_run_that_was_rolled_back_and_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", "rollback", damage=True)
    folder = tmp_path / "whole/checkpoints"
    found = checkpoint.read(folder / "100")
    run, guard = Run(SPEC, CPU), guard_of(SPEC, GuardConfig(policy="rollback"))
    run.loader.corpora[MAIN] = damaged(run.loader)
    checkpoint.restore(found, run.model, run.optimizer)
    guard.load_state_dict(found.meta["guard"])
    (tmp_path / "rest").mkdir()
    rest = target_of(run, tmp_path / "rest", guard)
    assert [record["loss"] for record in rest.records(100, lambda: False)] == list(whole.losses().values())[100:]


def test_a_paused_run_is_saved_where_the_damage_is_and_says_from_where_it_is_good(tmp_path: Path) -> None:
    told = trained(tmp_path, "pause", damage=True)
    last = max(told.losses())
    assert told.actions()[-1] == "pause"
    assert BAD[0] < last <= BAD[-1] + 1
    assert last in checkpoint.list_steps(tmp_path / "checkpoints")
    assert "The run is paused" in told.paused
    assert "\nresume=60 goes on from the newest before it; the same command goes on from" in told.paused


# -------------------------------------------------------------------------------------------- a batch that is no number
def broken(run: Run, patch: pytest.MonkeyPatch, *bad: int, loss: float = float("nan")) -> None:
    """Make the loss of the batches that lie at these places of the text something else, whichever step reads them."""
    places = {step: run.loader.batch(step).tobytes() for step in bad}
    backward = loop._backward

    def spoiled(model: nn.Module, function: Loss, ids_BT: torch.Tensor, micro_sequences: int) -> float:
        value = backward(model, function, ids_BT, micro_sequences)
        return loss if ids_BT.numpy().tobytes() in places.values() else value

    patch.setattr(loop, "_backward", spoiled)


TWO = replace(
    SPEC,
    stages=(
        StageConfig(context_length=32, batch_sequences=4, num_steps=40),
        StageConfig(context_length=64, batch_sequences=2, num_steps=20),
    ),
)


def under_guard(folder: Path, spec: RunSpec, patch: pytest.MonkeyPatch, *bad: int, **more: Any) -> Target:
    folder.mkdir(exist_ok=True)
    run, guard = Run(spec, CPU), guard_of(spec, GuardConfig(policy=more.pop("policy", "rollback")))
    broken(run, patch, *bad, **{key: more.pop(key) for key in ("loss",) if key in more})
    return target_of(run, folder, guard, **more)


def steps_of(records: Iterator[Record]) -> list[int]:
    return [record["step"] for record in records]


def test_a_bad_batch_at_the_start_of_a_stage_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = under_guard(tmp_path, TWO, monkeypatch, 40)
    assert steps_of(target.records(0, lambda: False))[-1] == 60
    assert [skip.from_step for skip in target.guard.skips] == [38, 40]  # each stage by itself


def test_a_bad_batch_before_any_checkpoint_begins_the_run_anew_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = under_guard(tmp_path, TWO, monkeypatch, 7)
    assert steps_of(target.records(0, lambda: False)) == [*range(1, 8), *range(1, 61)]
    assert sorted(checkpoint.list_steps(tmp_path / "checkpoints")) == [20, 40, 60]


def test_a_run_whose_older_checkpoints_are_gone_pauses_rather_than_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = under_guard(tmp_path, TWO, monkeypatch, 21, kept=lambda steps: steps[-1:])
    with pytest.raises(
        Paused, match="or before is left; the same command goes on from step 20, the newest that is saved"
    ):
        steps_of(target.records(0, lambda: False))
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [20]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) >= 20


def test_a_loss_beyond_the_bound_is_left_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = under_guard(tmp_path, TWO, monkeypatch, 30, loss=99.0)
    assert steps_of(target.records(0, lambda: False))[-1] == 60
    assert json.loads((tmp_path / "alarms.jsonl").read_text().splitlines()[-1])["action"] == "rollback"


@pytest.mark.parametrize("dying", ["_move_records", "write_text"])
def test_a_kill_in_the_middle_of_going_back_leaves_a_run_that_goes_on(
    dying: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*given: Any) -> None:
        raise KeyboardInterrupt

    target = under_guard(tmp_path, TWO, monkeypatch, 30)
    with monkeypatch.context() as kill:
        kill.setattr(target_module, dying, die)
        with pytest.raises(KeyboardInterrupt):
            steps_of(target.records(0, lambda: False))
    assert max(checkpoint.list_steps(tmp_path / "checkpoints")) == 20
    assert len(_records_until(tmp_path / "metrics.jsonl", 20, finished=False)) == 20
    (tmp_path / "metrics.jsonl").write_text("".join(_records_until(tmp_path / "metrics.jsonl", 20, finished=False)))
    found = checkpoint.read(tmp_path / "checkpoints/20")
    checkpoint.restore(found, target.run.model, target.run.optimizer)
    target.guard.load_state_dict(found.meta["guard"])
    again = target_of(target.run, tmp_path, target.guard)
    assert steps_of(again.records(20, lambda: False))[-1] == 60
    told = (tmp_path / "alarms.jsonl").read_text().splitlines()
    assert len(told) == len(set(told)) >= 1  # of steps that were made again
    left_out = [json.loads(line)["step"] for line in (tmp_path / "rolled_back.jsonl").read_text().splitlines()]
    assert len(left_out) == len(set(left_out)) >= 1


def test_a_pause_drops_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(steps: list[int]) -> list[int]:
        return steps[-1:]

    damaged_run = Run(SPEC, CPU)
    damaged_run.loader.corpora[MAIN] = damaged(damaged_run.loader)
    target = target_of(damaged_run, tmp_path, guard_of(SPEC, GuardConfig(policy="pause")), kept)
    with pytest.raises(Paused):
        steps_of(target.records(0, lambda: False))
    assert len(checkpoint.list_steps(tmp_path / "checkpoints")) == 2


def test_a_line_that_a_kill_cut_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rolled_back.jsonl", "alarms.jsonl"):
        (tmp_path / name).write_text('{"step": 5, "tok')
    target = under_guard(tmp_path, TWO, monkeypatch, 30)
    assert steps_of(target.records(0, lambda: False))[-1] == 60
    for name in ("rolled_back.jsonl", "alarms.jsonl"):
        cut, *whole = (tmp_path / name).read_text().splitlines()
        assert cut == '{"step": 5, "tok'
        assert all(json.loads(line)["step"] for line in whole)
        assert whole


# ------------------------------------------------------------------------------------------------- and is then extended
def windows(loader: WindowLoader, steps: range) -> list[int]:
    """Where in the text the inputs of these steps lie, one by one."""
    (begun,), places = {loader.stage_start(step) for step in steps}, list[int]()
    (segment,) = (s for s, first in zip(loader.segments, loader._first_steps, strict=False) if first == begun)
    stage = segment.stage
    for step in steps:
        read = step - begun + steps_skipped(loader.skips, begun, step + 1)
        positions = np.arange(read * stage.batch_sequences, (read + 1) * stage.batch_sequences)
        starts = segment.readings[MAIN].starts(positions, stage.context_length, segment.keys(loader.seed, MAIN))
        places += (starts[:, None] + np.arange(stage.context_length)).ravel().tolist()
    return places


def test_what_extends_a_run_that_was_rolled_back_reads_neither_what_it_read_nor_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text has 134 batches, of which the run reads 120 and leaves out 6; the branch reads the 8 that remain."""
    monkeypatch.setenv("MUTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prose.txt").write_text(prose(400))
    data, tokenizer = DataConfig("text", str(tmp_path / "prose.txt")), TokenizerConfig("bpe", 1024)
    spec = replace(SPEC, data=data, tokenizer=tokenizer)
    run, guard = Run(spec, CPU), guard_of(spec, GuardConfig(policy="rollback"))
    text = run.loader.corpora[MAIN] = damaged(run.loader)
    told = {"run": spec.as_dict(), "data_hash": run.corpora.content_hash}
    (tmp_path / "trunk").mkdir()
    trunk = target_of(run, tmp_path / "trunk", guard, meta=told)
    assert steps_of(trunk.records(0, lambda: False))[-1] == 120
    assert guard.skips == (Skip(78, 6),)

    stages = (*spec.stages, StageConfig(context_length=32, batch_sequences=4, num_steps=16))
    path, own = tmp_path / "trunk/checkpoints/120", tmp_path / "branch"
    leaving = branch(path, replace(spec, stages=stages), own / "checkpoints")
    assert build(RunSpec, leaving.spec.as_dict()) == leaving.spec
    longer, guard = Run(leaving.spec, CPU), guard_of(leaving.spec, GuardConfig(policy="rollback"))
    longer.loader.corpora[MAIN] = text
    meta = {"run": leaving.spec.as_dict(), "data_hash": longer.corpora.content_hash, "branch": leaving.identity}
    own.mkdir()
    assert restore(own, 120, longer, meta, leaving, guard) == []
    target = target_of(longer, own, guard, meta=meta)
    records = list(target.records(120, lambda: False))
    assert records[-1]["step"] == 136
    assert max(record["loss"] for record in records) < 1.2 * records[0]["loss"]

    read, added = windows(longer.loader, range(120)), windows(longer.loader, range(120, 136))
    left_out = windows(WindowLoader(text, [Stage(32, 134, 8)], SPEC.seed), range(78, 84))
    assert len({*read, *left_out, *added}) == len(read) + len(left_out) + len(added) == 134 * 8 * 32
    again = branch(path, replace(spec, stages=stages), own / "checkpoints")
    assert again.spec == leaving.spec
    path.parent.rename(tmp_path / "gone")
    assert branch(path, replace(spec, stages=stages), own / "checkpoints").spec == leaving.spec


def test_a_skip_that_the_trunk_had_not_come_to_is_none_of_another_stage(tmp_path: Path) -> None:
    """A checkpoint of step 44 of a run that went back to 40, and was to leave out batches from 45 on."""
    run, guard = Run(SPEC, CPU), guard_of(SPEC)
    guard.skips = Skip(30, 2), Skip(45, 3)
    meta = {"run": SPEC.as_dict(), "guard": guard.state_dict()}
    checkpoint.save(tmp_path / "checkpoints", 44, run.model, run.optimizer, run.plan, meta, keep=1)
    for stages, kept in (
        ([replace(SPEC.stages[0], num_steps=44), StageConfig(64, 4, 20)], [30]),
        ([replace(SPEC.stages[0], num_steps=50), StageConfig(64, 4, 20)], [30, 45]),
    ):
        leaving = branch(tmp_path / "checkpoints/44", replace(SPEC, stages=tuple(stages)), tmp_path / "own")
        longer, guard = Run(leaving.spec, CPU), guard_of(SPEC)
        restore(tmp_path / "own", 44, longer, {}, leaving, guard)
        assert [skip.from_step for skip in guard.skips] == kept
