"""Proposals as a pure function: (seed, space, finished trials, cohort) → parameters.

A cohort is proposed at a barrier, when every trial of the earlier cohorts is finished, and seeded by its number. So
an interrupted study proposes what an undisturbed one would have.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from mutune.errors import Refusal
from mutune.search.config import Dimension, SearchConfig, grid, initial_points

optuna.logging.set_verbosity(optuna.logging.WARNING)  # the sweep has its own progress line


def distributions(space: Sequence[Dimension]) -> dict[str, BaseDistribution]:
    """The space in Optuna's terms."""
    return {
        d.name: CategoricalDistribution(d.values) if d.values else FloatDistribution(d.low, d.high, log=d.log)  # type: ignore[arg-type]
        for d in space
    }


def total_trials(search: SearchConfig, space: Sequence[Dimension]) -> int:
    """Number of trials of the whole study."""
    if search.sampler == "grid":
        return len(grid(list(space)))
    if search.n_trials is None:
        raise Refusal("search.n_trials=null is for search.sampler=grid only; for example search.n_trials=32.")
    return search.n_trials


def propose(
    search: SearchConfig,
    space: Sequence[Dimension],
    defaults: dict[str, Any],
    seed: int,
    finished: Sequence[FrozenTrial],
) -> list[dict[str, Any]]:
    """Parameters of the next cohort.

    Args:
        search: sampler and cohort size.
        space: the searched quantities.
        defaults: their configured base values, for what `search.initial` leaves out; one that lies outside its range
            is left to the sampler.
        seed: the study's seed.
        finished: every earlier trial, in the order of their numbers, all of them finished.

    Returns:
        One dict a trial, for the trial numbers `len(finished)` onwards.
    """
    first = len(finished)
    numbers = range(first, min(first - first % search.cohort + search.cohort, total_trials(search, space)))
    if search.sampler == "grid":
        points = grid(list(space))
        return [points[number] for number in numbers]
    study = optuna.create_study(study_name="proposals", sampler=optuna.samplers.RandomSampler(seed=0))
    study.add_trials(finished)
    inside = {d.name: defaults[d.name] for d in space if d.name in defaults and d.contains(defaults[d.name])}
    known = [{**inside, **point} for point in initial_points(search, list(space))]
    return [_propose_one(study, search, space, known, seed, number) for number in numbers]


def _propose_one(
    study: optuna.Study,
    search: SearchConfig,
    space: Sequence[Dimension],
    known: list[dict[str, Any]],
    seed: int,
    number: int,
) -> dict[str, Any]:
    study.sampler = _sampler(search, _seed_of(seed, number))
    if number < len(known):
        study.enqueue_trial(known[number])
    elif search.sampler == "qmc":
        study.enqueue_trial(_sobol(space, seed, number))
    trial = study.ask(fixed_distributions=distributions(space))
    assert trial.number == number, (trial.number, number)
    return dict(trial.params)


def _sampler(search: SearchConfig, seed: int) -> optuna.samplers.BaseSampler:
    if search.sampler in ("random", "qmc"):
        return optuna.samplers.RandomSampler(seed=seed)
    if search.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=search.n_startup_trials)
    return optuna.samplers.TPESampler(
        seed=seed, n_startup_trials=search.n_startup_trials, multivariate=True, constant_liar=True
    )


def _sobol(space: Sequence[Dimension], seed: int, number: int) -> dict[str, Any]:
    """Point `number` of the study's scrambled Sobol sequence; Optuna's own keeps its place in the storage."""
    from scipy.stats import qmc  # half a second that no other sampler has to wait for

    engine = qmc.Sobol(len(space), seed=_seed_of(seed, -1))
    if number:  # scipy refuses to go forward by none
        engine.fast_forward(number)
    return {d.name: _at(d, float(share)) for d, share in zip(space, engine.random(1)[0], strict=True)}


def _at(dimension: Dimension, share: float) -> Any:
    """The value at this share, in [0, 1), of a dimension."""
    if dimension.values:
        return dimension.values[int(share * len(dimension.values))]
    low, high = float(dimension.low or 0.0), float(dimension.high or 0.0)
    return low * (high / low) ** share if dimension.log else low + share * (high - low)


def _seed_of(seed: int, number: int) -> int:
    digest = hashlib.blake2b(f"proposal\0{seed}\0{number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
