"""The verdict: what each difference and each drift leads to."""

from dataclasses import replace
from typing import Any

import pytest

from mutune.certificate.config import VERDICTS, LadderConfig
from mutune.certificate.ladder import Point, Rung, fit_rungs, ladder_runs
from mutune.certificate.valley import Drift, fit_drift
from mutune.certificate.verdict import Verdict, difference_table, judge
from mutune.config import SweepConfig
from mutune.training.config import RunSpec, StageConfig

PROXY = SweepConfig().spec()


def rungs_with(drift_per_doubling: float, spread: float = 0.0, edge: bool = False) -> tuple[list[Rung], Drift]:
    """Widths 32, 64, 128, two seeds whose slopes lie `spread` above and below the drift."""
    points = []
    for seed, sign in ((0, 1.0), (1, -1.0)):
        for doubling, width in enumerate((32, 64, 128)):
            bottom = -6.0 + (drift_per_doubling + sign * spread) * doubling
            for offset in (-2.0, -1.0, 0.0, 1.0, 2.0):
                x = -6.0 + offset
                value = x if edge else 4.0 + 0.2 * (x - bottom) ** 2
                points.append(Point(width, offset, seed, 2.0**x, value, False))
    rungs = fit_rungs(points)
    optima = {seed: {rung.width: rung.valleys[seed].optimum for rung in rungs} for seed in (0, 1)}
    return rungs, fit_drift(optima)


def verdict(target: RunSpec, drift_per_doubling: float = 0.0, spread: float = 0.0, **kwargs: Any) -> Verdict:
    rungs, drift = rungs_with(drift_per_doubling, spread, **kwargs)
    return judge("mup", difference_table(PROXY, target, 1024, 1024, 128), rungs, drift, target.model.width)


def wide(width: int = 128, **changes: Any) -> RunSpec:
    return replace(PROXY, model=PROXY.model.at_width(width), **changes)


def test_a_flat_ladder_to_a_target_that_differs_in_width_alone_is_go() -> None:
    result = verdict(wide(256))
    assert result.verdict == "GO"
    assert "+0.00 ± 0.00 at width 256" in result.reasons[0]


@pytest.mark.parametrize(
    ("drift", "spread", "expected"),
    [
        (0.1, 0.0, "GO"),
        (0.3, 0.0, "GO WITH CARE"),
        (0.1, 0.3, "GO WITH CARE"),
        (-0.6, 0.0, "NO-GO"),
        (0.6, 0.0, "NO-GO"),
    ],
)
def test_drift_and_spread_at_the_target_decide(drift: float, spread: float, expected: str) -> None:
    assert verdict(wide(128), drift, spread).verdict == expected


def test_no_go_comes_before_not_certified() -> None:
    assert verdict(wide(2560), -0.6).verdict == "NO-GO"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (wide(1024), "width: the target is 8× the widest rung \\(128\\); a rung at width 256"),
        (
            replace(wide(), model=replace(wide().model, depth=8)),
            "depth: 4 → 8, and table mup transfers over width only",
        ),
        (
            replace(wide(), stages=(StageConfig(num_steps=2400),)),
            "tokens: 122,880 → 1,228,800 \\(10×\\) was not measured",
        ),
        (replace(wide(), stages=(StageConfig(1024, 4, 30),)), "context: 128 → 1,024"),
        (replace(wide(), model=replace(wide().model, head_size=32)), "head size: 16 → 32"),
        (replace(wide(), model=replace(wide().model, activation="gelu")), "activation: swiglu → gelu"),
        (replace(wide(), schedule=replace(PROXY.schedule, kind="cosine")), "schedule: linear → cosine"),
    ],
)
def test_what_was_not_measured_is_not_certified(target: RunSpec, reason: str) -> None:
    result = verdict(target)
    assert result.verdict == "NOT CERTIFIED"
    with pytest.raises(AssertionError, match=reason):  # the reason is among the sentences
        raise AssertionError("\n".join(result.reasons))


def test_an_optimum_at_the_edge_is_not_certified() -> None:
    result = verdict(wide(), edge=True)
    assert result.verdict == "NOT CERTIFIED"
    assert any("edge of the tried rates" in reason and "ladder.offsets" in reason for reason in result.reasons)


def test_every_difference_is_listed_once_and_equal_axes_are_not() -> None:
    rows = {d.axis: d for d in difference_table(PROXY, wide(128), 1024, 1024, 128)}
    assert set(rows) == {"width", "heads (and so the ALiBi spectrum)", "tokens per parameter"}
    assert (rows["width"].proxy, rows["width"].target, rows["width"].ratio, rows["width"].measured_to) == (
        32,
        128,
        4,
        128,
    )


def test_the_ladder_is_the_base_and_every_width_around_the_transferred_rate() -> None:
    from pathlib import Path

    runs = ladder_runs(PROXY, LadderConfig(widths=[48, 64], offsets=[-1, 0, 1], seeds=2), Path("x"), "cpu", "hash")
    assert len(runs) == 3 * 3 * 2
    assert {run.width for run in runs} == {32, 48, 64}
    rates = sorted({run.spec.hyperparameters.learning_rate for run in runs})
    assert rates == [PROXY.hyperparameters.learning_rate * 2.0**k for k in (-1, 0, 1)]
    assert len({run.directory for run in runs}) == len(runs)
    assert len({run.fingerprint for run in runs}) == len(runs)
    assert {run.spec.base for run in runs} == {PROXY.base}


def test_the_verdicts_are_the_four_of_the_contract() -> None:
    assert VERDICTS == ("GO", "GO WITH CARE", "NO-GO", "NOT CERTIFIED")
