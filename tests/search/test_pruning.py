"""Which trials go on: decided from reports alone, the same before and after an interruption."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.search.config import PRUNERS
from mutune.search.pruning import HALVING, OPTUNA, cost, losers, stops, words

STEPS = 240


def trial(number: int, reports: dict[int, float], state: TrialState = TrialState.RUNNING) -> FrozenTrial:
    value = 1.0 if state == TrialState.COMPLETE else None
    made = create_trial(state=state, value=value, intermediate_values=reports)
    made.number = number
    return made


def reported(values: Sequence[float], stop: int) -> list[FrozenTrial]:
    return [trial(i, {stop: value}) for i, value in enumerate(values)]


def test_every_pruner_of_the_configuration_exists() -> None:
    assert set(PRUNERS) == {*HALVING, *OPTUNA}


def test_stops_are_shares_of_the_run() -> None:
    assert stops("halving", STEPS) == [24, 120]
    assert stops("wide", STEPS) == [27, 80]
    assert stops("none", STEPS) == []
    assert stops("median", STEPS) == [24 * k for k in range(1, 10)]
    assert stops("halving", 3) == [2]  # 0.3 of a step is none
    assert stops("median", 1) == []


@given(st.lists(st.floats(0, 9), min_size=1, max_size=12))
def test_the_better_half_goes_on(values: list[float]) -> None:
    gone = losers("halving", STEPS, 24, [reported(values, 24)])
    assert len(gone) == len(values) // 2
    kept = [value for i, value in enumerate(values) if i not in gone]
    assert max(kept) <= min((values[i] for i in gone), default=math.inf)


def test_of_eight_four_and_then_two_go_on() -> None:
    cohort = reported([8, 7, 6, 5, 4, 3, 2, 1], 24)
    assert losers("halving", STEPS, 24, [cohort]) == [3, 2, 1, 0]
    for number, value in ((4, 1.0), (5, 2.0), (6, 3.0), (7, 4.0)):
        cohort[number] = trial(number, {24: 0.0, 120: value})
    assert losers("halving", STEPS, 120, [cohort]) == [6, 7]


def test_what_is_pruned_already_does_not_change_the_answer() -> None:
    cohort = reported([8, 7, 6, 5], 24)
    before = losers("halving", STEPS, 24, [cohort])
    cohort[0] = trial(0, {24: 8.0}, TrialState.PRUNED)  # killed half way through
    assert losers("halving", STEPS, 24, [cohort]) == before == [1, 0]


def test_a_trial_that_diverged_on_the_way_counts_as_one_that_does_not_go_on() -> None:
    cohort = [*reported([8, 7, 6], 24), trial(3, {}, TrialState.COMPLETE)]
    assert losers("halving", STEPS, 24, [cohort]) == [0]


@pytest.mark.parametrize("pruner", OPTUNA)
def test_optuna_s_pruners_answer_the_same_whenever_they_are_asked(pruner: str) -> None:
    curve = [{24 * k: value + 1 / k for k in range(1, 10)} for value in range(8)]
    over = [trial(i, reports, TrialState.COMPLETE) for i, reports in enumerate(curve)]
    cohort = [trial(8 + i, {24: float(i), 48: float(i)}) for i in range(8)]
    gone = losers(pruner, STEPS, 48, [over, cohort])
    assert gone == losers(pruner, STEPS, 48, [over, cohort])
    later = [trial(t.number, {**t.intermediate_values, 72: 0.0}) for t in cohort]
    assert losers(pruner, STEPS, 48, [over, later]) == gone  # what came after does not matter
    assert {8 + i for i in range(8)} > set(gone)
    assert 8 not in gone  # the best of all


def test_the_median_pruner_stops_what_is_worse_than_the_median_of_finished_trials() -> None:
    over = [trial(i, {24 * k: float(i) for k in range(1, 10)}, TrialState.COMPLETE) for i in range(8)]
    cohort = [trial(8, {24: 0.5}), trial(9, {24: 6.5})]
    assert losers("median", STEPS, 24, [over, cohort]) == [9]


@pytest.mark.parametrize("pruner", ["successive_halving", "hyperband"])
def test_all_have_reported_before_the_first_is_asked_about(pruner: str) -> None:
    values = [9.0, 6.01, 6.02, 6.03, 6.04, 6.05, 6.06, 6.07]
    gone = losers(pruner, 30, 3, [reported(values, 3)])
    assert pruner == "hyperband" or 0 in gone  # the worst; a bracket of Hyperband may not ask yet
    assert 1 not in gone
    turned = losers(pruner, 30, 3, [reported(values[::-1], 3)])
    assert pruner == "hyperband" or sorted(7 - n for n in turned) == sorted(gone)  # whatever their numbers


def test_what_a_study_costs_is_counted_as_it_is_pruned() -> None:
    assert cost("none", STEPS, 10, 8) == (10.0, 10)
    whole, finished = cost("halving", STEPS, 48, 8)
    assert (round(whole / 48, 3), finished) == (0.425, 12)
    assert cost("halving", STEPS, 3, 1) == (3.0, 3)  # nobody to lose against
    assert cost("halving", 1, 8, 8) == (8.0, 8)  # nowhere to stop
    assert words("halving", 1) == "halving: every trial runs to its end"
    assert words("halving", STEPS) == "halving: 0.5 go on after 24 steps, 0.5 go on after 120 steps"
