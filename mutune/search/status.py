"""Where a study stands, read from its files and its storage while another process runs it."""

import time
from pathlib import Path

from optuna.trial import FrozenTrial, TrialState

from mutune.errors import Refusal
from mutune.search.claims import members
from mutune.search.confirm import FOLDER
from mutune.search.once import RESULT
from mutune.search.results import BEST, read_best
from mutune.search.storage import TRIALS, read_study
from mutune.search.study import TOTAL
from mutune.search.trial import last_record
from mutune.training.result import METRICS


def status_lines(directory: Path, storage: str, num_steps: int) -> list[str]:
    """The study in words: how many trials are in which state, the best, and how far each open one has come.

    Args:
        storage: where the study is kept. num_steps: of a trial.
    """
    study = read_study(directory, directory.name, storage)
    if study is None:
        raise Refusal(f"study={directory.name} has no storage yet, or it cannot be read; run its sweep again.")
    trials = study.get_trials(deepcopy=False)
    count = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    open_trials = [trial for trial in trials if not trial.state.is_finished()]
    lines = [
        f"study      {directory.name}: {count[TrialState.COMPLETE]} finished, {count[TrialState.PRUNED]} pruned, "
        f"{len(open_trials)} open, of {study.user_attrs.get(TOTAL, len(trials))}",
        f"processes  {', '.join(members(directory)) or 'none; the same command continues the study'}",
    ]
    if (directory / BEST).is_file():
        best = read_best(directory)
        values = ", ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in best.params.items())
        sure = f", mean over {len(best.confirmed[0].losses)} seeds" if best.confirmed else ""
        lines.append(f"best       trial {best.trial}: held-out loss {best.heldout_loss:.4f}{sure} ({values})")
    begun = list((directory / FOLDER).glob(f"*/{METRICS}"))
    if begun:
        over = sum((path.parent / RESULT).is_file() for path in begun)
        lines.append(f"confirming {over} runs of its leaders are finished, {len(begun) - over} have begun")
    return [*lines, *(_open_line(directory, trial, num_steps) for trial in open_trials)]


def _open_line(directory: Path, trial: FrozenTrial, num_steps: int) -> str:
    path = directory / TRIALS / str(trial.number) / METRICS
    last = last_record(path)
    if last is None:
        return f"trial {trial.number:<4} waits to begin"
    if last["step"] in trial.intermediate_values:
        return f"trial {trial.number:<4} waits for its cohort after step {last['step']:,}, loss {last['loss']:.4f}"
    age = time.time() - path.stat().st_mtime
    return (
        f"trial {trial.number:<4} step {last['step']:,}/{num_steps:,}, loss {last['loss']:.4f}, "
        f"last record {age:.0f} s ago"
    )
