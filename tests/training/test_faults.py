"""Faults that arrive in the middle of a run are named within 20 steps, by the guard or the auditor."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mutune.config import SweepConfig
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.parametrization.finding import AuditError
from mutune.training import checkpoint
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.guard_rules import RULES
from mutune.training.loop import Record
from mutune.training.run import Run
from tests.training.faults import FAULTS, RANKS, Fault
from tests.training.guarded import CPU, guard_of, watch_of

AT, WITHIN = 120, 20
SPEC = replace(
    SweepConfig().spec(),
    model=ModelConfig(width=48, depth=2, head_size=16),
    base=BaseConfig(width=32, depth=2),
    hyperparameters=replace(SweepConfig().hyperparameters, learning_rate=2**-7),
    stages=(StageConfig(context_length=32, batch_sequences=4, num_steps=400),),
    loop=LoopConfig(heldout_windows=4, clip_norm=0.5, audit_every=0, micro_sequences=4 // RANKS),
)


@dataclass(frozen=True)
class Named:
    """One thing that a watcher said."""

    step: int
    by: str
    name: str
    where: str


@dataclass(frozen=True)
class Trunk:
    """A clean run of `AT` steps: its checkpoint, and what its guard remembers."""

    spec: RunSpec
    folder: Path
    guard: dict[str, Any]
    named: list[str]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return make_trunk(tmp_path_factory.mktemp("trunk"))


def make_trunk(folder: Path, seed: int = 0) -> Trunk:
    """Train the clean run that every fault arrives in."""
    spec = replace(SPEC, seed=seed)
    run, guard, named = Run(spec, CPU), guard_of(spec), []
    watch = watch_of(run, guard)
    for record in run.records():
        named += [str(alarm) for alarm in watch.observe(record)]
        if record["step"] == AT:
            break
    checkpoint.save(folder, AT, run.model, run.optimizer, run.plan, {}, keep=1)
    return Trunk(spec, folder, guard.state_dict(), named)


@dataclass
class After:
    """The records of the steps after the trunk, a fault in them, and what the auditor said of them."""

    records: list[Record] = field(default_factory=list)
    audited: list[Named] = field(default_factory=list)


def after(trunk: Trunk, fault: Fault | None, *, audited: bool = True, steps: int = WITHIN) -> After:
    """Go on from the trunk; the fault arrives one step later."""
    run, guard, found = Run(trunk.spec, CPU), guard_of(trunk.spec), After()
    saved = checkpoint.newest(trunk.folder)
    assert saved is not None
    checkpoint.restore(saved, run.model, run.optimizer)
    watch = watch_of(run, guard, audited=audited)
    with pytest.MonkeyPatch.context() as patch:
        for record in run.records(AT):
            if fault is not None and record["step"] > AT + 1:
                record |= fault.fields(run, record)
            try:
                watch.observe(record)
            except AuditError as error:
                found.audited += [Named(record["step"], "auditor", f.quantity, f.tensor) for f in error.findings]
                break
            found.records.append(record)
            if fault is not None and record["step"] == AT + 1:
                fault.inject(run, patch)
            if record["step"] == AT + 1 + steps:
                break
    return found


def heard(trunk: Trunk, found: After) -> list[Named]:
    """What is said of these steps: by a guard that remembers the trunk, and by the auditor."""
    guard = guard_of(trunk.spec)
    guard.load_state_dict(trunk.guard)
    alarms = [alarm for record in found.records for alarm in guard.observe(record)]
    return [Named(alarm.step, "guard", alarm.name, alarm.where) for alarm in alarms] + found.audited


def is_named(fault: Fault, named: list[Named]) -> bool:
    return any((n.by, n.name) == (fault.by, fault.name) and fault.where in n.where for n in named)


@pytest.fixture(scope="module")
def broken(trunk: Trunk) -> Callable[[str], After]:
    """Fault → what came after it, run once."""
    return cache(lambda key: after(trunk, FAULTS[key], audited=FAULTS[key].audited))


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_is_named_within_20_steps(trunk: Trunk, broken: Callable[[str], After], key: str) -> None:
    named = heard(trunk, broken(key))
    assert is_named(FAULTS[key], named), named


@pytest.mark.parametrize("key", [key for key, fault in FAULTS.items() if fault.rules])
def test_without_its_rule_a_fault_has_no_such_name(
    trunk: Trunk, broken: Callable[[str], After], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {name: rule for name, rule in RULES.items() if name not in FAULTS[key].rules}
    monkeypatch.setattr("mutune.training.guard.RULES", others)
    assert not is_named(FAULTS[key], heard(trunk, broken(key)))


def test_the_same_run_without_a_fault_is_not_named(trunk: Trunk) -> None:
    assert trunk.named == []
    found = after(trunk, None, steps=40)
    assert len(found.records) == 41
    assert heard(trunk, found) == []
