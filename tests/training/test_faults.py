"""Faults that arrive in the middle of a run are named within 20 steps, by the guard or the auditor."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mutune.config import SweepConfig
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.parametrization.finding import AuditError
from mutune.training import checkpoint
from mutune.training import guard as guard_module
from mutune.training.config import LoopConfig, StageConfig
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

    folder: Path
    guard: dict[str, Any]
    named: list[str]


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Trunk:
    return make_trunk(tmp_path_factory.mktemp("trunk"))


def make_trunk(folder: Path) -> Trunk:
    """Train the clean run that every fault arrives in."""
    run, guard, named = Run(SPEC, CPU), guard_of(SPEC), []
    watch = watch_of(run, guard)
    for record in run.records():
        named += [str(alarm) for alarm in watch.observe(record)]
        if record["step"] == AT:
            break
    checkpoint.save(folder, AT, run.model, run.optimizer, run.plan, {}, keep=1)
    return Trunk(folder, guard.state_dict(), named)


def said(trunk: Trunk, fault: Fault | None, *, audited: bool = True, steps: int = WITHIN) -> Iterator[Named]:
    """What the watchers say of the next steps, the fault in them."""
    run, guard = Run(SPEC, CPU), guard_of(SPEC)
    saved = checkpoint.newest(trunk.folder)
    assert saved is not None
    checkpoint.restore(saved, run.model, run.optimizer)
    guard.load_state_dict(trunk.guard)
    watch = watch_of(run, guard, audited=audited)
    with pytest.MonkeyPatch.context() as patch:
        for record in run.records(AT):
            if fault is not None and record["step"] > AT + 1:
                record |= fault.fields(run, record)
            try:
                alarms = watch.observe(record)
            except AuditError as error:
                yield from (Named(record["step"], "auditor", found.quantity, found.tensor) for found in error.findings)
                return
            yield from (Named(alarm.step, "guard", alarm.name, alarm.where) for alarm in alarms)
            if fault is not None and record["step"] == AT + 1:
                fault.inject(run, patch)
            if record["step"] == AT + 1 + steps:
                return


def is_named(fault: Fault, named: list[Named]) -> bool:
    return any((n.by, n.name) == (fault.by, fault.name) and fault.where in n.where for n in named)


def heard(trunk: Trunk, fault: Fault, key: str) -> list[Named]:
    """The auditor's faults end the run; some are also asked about with the auditor silent."""
    return list(said(trunk, fault, audited=not key.endswith(("unaudited", "by its loss"))))


@pytest.mark.parametrize("key", FAULTS)
def test_a_fault_is_named_within_20_steps(trunk: Trunk, key: str) -> None:
    named = heard(trunk, FAULTS[key], key)
    assert is_named(FAULTS[key], named), named


@pytest.mark.parametrize("key", [key for key, fault in FAULTS.items() if fault.rules])
def test_without_its_rule_a_fault_has_no_such_name(trunk: Trunk, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in FAULTS[key].rules:
        monkeypatch.delitem(guard_module.RULES, rule)
    assert not is_named(FAULTS[key], heard(trunk, FAULTS[key], key))


def test_the_same_run_without_a_fault_is_not_named(trunk: Trunk) -> None:
    assert trunk.named == []
    assert list(said(trunk, None, steps=40)) == []
