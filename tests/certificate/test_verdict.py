"""The verdict: what each difference and each drift leads to."""

from dataclasses import replace
from typing import Any

import pytest

from mutune.certificate.config import VERDICTS, LadderConfig
from mutune.certificate.ladder import Point, Rung, fit_rungs, ladder_runs, optima
from mutune.certificate.valley import Drift, fit_drift
from mutune.certificate.verdict import Verdict, difference_table, judge
from mutune.config import SweepConfig
from mutune.training.config import RunSpec, StageConfig
from mutune.training.schedule import ScheduleConfig

PROXY = SweepConfig().spec()
RATE = PROXY.hyperparameters.learning_rate
OFFSETS = (-2.0, -1.0, 0.0, 1.0, 2.0)


def rungs_at(
    bottoms: dict[int, dict[int, float]], offsets: tuple[float, ...] = OFFSETS, edge: bool = False
) -> tuple[list[Rung], Drift]:
    """Exact parabolas around the transferred rate; `bottoms[seed][width]` in octaves from it."""
    points = []
    for seed, by_width in bottoms.items():
        for width, bottom in by_width.items():
            for offset in offsets:
                value = offset if edge else 4.0 + 0.2 * (offset - bottom) ** 2
                points.append(Point(width, offset, seed, RATE * 2.0**offset, value, False))
    rungs = fit_rungs(points)
    return rungs, fit_drift(optima(rungs))


def verdict(target: RunSpec, drift_per_doubling: float = 0.0, spread: float = 0.0, **kwargs: Any) -> Verdict:
    """Widths 32, 64, 128, two seeds whose slopes lie `spread` above and below the drift."""
    slopes = {0: drift_per_doubling + spread, 1: drift_per_doubling - spread}
    widths = {32: 0, 64: 1, 128: 2}
    bottoms = {seed: {width: slope * k for width, k in widths.items()} for seed, slope in slopes.items()}
    return of_ladder(*rungs_at(bottoms, **kwargs), target)


def of_ladder(rungs: list[Rung], drift: Drift, target: RunSpec) -> Verdict:
    table = difference_table(PROXY, target, 1024, 1024, 128)
    return judge("mup", table, rungs, drift, RATE, target.model.width)


def wide(width: int = 128, **changes: Any) -> RunSpec:
    return replace(PROXY, model=PROXY.model.at_width(width), **changes)


def test_a_flat_ladder_to_a_target_that_differs_in_width_alone_is_go() -> None:
    result = verdict(wide(256))
    assert result.verdict == "GO"
    assert "at width 256 it is expected +0.00 ± 0.00 octaves from the transferred rate" in result.reasons[0]


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
    result = verdict(wide(2560), -0.6)
    assert result.verdict == "NO-GO"
    assert result.reasons[1].startswith("width: the target is 20× the widest rung")  # and its reasons are still given


@pytest.mark.parametrize(
    ("octaves", "expected"),
    [(0.4, "GO"), (-0.8, "GO WITH CARE"), (1.4, "NO-GO"), (-1.4, "NO-GO")],
)
def test_an_optimum_that_does_not_move_but_lies_off_the_transferred_rate_is_judged_by_that(
    octaves: float, expected: str
) -> None:
    flat = {seed: dict.fromkeys((32, 64, 128), octaves) for seed in (0, 1)}
    result = of_ladder(*rungs_at(flat), wide(256))
    assert result.verdict == expected
    assert f"expected {octaves:+.2f} ± 0.00 octaves from the transferred rate" in result.reasons[0]


def test_drift_away_from_a_wrong_rate_may_bring_the_optimum_nearer() -> None:
    falling = {seed: {32: 1.4, 64: 1.0, 128: 0.6} for seed in (0, 1)}
    assert of_ladder(*rungs_at(falling), wide(256)).verdict == "GO"
    assert of_ladder(*rungs_at(falling), wide(32)).verdict == "NO-GO"


def test_a_ladder_that_falls_and_rises_again_is_not_certified() -> None:
    bent = {seed: {32: 1.0, 48: -1.0, 64: -1.4, 96: -1.0, 128: 1.0} for seed in (0, 1)}
    result = of_ladder(*rungs_at(bent), wide(128))
    assert result.verdict == "NOT CERTIFIED"
    assert "the optimum does not follow the width" in result.reasons[0]


def test_a_slightly_bent_ladder_is_go_with_care() -> None:
    bent = {seed: {32: 0.6, 64: 0.0, 128: 0.6} for seed in (0, 1)}
    assert of_ladder(*rungs_at(bent), wide(128)).verdict == "GO WITH CARE"


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
        (
            replace(wide(), model=replace(wide().model, ffn_width=512)),
            "feed-forward width over width: 2.656 → 4.0; ladders keep this ratio",
        ),
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
    result = verdict(wide(), edge=True, offsets=(-0.8, 0.0, 0.8))
    assert result.verdict == "NOT CERTIFIED"
    assert any("edge of the tried rates" in reason and "ladder.offsets" in reason for reason in result.reasons)


def test_an_optimum_at_a_far_edge_is_no_go_and_says_that_it_is_a_bound() -> None:
    result = verdict(wide(), edge=True)
    assert result.verdict == "NO-GO"
    assert any("edge of the tried rates" in reason for reason in result.reasons)


@pytest.mark.parametrize(("share", "expected"), [(0.2, "GO"), (0.9, "NOT CERTIFIED")])
def test_another_decay_share_of_the_same_schedule_is_a_difference(share: float, expected: str) -> None:
    proxy = replace(PROXY, schedule=ScheduleConfig("wsd", decay_fraction=0.1))
    target = replace(wide(), schedule=ScheduleConfig("wsd", decay_fraction=share))
    rows = difference_table(proxy, target, 1024, 1024, 128)
    assert ("decay share", 0.1, share) in [(row.axis, row.proxy, row.target) for row in rows]
    rungs, drift = rungs_at({seed: dict.fromkeys((32, 64, 128), 0.0) for seed in (0, 1)})
    result = judge("mup", rows, rungs, drift, RATE, 128)
    assert result.verdict == expected
    assert expected == "GO" or "schedule.decay_fraction" in result.reasons[0]


def test_a_feed_forward_width_of_the_same_family_is_no_difference() -> None:
    proxy = replace(PROXY, model=replace(PROXY.model, ffn_width=128))
    for ffn, differs in ((512, False), (511, False), (None, True)):
        target = replace(wide(), model=replace(wide().model, ffn_width=ffn))
        axes = {row.axis for row in difference_table(proxy, target, 1024, 1024, 128)}
        assert ("feed-forward width over width" in axes) == differs


def test_every_rung_of_a_ladder_has_the_feed_forward_ratio_of_the_study() -> None:
    from pathlib import Path

    wide_ffn = replace(PROXY, model=replace(PROXY.model, ffn_width=128))
    runs = ladder_runs(wide_ffn, LadderConfig(widths=[64, 128]), Path("x"), "cpu", "hash")
    assert {run.spec.model.ffn / run.width for run in runs} == {4.0}


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
