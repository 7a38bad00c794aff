"""A run that meets damaged text goes back, reads on behind it, and ends as if it had not been there."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from mutune.config import SweepConfig
from mutune.data.segments import MAIN
from mutune.data.windows import Skip, WindowLoader
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.training import checkpoint
from mutune.training.alarms import GuardConfig
from mutune.training.config import LoopConfig, StageConfig
from mutune.training.run import Run
from mutune.training.target import Paused, Target
from mutune.training.throughput import Rates, Throughput
from mutune.training.world import World
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
    target = Target(
        run, folder, guard, {}, EVERY, lambda steps: steps, background=False, say=lambda text: None, measure=measured
    )
    try:
        for _ in target.records(0, lambda: False):
            pass
    except Paused as paused:
        return Told(folder, guard.skips, str(paused))
    return Told(folder, guard.skips)


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
    rest = Target(
        run,
        tmp_path / "rest",
        guard,
        {},
        EVERY,
        lambda steps: steps,
        background=False,
        say=lambda text: None,
        measure=measured,
    )
    assert [record["loss"] for record in rest.records(100, lambda: False)] == list(whole.losses().values())[100:]


def test_a_paused_run_is_saved_where_the_damage_is_and_says_from_where_it_is_good(tmp_path: Path) -> None:
    told = trained(tmp_path, "pause", damage=True)
    last = max(told.losses())
    assert told.actions()[-1] == "pause"
    assert BAD[0] < last <= BAD[-1] + 1
    assert last in checkpoint.list_steps(tmp_path / "checkpoints")
    assert "The run is paused" in told.paused
    assert "\nresume=60 goes on from the newest checkpoint before it; the same command goes on from" in told.paused
