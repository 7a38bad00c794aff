"""Switching the context length: what a run makes of long documents, against a control that does not switch."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.files import write_text
from mutune.reporting import load_positions, position_differences
from mutune.training.config import StageConfig
from tests.doors import ROOT
from tests.evaluation.context_switch import CONTROL, SWITCHED, arms, curves, forked
from tests.soak import record

SMALL = ["+sweep=smoke", "model.width=16", "model.depth=1"]
CONTEXT, FACTOR, SEEDS, NUM_STEPS = 256, 4, (0, 1, 2), 1000
LARGE = ["model.width=64", "model.depth=4", f"run={{context_length: {CONTEXT}, batch_sequences: 8}}"]
TITLE = "Context 256 → 1,024 after 75 % of the tokens, against a control at 256: loss by position on long documents"


def test_both_arms_have_the_tokens_of_each_stage() -> None:
    stages = arms(StageConfig(256, 8, 750), 4, 250)
    assert [[stage.tokens for stage in stages[arm]] for arm in (SWITCHED, CONTROL)] == [[1_536_000, 512_000]] * 2
    assert [stages[arm][1].context_length for arm in (SWITCHED, CONTROL)] == [1024, 256]


def test_a_small_switch_has_its_curves_and_its_differences(tmp_path: Path) -> None:
    spec = compose("sweep", SweepConfig, [*SMALL, "run={context_length: 16, batch_sequences: 8, num_steps: 12}"]).spec()
    rows = list(curves(spec, 4, 4, seeds=(0, 1), num_windows=40))
    write_text(tmp_path / "losses.csv", table(rows))
    losses = load_positions(tmp_path / "losses.csv")
    assert len(losses) == 2 * 2 * 7  # arms, seeds, and bins up to 64
    assert set(zip(losses.arm, losses.context, strict=True)) == {(SWITCHED, 64), (CONTROL, 16)}
    assert losses.loss.between(3, 7).all()
    differences = position_differences(losses)
    assert differences["last"].tolist() == [0, 1, 3, 7, 15, 31, 63]
    assert (differences.low <= differences.difference).all()
    assert (differences.difference != 0).all()


def test_both_arms_leave_the_trunk_with_the_same_state_and_data() -> None:
    spec = compose("sweep", SweepConfig, [*SMALL, "run={context_length: 16, batch_sequences: 8, num_steps: 3}"]).spec()
    runs = forked(spec, 4, 2)
    one, other = (run.model.state_dict() for run in runs.values())
    assert all(torch.equal(one[name], other[name]) for name in one)
    moments = [[state["exp_avg"] for state in run.optimizer.state.values()] for run in runs.values()]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))
    switched, control = runs[SWITCHED].loader, runs[CONTROL].loader
    assert (switched.batch(2) == control.batch(2)).all()
    assert switched.token_ranges == control.token_ranges


@pytest.mark.soak
def test_a_switch_to_a_longer_context_is_measured_against_its_control() -> None:
    """About 12 minutes of one core."""
    torch.set_num_threads(1)
    trunk = NUM_STEPS * 3 // 4
    words = [*LARGE, f"run.num_steps={trunk}", "hyperparameters.learning_rate=0.01"]
    rows = list(curves(compose("sweep", SweepConfig, words).spec(), FACTOR, NUM_STEPS - trunk, SEEDS))
    keep(rows)
    assert {row["seed"] for row in rows} == set(SEEDS)
    assert all(math.isfinite(row["loss"]) for row in rows)


def keep(rows: list[dict[str, Any]]) -> None:
    """Write the curves and their table."""
    path = ROOT / "benchmarks" / "context_switch.csv"
    write_text(path, table(rows))
    losses = load_positions(path)
    assert len(losses) == 2 * len(SEEDS) * 11
    record("context_switch", TITLE, [*map(described, summary(losses))])


def table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "loss": f"{row['loss']:.6f}", "error": f"{row['error']:.6f}"} for row in rows)
    return text.getvalue()


def summary(losses: pd.DataFrame) -> list[dict[str, Any]]:
    means = losses.pivot_table(index="first", columns="arm", values="loss")
    errors = losses.groupby("first")["error"].mean()
    found = position_differences(losses).set_index("first", drop=False).join(means).assign(error=errors)
    return [{str(key): value for key, value in row.items()} for row in found.to_dict("records")]


def described(row: dict[str, Any]) -> dict[str, Any]:
    """A line of the table."""
    agreed = {-1: "lower", 1: "higher", 0: "seeds disagree"}[row["sign"]]
    return {
        "positions": f"{row['first']}-{row['last']}",
        "control": f"{row[CONTROL]:.4f}",
        "switched": f"{row[SWITCHED]:.4f}",
        "± of a sample of documents": f"{row['error']:.4f}",
        "switched - control": f"{row['difference']:+.4f}",
        "least and greatest of 3 seeds": f"{row['low']:+.4f} to {row['high']:+.4f}",
        "switched is": agreed,
    }
