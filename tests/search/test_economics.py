"""What is read off a study: curvature within its interval, importance, and the regret that ends it."""

import math
from typing import Any

import numpy as np
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.search.config import Dimension
from mutune.search.economics import LEAST, MOST, importance, local_model
from mutune.search.proposals import distributions

SPACE = [Dimension("learning_rate", 2.0**-9, 2.0**-3), Dimension("init_std", 2.0**-6, 1.0)]


def study(count: int, seed: int, curvatures: tuple[float, float], noise: float = 0.005) -> list[FrozenTrial]:
    """Trials of a paraboloid with its lowest point at 2^-6 and 2^-3, drawn around it."""
    rng = np.random.default_rng(seed)
    trials = []
    for i in range(count):
        x = rng.uniform(-2, 2, 2)
        value = 3.0 + float(curvatures @ x**2) + noise * rng.normal()
        params = {"learning_rate": 2.0 ** (x[0] - 6), "init_std": 2.0 ** (x[1] - 3)}
        trials.append(made(i, params, value))
    return trials


def made(number: int, params: dict[str, Any], value: float, **facts: Any) -> FrozenTrial:
    trial = create_trial(
        state=TrialState.COMPLETE,
        params=params,
        distributions=distributions(SPACE),
        value=value,
        user_attrs={"diverged": False, **facts},
    )
    trial.number = number
    return trial


def test_the_curvature_s_interval_holds_the_truth() -> None:
    inside = 0
    for seed in range(60):
        local = local_model(SPACE, study(24, seed, (0.08, 0.01)))
        assert local is not None
        for name, truth in (("learning_rate", 0.08), ("init_std", 0.01)):
            low, _, high = local.curvature(name)
            inside += low <= truth <= high
    assert 0.8 <= inside / 120 <= 1.0


def test_a_flat_quantity_may_be_searched_further_than_a_sharp_one() -> None:
    local = local_model(SPACE, study(40, 0, (0.2, 0.002)))
    assert local is not None
    assert LEAST <= local.reach("learning_rate") < 0.5 * local.reach("init_std") <= MOST


@pytest.mark.parametrize(("count", "noise"), [(12, 0.005), (24, 0.005), (100, 0.005), (24, 0.02)])
def test_the_regret_is_what_it_turns_out_to_be_on_average(count: int, noise: float) -> None:
    expected, true = 0.0, 0.0
    for seed in range(40):
        trials = study(count, seed, (0.05, 0.05), noise)
        local = local_model(SPACE, trials)
        assert local is not None
        expected += local.regret
        best = min(trials, key=lambda trial: trial.value or 0.0).params
        x = math.log2(best["learning_rate"]) + 6, math.log2(best["init_std"]) + 3
        true += 0.05 * (x[0] ** 2 + x[1] ** 2)
    assert 0.7 * true < expected < 1.4 * true


def test_diverged_and_pruned_trials_and_too_few_say_nothing() -> None:
    trials = study(6, 0, (0.05, 0.05))
    for trial in trials[:2]:
        trial.user_attrs["diverged"] = True
    trials[2].state = TrialState.PRUNED
    assert local_model(SPACE, trials) is None
    assert importance(SPACE, trials) is None


def test_what_moves_the_loss_is_important() -> None:
    found = importance(SPACE, study(40, 0, (0.2, 0.002)))
    assert found is not None
    assert next(iter(found)) == "learning_rate"
    low, share, high = found["learning_rate"]
    assert low <= share <= high
    assert share > 0.7
    assert sum(middle for _, middle, _ in found.values()) == pytest.approx(1.0)
