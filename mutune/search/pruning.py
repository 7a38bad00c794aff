"""Which trials of a cohort go on: decided at a barrier, when all of them have come so far.

All trials see the same batches, at the same share of the full-length schedule, so that their smoothed losses compare.
A trial that waits is paused, not restarted. The order in mid-schedule misleads about the best, which is why many go on
and only finished decays can win; what the policies cost and lose is in benchmarks/pruning.md.
"""

import math
from collections.abc import Callable, Sequence

import optuna
from optuna.trial import FrozenTrial, TrialState

#: Synchronous halving: (share of the run, share of the trials there that go on).
HALVING: dict[str, tuple[tuple[float, float], ...]] = {
    "halving": ((0.1, 1 / 2), (0.5, 1 / 2)),
    "wide": ((1 / 9, 1 / 3), (1 / 3, 1 / 3)),
    "none": (),
}
#: Optuna's own: steps of a tenth of the run, steps of the whole → pruner. Each trial is asked for at every tenth.
OPTUNA: dict[str, Callable[[int, int], optuna.pruners.BasePruner]] = {
    "median": lambda tenth, whole: optuna.pruners.MedianPruner(),
    "percentile": lambda tenth, whole: optuna.pruners.PercentilePruner(25.0),
    "successive_halving": lambda tenth, whole: optuna.pruners.SuccessiveHalvingPruner(tenth),
    "hyperband": lambda tenth, whole: optuna.pruners.HyperbandPruner(tenth, whole),
}


def stops(pruner: str, num_steps: int) -> list[int]:
    """The steps of a run of `num_steps` after which trials wait for each other."""
    shares = [share for share, _ in HALVING[pruner]] if pruner in HALVING else [k / 10 for k in range(1, 10)]
    return sorted({step for share in shares if 0 < (step := round(share * num_steps)) < num_steps})


def cost(pruner: str, num_steps: int, total: int, cohort: int) -> tuple[float, int]:
    """(whole runs' worth of steps, trials that come to their end) of `total` trials.

    Nothing is known beforehand of what Optuna's pruners stop, so that they count as `none`.
    """
    steps, finished = 0, 0
    for first in range(0, total, cohort):
        alive, before = min(cohort, total - first), 0
        for at, share in _halvings(pruner, num_steps):
            steps, alive, before = steps + alive * (at - before), math.ceil(share * alive - 1e-9), at
        steps, finished = steps + alive * (num_steps - before), finished + alive
    return steps / num_steps, finished


def _halvings(pruner: str, num_steps: int) -> list[tuple[int, float]]:
    """(step, share that goes on) of synchronous halving in a run of so many steps."""
    known = stops(pruner, num_steps) if pruner in HALVING else []
    return [(step, share) for at, share in HALVING.get(pruner, ()) if (step := round(at * num_steps)) in known]


def words(pruner: str, num_steps: int) -> str:
    """What the pruner does to trials of so many steps."""
    if pruner not in HALVING:
        return f"Optuna's {pruner}, after {', '.join(map(str, stops(pruner, num_steps))) or 'no'} steps"
    after = [f"{share:.2g} go on after {step} steps" for step, share in _halvings(pruner, num_steps)]
    return f"{pruner}: {', '.join(after) or 'every trial runs to its end'}"


def losers(pruner: str, num_steps: int, stop: int, cohorts: Sequence[Sequence[FrozenTrial]]) -> list[int]:
    """Numbers of the trials of the last cohort that do not go on after `stop`; the same whenever it is asked.

    Args:
        cohorts: all trials, whatever became of them, by cohort; those of the last that wait have reported at `stop`.
    """
    if pruner in OPTUNA:
        return _asked(OPTUNA[pruner](max(1, round(num_steps / 10)), num_steps), stop, cohorts)
    came, gone = list(cohorts[-1]), []
    for at, share in _halvings(pruner, num_steps):
        if at > stop:
            break
        here = sorted(
            (t for t in came if at in t.intermediate_values), key=lambda t: (t.intermediate_values[at], t.number)
        )
        kept = here[: math.ceil(share * len(came) - 1e-9)]
        came, gone = kept, here[len(kept) :]
    return [t.number for t in gone]


def _asked(pruner: optuna.pruners.BasePruner, stop: int, cohorts: Sequence[Sequence[FrozenTrial]]) -> list[int]:
    """What Optuna's pruner says at `stop`, the study replayed up to there: it depends on no other process's timing.

    The replay's name is fixed, since Hyperband's brackets are hashes of it. The best is asked about first, since
    successive halving compares a trial with those that were asked about before it, and lets the first one go on.
    """
    study = optuna.create_study(study_name="pruning", sampler=optuna.samplers.RandomSampler(seed=0), pruner=pruner)
    said: list[int] = []
    for cohort in cohorts:
        asked = [(study.ask(), trial) for trial in cohort]
        open_ = cohort is cohorts[-1]
        for step in sorted({step for trial in cohort for step in trial.intermediate_values}):
            if open_ and step > stop:
                break
            here = [(again, trial) for again, trial in asked if step in trial.intermediate_values]
            for again, trial in here:  # all of them, before the first is asked about
                again.report(trial.intermediate_values[step], step)
            here.sort(key=lambda pair: (pair[1].intermediate_values[step], pair[1].number))
            said = [trial.number for again, trial in here if again.should_prune()]
        for again, trial in asked if not open_ else []:
            study.tell(again, trial.value if trial.state == TrialState.COMPLETE else None, trial.state)
    return said
