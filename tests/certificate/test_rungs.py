"""The rungs of a ladder: the study's run with one axis varied, as far as a budget goes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mutune.certificate.budget import DEFAULT_TRIALS, Timed, budget_of
from mutune.certificate.config import BudgetConfig, LadderConfig
from mutune.certificate.planned import Ladder, plan_ladder, words
from mutune.certificate.rungs import at, place, rung_name
from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.training.config import RunSpec, StageConfig
from mutune.training.price import price

PROXY = SweepConfig().spec()  # width 32, depth 4, 240 steps of 4 × 128 tokens
SMALL = replace(
    PROXY, model=PROXY.model.at_width(128), stages=(StageConfig(128, 16, 360), StageConfig(512, 4, 120))
)  # tokens 8×, batch 4×
UNSAID = BudgetConfig()


def planned(target: RunSpec = SMALL, proxy: RunSpec = PROXY, limits: BudgetConfig = UNSAID, **keys: Any) -> Ladder:
    return plan_ladder(proxy, target, LadderConfig(workers=2, **keys), limits, Path("x"), "cpu", "hash")


def names(ladder: Ladder) -> list[str]:
    return [rung_name(spec, ladder.rungs[0]) for spec in ladder.rungs]


def test_an_axis_is_varied_alone_and_its_ratios_are_kept() -> None:
    steps = replace(PROXY, schedule=replace(PROXY.schedule, warmup_steps=12))
    tokens, batch = at(steps, "tokens", 2), at(steps, "batch", 4)
    assert place(tokens) == place(PROXY) | {"tokens": 2 * place(PROXY)["tokens"]}
    assert place(batch) == place(PROXY) | {"batch": 4 * place(PROXY)["batch"]}
    assert (tokens.schedule.warmup(480), batch.schedule.warmup(60)) == (24, 3)
    assert place(at(PROXY, "depth", 8)) == place(PROXY) | {"depth": 8}
    assert place(at(PROXY, "width", 64)) == place(PROXY) | {"width": 64}
    assert at(PROXY, "width", 64).base == PROXY.base
    wide_ffn = replace(PROXY, model=replace(PROXY.model, ffn_width=128))
    assert at(wide_ffn, "width", 64).model.ffn == 256


@pytest.mark.parametrize(
    ("axis", "value", "sentence", "works"),
    [
        ("width", 40, "the study's head size of 16 does not divide 40; for example ladder.widths=[64,128].", 64),
        ("batch", 7, "ladder.batches=7: the study's 4 sequences and 240 steps give no whole batch", 3),
        ("batch", 0.3, "for example ladder.batches=[2]", 2),
        ("tokens", 0.001, "ladder.tokens=0.001 leaves 0 of the study's 240 steps; for example ladder.tokens=[2].", 0.1),
    ],
)  # fmt: skip
def test_a_rung_that_the_study_s_run_cannot_be_is_refused(axis: str, value: float, sentence: str, works: float) -> None:
    with pytest.raises(Refusal) as refused:
        at(PROXY, axis, value)
    assert sentence in str(refused.value)
    at(PROXY, axis, works)


def test_by_itself_a_ladder_measures_three_widths_and_the_tokens_within_what_112_trials_cost() -> None:
    ladder = planned()
    assert names(ladder)[0] == "w32"
    assert {"w64", "w128", "w32_t61440", "w32_t245760"} <= set(names(ladder))
    assert ladder.first.left_out == []
    cost = sum(price(ladder.rungs[run.rung]).flops for run in ladder.first.runs)
    assert cost < DEFAULT_TRIALS * price(PROXY).flops


def test_axes_without_a_distance_to_the_target_have_no_rungs() -> None:
    assert {name.partition("_")[2] for name in names(planned(replace(SMALL, stages=PROXY.stages)))} == {""}
    assert names(planned(PROXY)) == ["w32", "w64"]  # the target is the proxy; one rung more makes a ladder


def test_listed_rungs_are_the_ladder_s_and_axes_follow_from_them() -> None:
    assert names(planned(widths=[48])) == ["w32", "w48"]
    assert names(planned(tokens=[2], batches=[2, 4])) == ["w32", "w32_t245760", "w32_b1024", "w32_b2048"]
    assert names(planned(depths=[8])) == ["w32", "w32_d8"]
    assert set(names(planned(axes=["width", "tokens"], widths=[48]))) > {"w32", "w48"}
    huge = planned(widths=[1024])
    assert huge.first.left_out == []  # without a budget, what is listed is run


def test_a_larger_budget_reaches_further_and_a_small_one_names_one_that_would_do() -> None:
    few = planned(limits=BudgetConfig(0.3))
    assert set(names(few)) < set(names(planned(limits=BudgetConfig(3.0))))
    with pytest.raises(Refusal, match=r"^budget_fraction=0.001 has no room for the first runs of two rungs") as refused:
        planned(limits=BudgetConfig(0.001))
    works = float(str(refused.value).rpartition("=")[2].rstrip("."))
    assert len(planned(limits=BudgetConfig(works)).rungs) > 1


def test_a_budget_that_pays_for_it_reaches_as_near_the_target_as_a_verdict_asks() -> None:
    far = replace(SMALL, stages=(StageConfig(128, 16, 240 * 16),))  # tokens 64 times the proxy's
    reached = max(place(spec)["tokens"] for spec in planned(far, limits=BudgetConfig(budget_fraction=3.0)).rungs)
    assert place(far)["tokens"] / reached == 4  # two doublings
    short = max(place(spec)["tokens"] for spec in planned(far, limits=BudgetConfig(budget_fraction=0.03)).rungs)
    assert short < reached


def test_minutes_count_by_what_the_study_s_trials_took() -> None:
    def rungs(seconds: float) -> int:
        config = BudgetConfig(budget_minutes=4.0)
        budget = budget_of(config, PROXY, SMALL, 2, [Timed(PROXY, seconds)], 0.0)
        return round(1 / float(budget.shares([PROXY], [])[0]))

    assert rungs(5.0) == round(4 * 60 * 2 * 0.85 / 5)
    assert rungs(10.0) == round(rungs(5.0) / 2)


def test_speeds_are_measured_again_as_runs_finish() -> None:
    budget = budget_of(BudgetConfig(budget_minutes=1.0), PROXY, SMALL, 1, [Timed(PROXY, 5.0)], 0.0)
    wide = at(PROXY, "width", 128)
    guessed = float(budget.shares([wide], [])[0])
    known = float(budget.shares([wide], [Timed(wide, 10.2)])[0])
    assert guessed > known == pytest.approx(10.2 / 51)
    assert budget.left([Timed(wide, 10.2)]) == pytest.approx(1 - 10.2 / 51)


def test_a_grid_is_every_rung_at_every_offset_and_seed() -> None:
    ladder = planned(widths=[48, 64], offsets=[-1, 0, 1])
    runs = [ladder.run(run) for run in ladder.first.runs]
    assert len(runs) == 3 * 3 * 2
    rates = sorted({run.spec.hyperparameters.learning_rate for run in runs})
    assert rates == [PROXY.hyperparameters.learning_rate * 2.0**k for k in (-1, 0, 1)]
    assert len({run.directory for run in runs}) == len({run.fingerprint for run in runs}) == len(runs)


def test_a_grid_rung_that_the_budget_has_no_room_for_is_left_out() -> None:
    ladder = planned(widths=[64, 512], offsets=[-1, 0, 1], limits=BudgetConfig(1.0))
    assert [names(ladder)[rung] for rung in ladder.first.left_out] == ["w512"]
    assert any("w512" in line and "left out" in line for line in words(ladder))


CONFIGS = [
    ({"axes": []}, "ladder.axes=[] is empty; for example ladder=[width,tokens]"),
    ({"axes": ["hieght"]}, "has an unknown axis; known axes: width, tokens, batch, depth"),
    ({"axes": ["width", "width"]}, "repeats an axis"),
    ({"axes": ["width"], "tokens": [2]}, "lists rungs of an axis that ladder.axes=['width'] leaves out"),
    ({"tokens": [0]}, "ladder.tokens=0 must be a finite number above 0"),
    ({"tokens": []}, "ladder.tokens=[] is empty"),
    ({"widths": [64, 64]}, "ladder.widths=[64, 64] repeats a rung"),
    ({"offsets": [0, 1]}, "must hold at least three distinct offsets"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "sentence"), CONFIGS, ids=[str(keys) for keys, _ in CONFIGS])
def test_a_ladder_s_keys_are_checked(keys: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        LadderConfig(**keys)
    assert sentence in str(refused.value)
    LadderConfig(axes=["width", "tokens"], widths=[64], tokens=[0.5, 2])


@pytest.mark.parametrize(("key", "value", "works"), [("budget_fraction", 0, 0.1), ("budget_minutes", -1, 4)])
def test_a_budget_is_above_0(key: str, value: float, works: float) -> None:
    with pytest.raises(Refusal, match=rf"^{key}={value} must be a finite number above 0; for example {key}={works}\.$"):
        BudgetConfig(**{key: value})
