"""Someone else's Optuna study, as a plain table of runs."""

from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.exceptions import OptunaError
from sqlalchemy.exc import SQLAlchemyError

from mutune.errors import Refusal, first_line, require


def read_foreign(url: str, name: str | None = None) -> pd.DataFrame:
    """The finished trials of the study at `url` (`sqlite:///study.db`); `name` says which where there are several.

    One row each: its parameters and numeric user attributes by name, and `loss`. A failed trial, or one that told a
    value that is not finite, has no loss. A pruned one is left out, and so is one that failed before it had all its
    parameters.

    Raises:
        Refusal: no database, no such study, or one that maximises or has several objectives.
    """
    file = url.removeprefix("sqlite:///")
    require(
        file == url or Path(file).is_file(),
        f"runs={url}: there is no file {file}; for example runs=sqlite:///study.db.",
    )
    logging = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        storage = optuna.storages.RDBStorage(url, skip_table_creation=True)
        names = optuna.get_all_study_names(storage)
        require(bool(names), f"runs={url} holds no study; for example runs=sqlite:///study.db.")
        require(
            name in names or (not name and len(names) == 1),
            f"runs={url} holds the studies {', '.join(sorted(names))}; say which, for example runs_study={min(names)}.",
        )
        study = optuna.load_study(study_name=name or names[0], storage=storage)
    except (SQLAlchemyError, OptunaError, RuntimeError, ImportError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(
            f"runs={url} cannot be read as an Optuna study ({first_line(error)}); for example runs=sqlite:///study.db."
        ) from None
    finally:
        optuna.logging.set_verbosity(logging)
    require(len(study.directions) == 1, f"runs={url}: the study has several objectives; use one that minimises a loss.")
    minimises = study.direction == optuna.study.StudyDirection.MINIMIZE
    require(minimises, f"runs={url}: the study maximises; use one that minimises a loss.")
    trials = study.get_trials(deepcopy=False)
    complete = [set(t.params) for t in trials if t.state == COMPLETE]
    known = set.intersection(*complete) if complete else set()
    rows = [_row(t) for t in trials if t.state == COMPLETE or (t.state == FAIL and known <= set(t.params))]
    require(bool(rows), f"runs={url}: the study has no finished trial; run it first.")
    return pd.DataFrame(rows)


COMPLETE, FAIL = optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.FAIL


def _row(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    numbers = {k: v for k, v in trial.user_attrs.items() if isinstance(v, (int, float)) and k not in trial.params}
    return {**numbers, **trial.params, "loss": trial.value if trial.state == COMPLETE else float("nan")}
