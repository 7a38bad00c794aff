"""Runs are held against their plan: when, what it costs, and how a mismatch ends a command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mutune.config import SweepConfig
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.parametrization.apply import make_optimizer
from mutune.parametrization.finding import AuditError
from mutune.parametrization.rules import ParametrizationConfig
from mutune.training import run as run_module
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.loop import Record
from mutune.training.run import Run, second_opinion_of

CPU = torch.device("cpu")
SPEC = replace(
    SweepConfig().spec(),
    model=ModelConfig(width=32, depth=2, head_size=16),
    base=BaseConfig(width=16, depth=2),
    stages=(StageConfig(context_length=16, batch_sequences=2, num_steps=12),),
    loop=LoopConfig(heldout_windows=2, audit_every=4),
)


def audited(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The keywords of every audit of a whole run."""
    calls: list[dict[str, Any]] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            calls.append(keywords)
            return function(*arguments, **keywords)

        return call

    for name in ("audit", "findings"):
        monkeypatch.setattr(run_module, name, noting(getattr(run_module, name)))
    list(Run(spec, CPU).records())
    return calls


def test_a_run_is_audited_at_its_start_and_every_so_many_steps_at_the_rate_of_its_schedule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *later = audited(SPEC, monkeypatch)
    assert first["at_init"]
    assert "forward" in first
    assert first["betas"] == (0.9, 0.95)
    warmup, steps = 1, 12
    assert [call["factor"] for call in later] == pytest.approx(
        [1 - (s - 1 - warmup) / (steps - warmup) for s in (4, 8, 12)]
    )


def test_no_interval_leaves_the_audit_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(audited(replace(SPEC, loop=replace(SPEC.loop, audit_every=0)), monkeypatch)) == 1


def losses(records: list[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def test_an_audited_run_has_the_records_of_an_unaudited_one_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = losses(list(Run(SPEC, CPU).records()))
    monkeypatch.setattr(run_module, "audit", lambda *_, **__: None)
    monkeypatch.setattr(run_module, "findings", lambda *_, **__: [])
    assert losses(list(Run(SPEC, CPU).records())) == watched


def state_of(spec: RunSpec, into: Run) -> None:
    """The optimizer's groups as another run's checkpoint would leave them, one for one."""
    other = Run(spec, CPU)
    values = {}
    for group in other.optimizer.param_groups:
        for name in group["param_names"]:
            values[name] = {key: group[key] for key in ("lr", "peak_lr", "weight_decay", "eps")}
    for group in into.optimizer.param_groups:
        group.update(values[group["param_names"][0]])


@pytest.mark.parametrize("start_step", [0, 5])
def test_an_optimizer_of_another_table_stops_a_run_before_its_first_update(start_step: int) -> None:
    run = Run(SPEC, CPU)
    state_of(replace(SPEC, parametrization=ParametrizationConfig(table="sp")), into=run)
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(AuditError, match=r"c_attn\.weight .*: learning rate is 0\.01562, expected 0\.007812; every"):
        next(run.records(start_step))
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_a_fresh_run_with_other_initial_values_is_stopped_and_a_resumed_one_is_not() -> None:
    run = Run(SPEC, CPU)
    with torch.no_grad():
        run.model.wte.weight.mul_(1.3)
    with pytest.raises(AuditError, match=r"wte\.weight: initial std is"):
        next(run.records())
    assert next(run.records(5))["step"] == 6


def test_a_change_in_the_middle_stops_the_run_at_the_next_audit() -> None:
    run = Run(SPEC, CPU)
    records = run.records()
    steps = [next(records)["step"] for _ in range(5)]
    run.model.output_multiplier.value = 1.0
    steps += [next(records)["step"] for _ in range(2)]
    with pytest.raises(AuditError, match=r"output_multiplier: multiplier output is 1, expected 0\.5"):
        next(records)
    assert steps == [1, 2, 3, 4, 5, 6, 7]


def test_a_multiplier_that_the_forward_pass_goes_around_stops_a_run() -> None:
    run = Run(SPEC, CPU)
    run.model.h[1].attn.logit_multiplier.forward = lambda x: x  # type: ignore[union-attr]
    with pytest.raises(AuditError, match=r"h\.1\.attn\.logit_multiplier: norm of the output"):
        next(run.records())


# ------------------------------------------------------------------------------------------------------- second opinion
@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        pytest.param(SPEC, True, id="mup"),
        pytest.param(replace(SPEC, parametrization=ParametrizationConfig(decay="fixed")), True, id="fixed-decay"),
        pytest.param(replace(SPEC, base=BaseConfig(width=16, depth=2, ffn_width=42.6)), False, id="declared-base"),
    ],
)
def test_mup_is_asked_about_a_run_whose_base_is_a_model(spec: RunSpec, asked: bool) -> None:
    plan = spec.plan(vocab_size=31)
    assert second_opinion_of(spec, plan) == []
    rows = {name: replace(row, lr_mult=1.0) for name, row in plan.parameters.items()}
    assert bool(second_opinion_of(spec, replace(plan, parameters=rows))) == asked


def test_mup_s_other_opinion_stops_a_run() -> None:
    run = Run(SPEC, CPU)
    row = replace(run.plan.parameters["h.0.mlp.c_fc.weight"], lr_mult=1.0)
    run.plan = replace(run.plan, parameters={**run.plan.parameters, row.name: row})
    with pytest.raises(AuditError, match="the mup package gives another value"):
        next(run.records())


# -------------------------------------------------------------------------------------------------------- the command
def test_a_target_that_is_not_what_its_plan_says_ends_with_one_and_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune import train, transfer

    shape = ["target.model.width=16", "target.model.depth=1", "target.name=tiny", "target.loop.heldout_windows=2"]
    stages = "target.stages=[{context_length: 16, batch_sequences: 2, num_steps: 100}]"
    assert transfer.main(["study=published", "target=small", *shape, stages, f"out={tmp_path}"]) == 0
    file = tmp_path / "transfer/published--tiny/transfer.yaml"

    def never_applied(model: Any, plan: Any, **keywords: Any) -> torch.optim.AdamW:
        optimizer = make_optimizer(model, plan, **keywords)
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"] = 0.012
        return optimizer

    monkeypatch.setattr(run_module, "make_optimizer", never_applied)
    capsys.readouterr()
    assert train.main([f"transfer={file}", f"out={tmp_path}"]) == 1
    said = capsys.readouterr().err
    assert "\nmutune.train: the audit found " in said
    assert "h.0.attn.c_attn.weight: learning rate is 0.012, expected 0.192; every group has the same rate" in said
    assert "Traceback" not in said
    monkeypatch.undo()
    assert train.main([f"transfer={file}", f"out={tmp_path}"]) == 0  # nothing was trained, and nothing is in the way
    assert len((tmp_path / "train/tiny/metrics.jsonl").read_text().splitlines()) == 100
    assert json.loads((tmp_path / "train/tiny/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
