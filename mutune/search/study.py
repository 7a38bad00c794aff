"""A study: trials proposed in cohorts, run by worker processes, kept in an Optuna storage. It survives kill -9.

Any number of parent processes, on one host or on many, run it together: each takes the trials that nobody holds
(`claims`), and only one at a time decides which come next. Only parents touch the storage; a trial is in it with all
its parameters or not at all. The trials of a cohort run to a stop, wait for each other, and go on or are pruned
(`pruning`). Trials that were running when a parent died go on from their checkpoints, by whoever takes them, under the
same number with the same parameters.
"""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from mutune.errors import Refusal
from mutune.model.shape import base_config
from mutune.parametrization.hyperparameters import NAMES
from mutune.search.claims import Claims, members, turn
from mutune.search.config import SCHEDULE, Dimension, SearchConfig, dimensions, grid, initial_points
from mutune.search.economics import local_model
from mutune.search.proposals import distributions, propose, total_trials
from mutune.search.pruning import losers, stops
from mutune.search.storage import TRIALS, open_study, patiently, read_study
from mutune.search.trial import Trial, trial_spec
from mutune.search.workers import POLL_SECONDS, RunAll
from mutune.training.config import RunSpec
from mutune.training.result import RunResult, discard

TOTAL = "n_trials"  # the user attribute of a study that tells how many it was last asked for
#: What `parametrization.decay=horizon` does not read and what it does; every other decay has it the other way round.
DECAY_NAMES = ("weight_decay", "decay_timescale")


@dataclass(frozen=True)
class Progress:
    """Where a study stands; handed to whoever draws the progress line. `running` are this process's own trials, and
    `others` the processes that run it too.
    """

    name: str
    done: int
    total: int
    running: list[int]
    best: FrozenTrial | None
    seconds_left: float
    pruned: int = 0
    others: tuple[str, ...] = ()


def check_space(spec: RunSpec, search: SearchConfig) -> list[Dimension]:
    """The searched quantities, each value of the listed ones tried against the run they would make.

    Raises:
        Refusal: an empty space, a value that no run can have, or a known-good one outside its range.
    """
    space = dimensions(search.space)
    if not space:
        raise Refusal("search.space={} is empty; choose a sweep, for example +sweep=proxy.")
    decay = spec.parametrization.decay
    unread, read = DECAY_NAMES if decay == "horizon" else reversed(DECAY_NAMES)
    for dimension in space:
        if dimension.name == unread:
            raise Refusal(
                f"search.space.{unread} is not read by parametrization.decay={decay}, which has {read} in its place; "
                f"search that instead, for example search.space.{read}={{low: 0.01, high: 1.0}}."
            )
        for value in dimension.values or (dimension.low, dimension.high):
            _try(spec, {dimension.name: value})
    listed = [dimension for dimension in space if dimension.name in SCHEDULE]
    for values in itertools.product(*(dimension.values for dimension in listed)):
        _try(spec, dict(zip([dimension.name for dimension in listed], values, strict=True)))
    if search.stop_regret is not None and all(dimension.values for dimension in space):
        raise Refusal(
            f"search.stop_regret={search.stop_regret:g} needs a range in search.space, and all of it are lists; for "
            "example search.stop_regret=null."
        )
    if spec.base != base_config(spec.model):
        raise Refusal("the base of a study is its own model; set model.width instead of base.width.")
    total_trials(search, space)
    initial_points(search, space)
    return space


def _try(spec: RunSpec, params: dict[str, Any]) -> None:
    """Refuse values that no run can have together, by the names that the space has for them."""
    try:
        trial_spec(spec, params)
    except Refusal as refusal:
        values = " with ".join(f"search.space.{name}={value}" for name, value in params.items())
        raise Refusal(f"{values} cannot be run ({str(refusal).rstrip('.')}); take such values out.") from refusal


def base_values(spec: RunSpec) -> dict[str, Any]:
    """The configured value of everything that can be searched; ε is the table's own where none is given."""
    values = {"width": spec.model.width, "table": spec.parametrization.table, "seed": spec.seed}
    values |= {name: getattr(spec.schedule, key) for name, key in SCHEDULE.items()}
    values |= {name: getattr(spec.hyperparameters, name) for name in NAMES}
    if spec.hyperparameters.adam_eps is None:
        values["adam_eps"] = spec.parametrization.theory().adam_eps
    return values


def run_study(
    directory: Path,
    name: str,
    search: SearchConfig,
    run: RunAll[Trial, RunResult],
    *,
    base: dict[str, Any],
    num_steps: int | None = None,
    mark: str = "",
    report: Callable[[Progress], None],
) -> list[FrozenTrial]:
    """Run the study until `n_trials` are finished; continue it where it stands.

    Args:
        directory: the study's folder, which is claimed.
        search: what is searched and how.
        run: runs trials, as `Workers.run` does.
        base: the configured value of everything that can be searched; `seed` seeds the proposals too.
        mark: of its inputs, kept in the storage.
        num_steps: of a trial; None where trials cannot pause, so that none is pruned.
        report: called at every change and about once a second.

    Returns:
        Every trial of the study, in the order of their numbers.
    """
    space = dimensions(search.space)
    total, mine = total_trials(search, space), turn(directory)
    with mine:
        study = patiently(lambda: open_study(directory, name, search.storage, mark))
        patiently(lambda: study.set_user_attr(TOTAL, total))
        (directory / TRIALS).mkdir(exist_ok=True)

    def told(running: list[int]) -> None:
        report(_progress(study, search, space, running, tuple(members(directory))))

    with Claims() as claims:
        while True:
            with mine:
                trials = patiently(lambda: study.get_trials(deepcopy=False))
                over = all(t.state.is_finished() for t in trials)  # what has begun is finished, whatever the total
                if over and (len(trials) >= total or _is_settled(search, space, trials)):
                    told([])
                    return trials
                known = patiently(lambda: _add_cohort(study, search, space, base))
            for stop in [*(stops(search.prunes, num_steps) if num_steps else []), None]:
                _run_to(stop, study, known, directory, run, claims, told)
                if stop is not None and num_steps is not None:
                    with mine:
                        patiently(partial(_prune, study, search, num_steps, stop, directory))


def _run_to(
    stop: int | None,
    study: optuna.Study,
    known: int,
    directory: Path,
    run: RunAll[Trial, RunResult],
    claims: Claims,
    told: Callable[[list[int]], None],
) -> None:
    """Run what is open of the first `known` trials up to `stop`, and wait for those that other processes hold."""

    def units() -> list[Trial]:
        trials = patiently(lambda: study.get_trials(deepcopy=False))[:known]
        due = [t for t in trials if not t.state.is_finished() and stop not in t.intermediate_values]
        return [Trial(t.number, t.params, _folder(directory, t.number), study.study_name, stop) for t in due]

    while due := units():
        done = 0
        for trial, result in run(
            claims.of(due, lambda trial: trial in units()), lambda running: told([t.number for t in running])
        ):
            patiently(partial(_tell, study, trial, result))
            claims.release(trial.directory)
            done += 1
        if not done:
            told([])
            time.sleep(POLL_SECONDS)


def _is_settled(search: SearchConfig, space: list[Dimension], trials: list[FrozenTrial]) -> bool:
    """Whether, at the end of a cohort, more trials are expected to bring less than `stop_regret`."""
    if search.stop_regret is None or len(trials) % search.cohort != 0:
        return False
    local = local_model(space, trials)
    return local is not None and local.regret < search.stop_regret


def _folder(directory: Path, number: int) -> Path:
    return directory / TRIALS / str(number)


def finished_trials(directory: Path, name: str, storage: str) -> list[tuple[FrozenTrial, RunResult]]:
    """The study's finished trials with their results, read only; none where the storage is gone or cannot be read: a
    ladder then runs what it could have reused.
    """
    if (study := read_study(directory, name, storage)) is None:
        return []
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [(trial, result_of(trial)) for trial in trials if trial.value is not None]


def result_of(trial: FrozenTrial) -> RunResult:
    """What a finished trial's run said, but for its steps."""
    told = trial.user_attrs
    return RunResult(float(trial.value or 0.0), told["diverged"], told["bits_per_byte"], 0, told["seconds"])


def best_trial(trials: list[FrozenTrial]) -> FrozenTrial | None:
    """The finished trial with the lowest held-out loss; diverged runs cannot win, the lower rate breaks a tie."""
    return next(iter(finished_by_loss(trials)), None)


def finished_by_loss(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """The trials that can win, the best first."""
    finished = [t for t in trials if t.state == TrialState.COMPLETE and not t.user_attrs["diverged"]]
    return sorted(finished, key=lambda t: (t.value or 0.0, t.params.get("learning_rate", 0.0)))


def _add_cohort(
    study: optuna.Study,
    search: SearchConfig,
    space: list[Dimension],
    base: dict[str, Any],
) -> int:
    """Put the trials that the open cohort still lacks into the storage, each in one transaction.

    Returns:
        How many trials there are then.
    """
    trials = study.get_trials(deepcopy=False)
    first = len(trials) - len(trials) % search.cohort
    if any(not t.state.is_finished() for t in trials[:first]):
        return len(trials)  # an earlier cohort is still open
    added = propose(search, space, base, base["seed"], trials[:first])[len(trials) - first :]
    for params in added:
        study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=distributions(space)))
    return len(trials) + len(added)


def _tell(study: optuna.Study, trial: Trial, result: RunResult) -> None:
    """Store what a trial says; one that paused reports, at its stop."""
    stored = study.get_trials(deepcopy=False)[trial.number]
    if stored.state.is_finished():
        return  # told before the storage went away
    told = optuna.trial.Trial(study, stored._trial_id)
    for key in ("diverged", "bits_per_byte", "seconds"):
        told.set_user_attr(key, getattr(result, key))
    if result.finished:
        study.tell(told, result.value, skip_if_finished=True)
        discard(trial.directory)
    else:
        assert trial.until is not None
        told.report(result.value, trial.until)


def _prune(study: optuna.Study, search: SearchConfig, num_steps: int, stop: int, directory: Path) -> None:
    """Stop the trials of the open cohort that do not go on after `stop`, unless another process has come further."""
    trials = study.get_trials(deepcopy=False)
    cohorts = [trials[i : i + search.cohort] for i in range(0, len(trials), search.cohort)]
    waiting = [t for t in cohorts[-1] if not t.state.is_finished()]
    if any(stop not in t.intermediate_values or max(t.intermediate_values) > stop for t in waiting):
        return
    for number in losers(search.prunes, num_steps, stop, cohorts):
        if not trials[number].state.is_finished():
            pruned = optuna.trial.Trial(study, trials[number]._trial_id)
            study.tell(pruned, state=TrialState.PRUNED, skip_if_finished=True)
        discard(_folder(directory, number))


def _progress(
    study: optuna.Study, search: SearchConfig, space: list[Dimension], running: list[int], others: tuple[str, ...]
) -> Progress:
    trials, total = patiently(lambda: study.get_trials(deepcopy=False)), total_trials(search, space)
    finished = [t for t in trials if t.state.is_finished()]
    points = grid(space) if search.sampler == "grid" else [{}] * total
    left = _seconds_left(finished, points) if finished else 0.0
    pruned = sum(t.state == TrialState.PRUNED for t in finished)
    return Progress(study.study_name, len(finished), total, running, best_trial(trials), left, pruned, others)


def _seconds_left(finished: list[FrozenTrial], points: list[dict[str, Any]]) -> float:
    """Worker-seconds of the trials still to do: each as long as the mean of its width, or as the mean of all."""
    seconds: dict[Any, list[float]] = defaultdict(list)
    for trial in finished:
        for key in (trial.params.get("width"), "all"):
            seconds[key].append(trial.user_attrs["seconds"])
    done = {trial.number for trial in finished}
    open_widths = [point.get("width") for number, point in enumerate(points) if number not in done]
    return sum(fmean(seconds.get(width) or seconds["all"]) for width in open_widths)
