"""Schedules: BTLM's published rates, golden curves, and what is refused."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.errors import Refusal
from mutune.parametrization.apply import set_rates
from mutune.training.schedule import ScheduleConfig, branch_schedule, multiplier

PEAK, STEPS, FIRST_STAGE = 0.012, 159_636, 119_727
END_2K, END_8K = 1.0138e-4 / 0.012, 1.0198e-4 / 0.012
BTLM = ScheduleConfig(kind="linear", warmup_steps=95, end_ratio=END_8K)

# step, rate with the 2k configuration's end, rate with the 8k configuration's end
PUBLISHED = [
    (0, 0.0, 0.0),
    (1, 1.263157894736842e-4, 1.263157894736842e-4),
    (47, 5.936842105263159e-3, 5.936842105263159e-3),
    (94, 1.1873684210526318e-2, 1.1873684210526318e-2),
    (95, 1.2e-2, 1.2e-2),
    (96, 1.1999925419672687e-2, 1.1999925423433476e-2),
    (1_000, 1.1932504803780846e-2, 1.1932508207294678e-2),
    (50_000, 8.278068765395729e-3, 8.278256447558936e-3),
    (79_865, 6.0507272901636575e-3, 6.051027288283262e-3),
    (119_727, 3.077806282773706e-3, 3.078256193454974e-3),
    (140_000, 1.5658393071373514e-3, 1.5663654602892044e-3),
    (159_636, 1.0138e-4, 1.0198e-4),
]


@pytest.mark.parametrize(("step", "rate_2k", "rate_8k"), PUBLISHED)
def test_each_published_curve_is_reproduced(step: int, rate_2k: float, rate_8k: float) -> None:
    for end, rate in ((END_2K, rate_2k), (END_8K, rate_8k)):
        curve = multiplier(ScheduleConfig(warmup_steps=95, end_ratio=end), STEPS)
        assert PEAK * curve(step) == pytest.approx(rate, rel=1e-12, abs=0.0)


@pytest.mark.parametrize(("step", "rate_2k", "rate_8k"), PUBLISHED)
def test_each_stage_uses_its_own_published_end(step: int, rate_2k: float, rate_8k: float) -> None:
    curve = multiplier(BTLM, STEPS, [(FIRST_STAGE, END_2K), (STEPS, END_8K)])
    wanted = rate_2k if step < FIRST_STAGE else rate_8k
    assert PEAK * curve(step) == pytest.approx(wanted, rel=1e-12, abs=0.0)


def test_the_last_step_of_the_first_stage_still_uses_the_first_end() -> None:
    curve = multiplier(BTLM, STEPS, [(FIRST_STAGE, END_2K), (STEPS, END_8K)])
    assert curve(FIRST_STAGE - 1) == multiplier(ScheduleConfig(warmup_steps=95, end_ratio=END_2K), STEPS)(
        FIRST_STAGE - 1
    )
    assert curve(FIRST_STAGE) == multiplier(BTLM, STEPS)(FIRST_STAGE)


def test_a_stage_without_an_end_of_its_own_takes_that_of_the_schedule() -> None:
    plain = multiplier(BTLM, STEPS)
    staged = multiplier(BTLM, STEPS, [(FIRST_STAGE, None), (STEPS, None)])
    assert [staged(step) for step, _, _ in PUBLISHED] == [plain(step) for step, _, _ in PUBLISHED]


def test_linear_falls_in_equal_steps() -> None:
    curve = multiplier(ScheduleConfig(warmup_steps=2, end_ratio=0.5), 10)
    assert [curve(step) for step in range(11)] == [
        0.0, 0.5, 1.0, 0.9375, 0.875, 0.8125, 0.75, 0.6875, 0.625, 0.5625, 0.5
    ]  # fmt: skip


def test_cosine_is_half_way_down_in_the_middle() -> None:
    curve = multiplier(ScheduleConfig(kind="cosine", warmup_steps=2, end_ratio=0.2), 10)
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2
    assert [curve(step) for step in (0, 1, 2, 4, 6, 8, 10)] == pytest.approx(
        [0.0, 0.5, 1.0, quarter, 0.6, 1.2 - quarter, 0.2], rel=1e-15
    )


def test_wsd_stays_at_the_peak_and_decays_in_the_last_share_of_the_run() -> None:
    curve = multiplier(ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.4), 10)
    assert [curve(step) for step in range(11)] == pytest.approx(
        [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0], abs=1e-15
    )


def test_constant_stays_at_the_peak_after_warm_up() -> None:
    curve = multiplier(ScheduleConfig(kind="constant", warmup_steps=4, end_ratio=0.3), 10)
    assert [curve(step) for step in (0, 1, 2, 3, 4, 9)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_the_warm_up_is_a_share_of_the_run_unless_given_in_steps() -> None:
    assert ScheduleConfig(warmup_fraction=0.05).warmup(240) == 12
    assert ScheduleConfig(warmup_fraction=0.05, warmup_steps=7).warmup(240) == 7
    assert multiplier(ScheduleConfig(warmup_fraction=0.0), 10)(0) == 1.0


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
def test_the_ratios_between_groups_survive_a_whole_schedule(kind: str) -> None:
    peaks = (0.02, 0.005, 0.02 / (170 / 42))
    groups = [{"params": [torch.zeros(1)], "lr": peak, "peak_lr": peak} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    curve = multiplier(ScheduleConfig(kind=kind, end_ratio=0.01), 40)
    for step in range(41):
        set_rates(optimizer, curve(step))
        for group in optimizer.param_groups:
            assert group["lr"] / group["peak_lr"] == pytest.approx(curve(step), rel=1e-15, abs=0.0)


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd", "constant"])
@pytest.mark.parametrize("end_ratio", [0.0, 0.0085, 1.0])
def test_factors_stay_between_zero_and_one_and_never_rise_after_warm_up(kind: str, end_ratio: float) -> None:
    curve = multiplier(ScheduleConfig(kind=kind, end_ratio=end_ratio), 100)
    factors = [curve(step) for step in range(101)]
    assert all(0.0 <= factor <= 1.0 for factor in factors)
    assert factors[:6] == sorted(factors[:6])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[5] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "step"}, r"schedule\.kind=step is unknown; known kinds: linear, cosine, wsd, constant\."),
        (
            {"end_ratio": -0.1},
            r"schedule\.end_ratio=-0\.1 must be a finite number at least 0 and at most 1; for example",
        ),
        ({"end_ratio": 1.5}, r"schedule\.end_ratio=1\.5 must be a finite number at least 0 and at most 1"),
        (
            {"warmup_fraction": -0.1},
            r"schedule\.warmup_fraction=-0\.1 must be .*; for example schedule\.warmup_fraction=0\.05",
        ),
        ({"warmup_steps": -1}, r"schedule\.warmup_steps=-1 must be a whole number at least 0; .*=10"),
        ({"kind": "wsd", "decay_fraction": 0.0}, r"schedule\.decay_fraction=0\.0 must be above 0 and leave room for"),
        ({"kind": "wsd", "decay_fraction": 0.97}, r"schedule\.decay_fraction=0\.97 must be above 0 and leave room for"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        ScheduleConfig(**arguments)


@pytest.mark.parametrize(
    ("schedule", "key", "works"),
    [
        (ScheduleConfig(warmup_steps=100), r"warmup_steps=100", "5"),
        (ScheduleConfig(warmup_steps=101), r"warmup_steps=101", "5"),
        (ScheduleConfig(warmup_fraction=1.0), r"warmup_fraction=1\.0", r"0\.05"),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_refused(schedule: ScheduleConfig, key: str, works: str) -> None:
    with pytest.raises(
        Refusal, match=rf"schedule\.{key} must be shorter than the run of 100 steps; for example .*={works}\."
    ):
        multiplier(schedule, 100)


def test_a_warm_up_in_steps_is_not_judged_by_the_fraction_that_it_overrides() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=1, warmup_fraction=0.9, decay_fraction=0.5)
    assert schedule.warmup(100) == 1
    with pytest.raises(Refusal, match=r"decay_fraction=0\.0 must be above 0"):
        ScheduleConfig(kind="wsd", warmup_steps=1, decay_fraction=0.0)


def test_a_wsd_decay_that_would_begin_during_warm_up_is_refused() -> None:
    schedule = ScheduleConfig(kind="wsd", warmup_steps=90, decay_fraction=0.2)
    with pytest.raises(Refusal, match=r"schedule\.decay_fraction=0\.2 .*room.* warm-up of 90 of 100 steps"):
        multiplier(schedule, 100)


def test_a_decay_in_steps_overrides_its_share() -> None:
    curve = multiplier(ScheduleConfig(kind="wsd", warmup_steps=2, decay_fraction=0.9, decay_steps=4), 10)
    assert [curve(step) for step in range(11)] == [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert ScheduleConfig(kind="wsd", decay_steps=4).decay_share(10) == 0.4
    assert ScheduleConfig(kind="wsd", decay_fraction=0.3).decay_share(10) == 0.3


def test_a_decay_in_steps_may_begin_where_the_warm_up_ends_and_not_before() -> None:
    curve = multiplier(ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=8), 10)
    assert [curve(step) for step in (1, 2, 6, 10)] == [0.5, 1.0, 0.5, 0.0]
    schedule = ScheduleConfig(kind="wsd", warmup_steps=2, decay_steps=9)
    with pytest.raises(Refusal, match=r"schedule\.decay_steps=9 leaves no room .* 2 of 10 steps; for example .*=4\."):
        multiplier(schedule, 10)
    with pytest.raises(Refusal, match=r"schedule\.decay_steps=0 must be a whole number at least 1"):
        ScheduleConfig(kind="wsd", decay_steps=0)


trunks = st.one_of(
    st.builds(ScheduleConfig, st.just("constant"), st.floats(0, 0.5), end_ratio=st.floats(0, 1)),
    st.builds(ScheduleConfig, st.just("wsd"), st.floats(0, 0.4), st.none(), st.floats(0, 1), st.floats(0.01, 0.5)),
    st.builds(ScheduleConfig, st.just("wsd"), st.just(0.05), st.integers(0, 20), st.floats(0, 1), st.just(0.1)),
    st.builds(ScheduleConfig, st.just("wsd"), st.floats(0, 0.4), end_ratio=st.floats(0, 1), decay_steps=st.just(9)),
)


@settings(deadline=None)
@given(trunk=trunks, num_steps=st.integers(50, 3000), data=st.data(), end_ratio=st.none() | st.floats(0, 1))
def test_a_branch_has_the_trunks_rates_bit_for_bit_until_it_leaves_and_then_falls(
    trunk: ScheduleConfig, num_steps: int, data: st.DataObject, end_ratio: float | None
) -> None:
    on = multiplier(trunk, num_steps)
    plateau = [step for step in range(trunk.warmup(num_steps), num_steps) if on(step) == 1.0]
    step = 1 + data.draw(st.sampled_from(plateau))
    decay_steps = data.draw(st.integers(1, 500))
    branch = branch_schedule(trunk, num_steps, step, decay_steps, end_ratio)
    curve = multiplier(branch, step + decay_steps)
    assert [curve(s) for s in range(step)] == [on(s) for s in range(step)]
    end = trunk.end_ratio if end_ratio is None else end_ratio
    fall = [1.0 + (end - 1.0) * (done / decay_steps) for done in range(decay_steps + 1)]
    assert [curve(step + done) for done in range(decay_steps + 1)] == fall


def test_branches_of_one_trunk_differ_only_from_where_they_leave() -> None:
    trunk = ScheduleConfig(kind="constant", warmup_fraction=0.1)
    early, late = (multiplier(branch_schedule(trunk, 100, step, 20), step + 20) for step in (40, 70))
    assert [early(step) for step in range(41)] == [late(step) for step in range(41)]
    assert early(41) < late(41) == 1.0


@pytest.mark.parametrize(
    ("trunk", "step", "message"),
    [
        (ScheduleConfig("linear"), 50, r"schedule\.kind=linear falls from the end of its warm-up on"),
        (ScheduleConfig("cosine"), 50, r"schedule\.kind=cosine falls from the end of its warm-up on"),
        (ScheduleConfig("constant", 0.2), 19, "step 19 of the trunk is not on its plateau, which begins at step 20;"),
        (ScheduleConfig("wsd", decay_fraction=0.2), 82, "step 82 .* begins at step 5 and ends where its decay begins"),
        (ScheduleConfig("constant"), 101, "step 101 of the trunk is not on its plateau"),
    ],
)
def test_a_branch_leaves_a_trunk_at_its_peak_only(trunk: ScheduleConfig, step: int, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        branch_schedule(trunk, 100, step, 20)


def test_a_trunk_may_be_left_until_its_decay_begins() -> None:
    assert branch_schedule(ScheduleConfig("wsd", decay_fraction=0.2), 100, 81, 20).warmup_steps == 5
    assert branch_schedule(ScheduleConfig("constant", 0.2), 100, 20, 20).warmup_steps == 20
