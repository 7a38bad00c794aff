"""What pruning costs and loses, played on stored full curves: the product's own decisions, on real runs."""

from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.search.config import PRUNERS
from mutune.search.pruning import losers, stops
from tests.search.store_curves import STORED
from tests.soak import record

STEPS, COHORT = 240, 8


@cache
def curves() -> pd.DataFrame:
    return pd.read_csv(STORED)


def drawn(draw: int, trials: int) -> pd.DataFrame:
    """A study's random trials: different configurations, by one of the seeds."""
    rng = np.random.default_rng(draw)
    mine = curves()[curves().seed == draw % curves().seed.nunique()]
    return mine.iloc[rng.choice(len(mine), trials, replace=False)].reset_index(drop=True)


def report(row: Any, stop: int) -> float:
    """The smoothed loss at a stop; those are stored at twentieths, and a stop between two takes the one before it."""
    return float(row[f"s{stop - stop % (STEPS // 20)}"])


def played(pruner: str, trials: pd.DataFrame) -> tuple[float, float]:
    """Play a study: (held-out loss of what it chooses above that of the best of all, share of all steps made)."""
    cohorts: list[list[FrozenTrial]] = []
    made, best = 0, np.inf
    for first in range(0, len(trials), COHORT):
        rows = [trials.iloc[i] for i in range(first, min(first + COHORT, len(trials)))]
        alive, before = list(range(len(rows))), 0
        reports: list[dict[int, float]] = [{} for _ in rows]
        states = [TrialState.RUNNING] * len(rows)
        for stop in [*stops(pruner, STEPS), None]:
            made += len(alive) * ((stop or STEPS) - before)
            before = stop or STEPS
            if stop is None:
                best = min([best, *(float(rows[i].heldout) for i in alive if not rows[i].diverged)])
                for i in alive:
                    states[i] = TrialState.COMPLETE
                break
            for i in alive:
                if np.isnan(report(rows[i], stop)):
                    states[i] = TrialState.COMPLETE  # it has diverged by then, and is told so
                else:
                    reports[i][stop] = report(rows[i], stop)
            now = [_trial(first + i, reports[i], states[i], rows[i]) for i in range(len(rows))]
            gone = losers(pruner, STEPS, stop, [*cohorts, now])
            alive = [i for i in alive if first + i not in gone and stop in reports[i]]
            for number in gone:
                states[number - first] = TrialState.PRUNED
        cohorts.append([_trial(first + i, reports[i], states[i], rows[i]) for i in range(len(rows))])
    return best - float(trials.heldout[~trials.diverged].min()), made / len(trials) / STEPS


def _trial(number: int, reports: dict[int, float], state: TrialState, row: Any) -> FrozenTrial:
    value = float(row.heldout) if state == TrialState.COMPLETE else None
    trial = create_trial(state=state, value=value, intermediate_values=reports)
    trial.number = number
    return trial


def test_halving_keeps_what_a_full_search_would_have_found() -> None:
    found = np.array([played("halving", drawn(draw, 48)) for draw in range(60)])
    regret, share = found.mean(axis=0)
    assert share <= 0.45
    assert regret <= 0.003


def test_without_pruning_nothing_is_lost_and_nothing_saved() -> None:
    assert played("none", drawn(0, 48)) == (0.0, 1.0)


@pytest.mark.soak
def test_every_pruner_on_the_stored_curves() -> None:
    rows, means = [], {}
    for pruner in PRUNERS:
        for trials in (8, 16, 48):
            found = np.array([played(pruner, drawn(draw, trials)) for draw in range(200)])
            means[pruner, trials] = found.mean(axis=0)
            rows.append(
                {
                    "pruner": pruner,
                    "trials": trials,
                    "steps made": f"{found[:, 1].mean():.3f}",
                    "mean regret, nats": f"{found[:, 0].mean():.4f}",
                    "90 % of studies below": f"{np.quantile(found[:, 0], 0.9):.4f}",
                    "best kept": f"{(found[:, 0] == 0).mean():.2f}",
                }
            )
    record(
        "pruning",
        "Pruning played on 128 stored curves of `+sweep=proxy` (64 random configurations, 2 seeds), 200 draws each",
        rows,
    )
    assert all(regret >= 0 and 0 < share <= 1 for regret, share in means.values())
    assert means["halving", 48][0] <= 0.003  # of shorter studies the table says what they lose
    assert means["halving", 48][1] <= 0.45
    assert means["none", 48].tolist() == [0.0, 1.0]
