"""Clean runs are left alone, and the full counts of faults, false alarms and costs, by `make soak`."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mutune.config import SweepConfig
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.training.alarms import GuardConfig
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.run import Run
from tests import soak
from tests.training.faults import FAULTS
from tests.training.guarded import CPU, clean_spec, guard_of, guarded, watch_of
from tests.training.test_faults import AT, WITHIN, after, heard, is_named, make_trunk

#: Thresholds were chosen on the seeds from 1,000 on; these are others.
QUICK, SOAK = (20, 21), range(20)
STEPS = 500


@pytest.mark.parametrize("seed", QUICK)
def test_a_clean_run_has_no_alarm(seed: int) -> None:
    spec = clean_spec(seed, num_steps=150)
    records = guarded(spec, guard_of(spec))
    assert len(records) == 150
    assert [record["alarms"] for record in records if record["alarms"]] == []


def described(spec: RunSpec) -> str:
    stages = ", then ".join(f"{stage.batch_sequences} × {stage.context_length}" for stage in spec.stages)
    return (
        f"clean: width {spec.model.width}, depth {spec.model.depth}, {stages} tokens, "
        f"rate {spec.hyperparameters.learning_rate:.4f}, {spec.schedule.kind}"
    )


def clean_rows() -> Iterator[dict[str, Any]]:
    for seed in SOAK:
        spec = clean_spec(seed, STEPS)
        records = guarded(spec, guard_of(spec))
        names = [f"{name} at {record['step']}" for record in records for name in record["named"]]
        row = {"run": described(spec), "steps": len(records), "alarms": len(names), "named within": "—", "by": "—"}
        yield row | {"as": ", ".join(names) or "—"}


def fault_rows(folder: Path, seeds: range) -> Iterator[dict[str, Any]]:
    """Each fault in the runs of several seeds: the most steps until it was named."""
    trunks = [make_trunk(folder / str(seed), seed) for seed in seeds]
    assert [trunk.named for trunk in trunks] == [[]] * len(trunks)
    for key, fault in FAULTS.items():
        steps, also = [], set()
        for trunk in trunks:
            named = heard(trunk, after(trunk, fault, audited=fault.audited))
            steps += [next((n.step for n in named if is_named(fault, [n])), AT + 10_000) - AT - 1]
            also |= {n.name for n in named if n.by == "guard"} - {fault.name}
        shown = f"{fault.name}{f' ({fault.where})' if fault.where else ''}"
        shown += f"; also {', '.join(sorted(also))}" if also else ""
        row = {"run": f"fault: {key}", "steps": AT + 1 + WITHIN, "alarms": "—", "named within": max(steps)}
        yield row | {"by": fault.by, "as": shown}


@pytest.mark.soak
def test_soak_faults_are_named_and_clean_runs_are_not(tmp_path: Path) -> None:
    faults = list(fault_rows(tmp_path, range(3)))
    clean = list(clean_rows())
    steps, alarms = (sum(row[key] for row in clean) for key in ("steps", "alarms"))
    total = {"run": f"all {len(clean)} clean runs", "steps": steps, "alarms": alarms, "named within": "—", "by": "—"}
    title = f"The guard: faults at step {AT + 1} (3 seeds, the slowest), and clean runs"
    soak.record("guard", title, [*faults, *clean, total | {"as": "—"}])
    assert all(row["named within"] <= WITHIN for row in faults)
    assert (len(clean) >= 20, steps >= 10_000, alarms <= 1) == (True, True, True)


# ---------------------------------------------------------------------------------------------------------------- costs
def seconds(call: Callable[[], object], times: int) -> float:
    """CPU seconds of one call."""
    call()
    started = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - started) / times


def cost_row(width: int, depth: int, context: int, batch: int) -> dict[str, Any]:
    base = SweepConfig().spec()
    stage = StageConfig(context_length=context, batch_sequences=batch, num_steps=40)
    spec = replace(
        base,
        model=ModelConfig(width=width, depth=depth, head_size=16),
        base=BaseConfig(width=32, depth=depth),
        stages=(stage,),
        loop=LoopConfig(heldout_windows=4, audit_every=0),
    )
    run, guard = Run(spec, CPU), guard_of(spec)
    watch, records = watch_of(run, guard), run.steps()
    step = seconds(lambda: next(records), 8)
    record = {**next(records), "tokens": 0, "step": guard.config.every}
    probe, rules = seconds(lambda: watch.observe(dict(record)), 8), seconds(lambda: guard.observe(dict(record)), 100)
    return {
        "model": f"width {width}, depth {depth}, {batch} × {context} tokens",
        "step, ms": f"{1e3 * step:.1f}",
        "probe with audit, ms": f"{1e3 * probe:.1f}",
        "rules, ms": f"{1e3 * rules:.2f}",
        "share of a run, %": f"{100 * (probe / guard.config.every + rules) / step:.1f}",
    }


@pytest.mark.soak
def test_soak_what_the_guard_costs() -> None:
    rows = [cost_row(*shape) for shape in ((32, 2, 64, 4), (128, 4, 128, 16), (256, 8, 256, 16))]
    title = f"What the guard costs at guard.every={GuardConfig().every}, on one core"
    soak.record("guard_cost", title, rows)
    assert float(rows[-1]["share of a run, %"]) < 2.0
