"""A run that meets damaged text goes back, reads on behind it, and ends as if it had not been there."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from mutune.config import SweepConfig
from mutune.data.segments import MAIN
from mutune.data.windows import Skip, WindowLoader
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.training import checkpoint
from mutune.training.alarms import GuardConfig
from mutune.training.config import LoopConfig, StageConfig
from mutune.training.guard import Action
from mutune.training.run import Run
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
    """What a run under a guard left: the loss of each step, the last time it was made, and the guard's actions."""

    losses: dict[int, float] = field(default_factory=dict)
    actions: list[Action] = field(default_factory=list)
    skips: tuple[Skip, ...] = ()


def trained(folder: Path, policy: str, damage: bool) -> Told:
    """Train to the end, going back as the guard says, with a checkpoint every `EVERY` steps."""
    told, start = Told(), 0
    remembered: dict[int, dict[str, Any]] = {}
    while True:
        run, guard = Run(SPEC, CPU), guard_of(SPEC, GuardConfig(policy=policy))
        tokens = damaged(run.loader) if damage else run.loader.corpora[MAIN]
        run.loader = WindowLoader(tokens, run.loader.stages, SPEC.seed, skips=told.skips)
        if start:
            saved = checkpoint.Checkpoint(folder / str(start), start, {})
            checkpoint.restore(saved, run.model, run.optimizer)
            guard.load_state_dict(remembered[start])
        guard.skips, watch = told.skips, run.watch(guard)
        for record in run.records(start):
            action = guard.decide(watch.observe(record))
            step = record["step"]
            told.losses[step] = record["loss"]
            told.actions += [action] if action.sentence else []
            if action.do != "warn":
                break
            if step % EVERY == 0:
                checkpoint.save(folder, step, run.model, run.optimizer, run.plan, {}, keep=99)
                remembered[step] = guard.state_dict()
        if action.do != "rollback":
            return told
        assert action.before is not None
        assert action.skip is not None
        start, told.skips = max(step for step in remembered if step <= action.before), (*told.skips, action.skip)


def test_damaged_batches_are_skipped_and_the_run_ends_like_one_that_never_met_them(tmp_path: Path) -> None:
    told, clean = trained(tmp_path / "a", "rollback", damage=True), trained(tmp_path / "b", "rollback", damage=False)
    assert clean.actions == []
    assert [action.do for action in told.actions if action.do != "warn"] == ["rollback"] * len(told.skips)
    assert 1 <= len(told.skips) <= 2
    assert len(told.losses) == 120
    behind = range(90, 121)
    assert fmean(told.losses[s] for s in behind) == pytest.approx(fmean(clean.losses[s] for s in behind), abs=0.1)
    assert max(told.losses[step] for step in range(60, 121)) < 1.2 * clean.losses[60]


def test_a_paused_run_ends_where_the_damage_is_and_says_from_where_it_is_good(tmp_path: Path) -> None:
    told = trained(tmp_path, "pause", damage=True)
    assert told.actions[-1].do == "pause"
    assert BAD[0] < max(told.losses) <= BAD[-1] + 1
    assert told.actions[-1].before is not None
    assert told.actions[-1].before <= BAD[0]
    assert "The run is paused" in told.actions[-1].sentence
