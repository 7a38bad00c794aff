"""What a worker of a study runs. Optuna and its databases are not needed for that, nor loaded."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutune.parametrization.hyperparameters import NAMES
from mutune.search.config import SCHEDULE
from mutune.search.workers import saving
from mutune.training.config import RunSpec
from mutune.training.result import RunResult

TAIL = 4096  # bytes of a file of records in which the last one lies


@dataclass(frozen=True)
class Trial:
    """A unit of work: which values to try, where the records go, how it is named, and after which step it pauses."""

    number: int
    params: dict[str, Any]
    directory: Path
    study: str
    until: int | None = None

    def __str__(self) -> str:
        values = ", ".join(
            f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}" for key, value in self.params.items()
        )
        return f"trial {self.number} of study {self.study} ({values})"

    @property
    def note(self) -> dict[str, Any]:
        """What its records say it belongs to."""
        return {"study": self.study, "trial": self.number, "params": self.params}


@dataclass(frozen=True)
class Confirmation(Trial):
    """One more run of a leader, by another seed."""

    fingerprint: str = ""

    def __str__(self) -> str:
        return f"{super().__str__()}, confirming"

    @property
    def note(self) -> dict[str, Any]:
        """What its records say it belongs to."""
        return {"study": self.study, "confirms": self.number, "params": self.params}


def trial_spec(spec: RunSpec, params: dict[str, Any]) -> RunSpec:
    """The run of one trial: `spec` with the searched values put in.

    The base of the plan stays the shape of `spec`; a searched width grows the model away from it.
    """
    hyper = {name: value for name, value in params.items() if name in NAMES}
    schedule = {key: params[name] for name, key in SCHEDULE.items() if name in params}
    if "warmup_fraction" in params:
        schedule["warmup_steps"] = None  # which would stand before it
    spec = replace(
        spec,
        hyperparameters=replace(spec.hyperparameters, **hyper),
        schedule=replace(spec.schedule, **schedule),
    )
    if "width" in params:
        spec = replace(spec, model=spec.model.at_width(params["width"]))
    if "table" in params:
        spec = replace(spec, parametrization=replace(spec.parametrization, table=params["table"]))
    return replace(spec, seed=params.get("seed", spec.seed))


def run_trial(spec: RunSpec, device: str, trial: Trial) -> RunResult:
    """A trial of the house's own decoder; `spec` is the run at the base values."""
    from mutune.training.run import run_to_end

    with saving() as stop:
        return run_to_end(
            trial_spec(spec, trial.params), trial.directory, device, trial.note, until=trial.until, stop=stop
        )


def last_record(path: Path) -> dict[str, Any] | None:
    """The step and loss of a run's last whole record; None where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
            return {"step": int(record["step"]), "loss": float(record["loss"])}
        except (ValueError, KeyError, TypeError):
            continue
    return None
