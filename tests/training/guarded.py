"""Small real runs under the guard: clean ones of many shapes, and the harness that injects faults into one."""

import random
from dataclasses import replace
from typing import Any

import torch

from mutune.config import SweepConfig
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.training.alarms import GuardConfig
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.guard import Guard
from mutune.training.loop import Record
from mutune.training.run import Run
from mutune.training.schedule import ScheduleConfig
from mutune.training.watch import Watch

CPU = torch.device("cpu")


def watch_of(run: Run, guard: Guard, audited: bool = True) -> Watch:
    """A run's watch, with the auditor or without."""
    watch = run.watch(guard)
    if not audited:
        watch._audit = lambda step: None
    return watch


def guard_of(spec: RunSpec, config: GuardConfig | None = None, **keywords: Any) -> Guard:
    return Guard(config or GuardConfig(), clip_norm=spec.loop.clip_norm, beta2=spec.hyperparameters.beta2, **keywords)


def clean_spec(seed: int, num_steps: int = 500) -> RunSpec:
    """A run of a random shape, rate, batch and schedule; every third has a second stage at four times the context."""
    draw = random.Random(f"guard {seed}")
    width, depth = draw.choice([32, 48, 64, 96]), draw.choice([2, 3])
    context = draw.choice([16, 32, 64])
    batch = draw.choice([size for size in (1, 2, 4, 8) if size * context <= 256])
    stage = StageConfig(context_length=context, batch_sequences=batch, num_steps=num_steps)
    stages: tuple[StageConfig, ...] = (stage,)
    if seed % 3 == 0:
        first = num_steps * 3 // 5
        longer = StageConfig(4 * context, max(1, batch // 4), num_steps - first)
        stages = (replace(stage, num_steps=first), longer)
    base = SweepConfig().spec()
    return replace(
        base,
        model=ModelConfig(width=width, depth=depth, head_size=16),
        base=BaseConfig(width=32, depth=depth),
        hyperparameters=replace(base.hyperparameters, learning_rate=2 ** draw.uniform(-9.0, -5.5)),
        schedule=ScheduleConfig(
            kind=draw.choice(["linear", "cosine", "wsd", "constant"]), warmup_fraction=draw.choice([0.02, 0.05, 0.1])
        ),
        stages=stages,
        loop=LoopConfig(heldout_windows=4, audit_every=0, clip_norm=draw.choice([0.5, 1.0])),
        seed=seed,
    )


def guarded(spec: RunSpec, guard: Guard) -> list[Record]:
    """The records of a whole run under a guard, each with its `alarms`, and their names as `named`."""
    run, records = Run(spec, CPU), []
    watch = watch_of(run, guard)
    for record in run.records():
        alarms = watch.observe(record)
        records.append({**record, "alarms": [str(alarm) for alarm in alarms], "named": [a.name for a in alarms]})
    return records
