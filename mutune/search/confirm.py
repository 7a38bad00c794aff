"""The leaders of a study run again by more seeds, and chosen by their mean: one seed's lowest loss is partly luck."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, variance

from optuna.trial import FrozenTrial

from mutune.errors import Refusal
from mutune.files import read_yaml
from mutune.folders import CONFIG
from mutune.search.once import fingerprint, finished, run_open
from mutune.search.results import Confirmed
from mutune.search.study import finished_by_loss, result_of
from mutune.search.trial import Confirmation, trial_spec
from mutune.search.workers import RunAll
from mutune.training.config import MAX_SEED, RunSpec
from mutune.training.result import RunResult

FOLDER = "confirm"


def confirm(
    directory: Path,
    spec: RunSpec,
    trials: Sequence[FrozenTrial],
    leaders: int,
    seeds: int,
    data_hash: str,
    run: RunAll[Confirmation, RunResult],
    report: Callable[[int, int, list[str]], None],
) -> list[Confirmed]:
    """The best `leaders` trials with their losses by `seeds` seeds besides their own, the chosen one first.

    Runs that are over are not made again.

    Args:
        spec: the run at the base values.
        run: runs trials, as `Workers.run` does.
        report: called with (finished, planned, names of the running).
    """
    first = {trial.number: trial for trial in finished_by_loss(trials)[:leaders]}
    again = [
        _confirmation(directory, spec, trial, (spec.seed + 1 + i) % (MAX_SEED + 1), data_hash)
        for trial in first.values()
        for i in range(seeds)
    ]
    found = {number: [result_of(trial)] for number, trial in first.items()}
    for made, result in zip(again, run_open(again, run, report), strict=True):
        found[made.number].append(result)
    rates = {number: trial.params.get("learning_rate", 0.0) for number, trial in first.items()}
    return choose(found, rates)


def _confirmation(directory: Path, spec: RunSpec, trial: FrozenTrial, seed: int, data_hash: str) -> Confirmation:
    params = {**trial.params, "seed": seed}
    return Confirmation(
        trial.number,
        params,
        directory / FOLDER / f"{trial.number}_s{seed}",
        directory.name,
        fingerprint=fingerprint(trial_spec(spec, params).as_dict(), data_hash),
    )


def confirmed_runs(directory: Path, spec: RunSpec, data_hash: str) -> list[tuple[RunSpec, RunResult, Path]]:
    """The runs of a study that confirmed its leaders, with their results and folders; damaged ones are left out."""
    found = []
    for path in sorted((directory / FOLDER).glob(f"*/{CONFIG}")):
        try:
            note = read_yaml(path, "run's config")
            made = trial_spec(spec, note["params"])
        except (Refusal, KeyError, TypeError, AttributeError):
            continue
        mark = fingerprint(made.as_dict(), data_hash)
        run = Confirmation(-1, note["params"], path.parent, directory.name, fingerprint=mark)
        if (result := finished(run)) is not None:
            found.append((made, result, path.parent))
    return found


def choose(found: Mapping[int, Sequence[RunResult]], rates: Mapping[int, float]) -> list[Confirmed]:
    """Leaders by their mean loss; among those that a standard error of the difference does not tell from the lowest,
    the lower learning rate comes first. One of which a run diverged is left out.

    Args:
        found: trial → its runs by seed, the same count of each. rates: trial → learning rate.
    """
    losses = {number: [math.inf if r.diverged else r.value for r in runs] for number, runs in found.items()}
    means = {number: fmean(values) for number, values in losses.items()}
    spreads = [variance(values) for values in losses.values() if len(values) > 1 and math.isfinite(sum(values))]
    count = min(map(len, losses.values()))
    error = math.sqrt(fmean(spreads) / count) if spreads else 0.0
    lowest = min(means.values())
    tied = [number for number in means if means[number] - lowest <= math.sqrt(2) * error]
    order = sorted(means, key=lambda n: (n not in tied, rates[n] if n in tied else 0.0, means[n]))
    return [
        Confirmed(n, losses[n], means[n], error, _mean_bits(found[n]), n in tied)
        for n in order
        if math.isfinite(means[n])
    ]


def _mean_bits(runs: Sequence[RunResult]) -> float | None:
    bits = [run.bits_per_byte for run in runs]
    return fmean(b for b in bits if b is not None) if all(b is not None for b in bits) else None
