"""Proposals are a pure function of the seed and of the finished trials."""

import itertools
import math
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.search.config import SearchConfig, dimensions, grid, initial_points
from mutune.search.proposals import distributions, propose, total_trials
from mutune.search.study import base_values

SPACE = {"learning_rate": {"low": 0.001, "high": 0.1}, "init_std": {"low": 0.01, "high": 0.3}}
DEFAULTS = {"learning_rate": 0.015, "init_std": 0.08}


def search(sampler: str, **settings: Any) -> SearchConfig:
    return SearchConfig(sampler=sampler, n_trials=24, n_startup_trials=8, cohort=8, space=SPACE, **settings)


def finished(config: SearchConfig, points: list[dict[str, Any]], first: int) -> list[FrozenTrial]:
    space = distributions(dimensions(config.space))
    trials = []
    for i, params in enumerate(points):
        value = abs(params["learning_rate"] - 0.02) + params["init_std"] ** 2
        trial = create_trial(state=TrialState.COMPLETE, params=params, distributions=space, value=value)
        trial.number = first + i
        trials.append(trial)
    return trials


def whole_study(config: SearchConfig, seed: int) -> list[dict[str, Any]]:
    trials: list[FrozenTrial] = []
    while len(trials) < total_trials(config, dimensions(config.space)):
        trials += finished(config, propose(config, dimensions(config.space), DEFAULTS, seed, trials), len(trials))
    return [trial.params for trial in trials]


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_the_same_results_give_the_same_proposals(sampler: str) -> None:
    assert whole_study(search(sampler), seed=3) == whole_study(search(sampler), seed=3)
    assert whole_study(search(sampler), seed=3) != whole_study(search(sampler), seed=4)


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe"])
def test_no_proposal_is_made_twice(sampler: str) -> None:
    points = [tuple(point.values()) for point in whole_study(search(sampler), seed=0)]
    assert len(set(points)) == len(points) == 24


def test_the_points_of_qmc_fill_the_space_more_evenly_than_random_ones() -> None:
    gaps = {"qmc": 0.0, "random": 0.0}
    for sampler in gaps:
        for seed in range(5):
            rates = sorted(math.log2(point["learning_rate"]) for point in whole_study(search(sampler), seed))
            gaps[sampler] += max(b - a for a, b in itertools.pairwise(rates))
    assert gaps["qmc"] < 0.7 * gaps["random"]


def test_tpe_uses_what_the_earlier_cohorts_found() -> None:
    means = []
    for sampler in ("tpe", "random"):
        config = SearchConfig(sampler=sampler, n_trials=64, n_startup_trials=16, cohort=8, space=SPACE)
        late = whole_study(config, seed=0)[32:]
        means.append(sum(abs(p["learning_rate"] - 0.02) + p["init_std"] ** 2 for p in late) / len(late))
    assert means[0] < 0.8 * means[1]


def test_known_good_values_go_first_and_take_the_base_value_for_what_they_leave_out() -> None:
    points = whole_study(search("tpe", initial=[{"learning_rate": 0.05}, {"init_std": 0.2}]), seed=0)
    assert points[0] == {"learning_rate": 0.05, "init_std": 0.08}
    assert points[1] == {"learning_rate": 0.015, "init_std": 0.2}


def test_a_base_value_outside_its_range_is_left_to_the_sampler() -> None:
    space = {"learning_rate": {"low": 0.001, "high": 0.1}, "init_std": {"low": 0.1, "high": 0.3}}
    config = SearchConfig(sampler="tpe", n_trials=8, space=space, initial=[{"learning_rate": 0.05}])
    point = propose(config, dimensions(space), DEFAULTS, 0, [])[0]  # the base's init_std is 0.08
    assert point["learning_rate"] == 0.05
    assert 0.1 <= point["init_std"] <= 0.3


def test_a_grid_is_every_combination_once() -> None:
    space = {"width": {"values": [64, 32]}, "learning_rate": {"values": [0.01, 0.02]}, "seed": {"values": [0, 1, 2]}}
    config = SearchConfig(sampler="grid", cohort=5, space=space)
    points = grid(dimensions(space))
    assert len(points) == total_trials(config, dimensions(space)) == 12
    assert len({tuple(point.values()) for point in points}) == 12
    assert points[0] == {"width": 64, "learning_rate": 0.01, "seed": 0}
    assert propose(config, dimensions(space), {}, 0, []) == points[:5]


def test_the_last_cohort_stops_at_the_total() -> None:
    config = SearchConfig(sampler="random", n_trials=10, cohort=8, space=SPACE)
    trials = finished(config, propose(config, dimensions(SPACE), DEFAULTS, 0, []), 0)
    assert len(trials) == 8
    assert len(propose(config, dimensions(SPACE), DEFAULTS, 0, trials)) == 2


def test_raising_the_total_in_mid_cohort_proposes_the_same_trials() -> None:
    short = SearchConfig(sampler="tpe", n_trials=10, cohort=8, space=SPACE)
    long = SearchConfig(sampler="tpe", n_trials=16, cohort=8, space=SPACE)
    trials = finished(short, propose(short, dimensions(SPACE), DEFAULTS, 0, []), 0)
    few, many = (propose(c, dimensions(SPACE), DEFAULTS, 0, trials) for c in (short, long))
    assert many[: len(few)] == few


@given(low=st.floats(1e-6, 1.0), factor=st.floats(1.01, 1e3), seed=st.integers(0, 2**31 - 1))
@settings(max_examples=25, deadline=None)
def test_proposals_stay_within_their_range(low: float, factor: float, seed: int) -> None:
    space = {"learning_rate": {"low": low, "high": low * factor}}
    config = SearchConfig(sampler="random", n_trials=8, space=space)
    for point in propose(config, dimensions(space), {"learning_rate": low}, seed, []):
        assert low <= point["learning_rate"] <= low * factor


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"widht": {"values": [1]}}, "search.space.widht is unknown; what can be searched: learning_rate, "),
        ({"learning_rate": {"low": 0.1, "high": 0.01}}, "search.space.learning_rate is empty: low=0.1 is not below"),
        ({"learning_rate": {"low": 0.1, "high": 0.1}}, "is empty"),
        ({"learning_rate": {"low": -0.1, "high": 0.1}}, "search.space.learning_rate.low=-0.1 must be a finite number"),
        ({"weight_decay": {"low": 0.0, "high": 0.1}}, "must be above 0 on a log scale"),
        ({"learning_rate": {"low": "abc", "high": 1}}, "search.space.learning_rate.low=abc must be a number"),
        ({"learning_rate": {"low": 0.1}}, "search.space.learning_rate.high is missing"),
        ({"learning_rate": {"low": 0.1, "high": 1, "logg": True}}, "unknown key search.space.learning_rate.logg"),
        ({"learning_rate": {"values": []}}, "values=\\[\\] is empty"),
        ({"learning_rate": {"values": [0.1, 0.1]}}, "repeats a value"),
        ({"width": {"low": 16, "high": 64}}, "search.space.width must list its values"),
        ({"learning_rate": 3}, "search.space.learning_rate=3 must be a range"),
        ({"seed": {"values": [[1]]}}, "search.space.seed.values\\[0\\]=\\[1\\] must be a whole number"),
        ({"seed": {"values": [0, 0.5]}}, "search.space.seed.values\\[1\\]=0.5 must be a whole number"),
        ({"seed": {"values": [True]}}, "search.space.seed.values\\[0\\]=True must be a whole number"),
        ({"width": {"values": [16, float("nan")]}}, "search.space.width.values\\[1\\]=nan must be a whole number"),
        ({"width": {"values": [16, 16.0]}}, "repeats a value"),
        ({"table": {"values": [1]}}, "search.space.table.values\\[0\\]=1 must be a word"),
        ({"learning_rate": {"values": [0.1, True]}}, "values\\[1\\]=True must be a number"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        dimensions(space)


def test_whole_numbers_stay_whole_however_they_are_written() -> None:
    (width,) = dimensions({"width": {"values": [16.0, 32]}})
    assert [type(value) for value in width.values] == [int, int]


INITIAL = [
    ({"learning_rate": "foo"}, r"search\.initial\[1\]\.learning_rate=foo must be a number"),
    ({"learning_rate": -1}, r"search\.initial\[1\]\.learning_rate=-1\.0 must be a finite number above 0"),
    (
        {"learning_rate": 0.5},
        r"search\.initial\[1\]\.learning_rate=0\.5 lies outside search\.space\.learning_rate \(0\.001 … 0\.1\)",
    ),
    ({"width": 48}, r"search\.initial\[1\]\.width=48 lies outside search\.space\.width \(\[32, 64\]\)"),
    ({"width": [32]}, r"search\.initial\[1\]\.width=\[32\] must be a whole number"),
]


@pytest.mark.parametrize(("point", "message"), INITIAL)
def test_a_known_good_value_that_cannot_be_tried_is_refused(point: dict[str, Any], message: str) -> None:
    space = {"learning_rate": {"low": 0.001, "high": 0.1}, "width": {"values": [32, 64]}}
    config = SearchConfig(n_trials=8, space=space, initial=[{"learning_rate": "1e-2"}, point])
    with pytest.raises(Refusal, match=message):
        initial_points(config, dimensions(space))


def test_a_grid_has_neither_a_number_of_trials_nor_known_good_values() -> None:
    space = {"learning_rate": {"values": [0.01, 0.02]}}
    with pytest.raises(Refusal, match=r"search\.n_trials=3 is not read by search\.sampler=grid.*search\.n_trials=null"):
        SearchConfig(sampler="grid", space=space, n_trials=3)
    with pytest.raises(Refusal, match=r"search\.initial=.* is not read .*search\.initial=\[\]"):
        SearchConfig(sampler="grid", space=space, initial=[{"learning_rate": 0.01}])


def test_the_base_value_of_epsilon_is_the_tables_own() -> None:
    assert base_values(SweepConfig().spec())["adam_eps"] == 1e-12


def test_optuna_is_never_asked_by_the_stored_study(tmp_path: Any) -> None:
    from mutune.search.storage import open_study

    study = open_study(tmp_path, "s")
    study.add_trial(create_trial(state=TrialState.RUNNING, params={}, distributions={}))
    assert [t.state for t in study.trials] == [TrialState.RUNNING]
    assert isinstance(study.sampler, optuna.samplers.RandomSampler)
