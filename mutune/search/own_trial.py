"""One run of a user's own model: built, initialised and given its optimizer by the plan, trained by the user's loop."""

import contextlib
import json
import math
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import cloudpickle
import torch
from torch import nn

from mutune.errors import Refusal, require
from mutune.files import write_yaml
from mutune.folders import CONFIG
from mutune.parametrization.arguments import shown_value
from mutune.parametrization.audit import audit
from mutune.parametrization.finding import AuditError
from mutune.parametrization.hyperparameters import NAMES, BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.parametrized import Parametrized
from mutune.parametrization.plan import Plan
from mutune.search.trial import Trial
from mutune.search.workers import UserCodeError
from mutune.training.result import METRICS, RunResult
from mutune.training.run import write_plan
from mutune.versions import versions

#: (model, optimizer, seed, report) → final held-out loss.
Train = Callable[[nn.Module, torch.optim.Optimizer, int, Callable[[int, float], None]], float]


class _Over(BaseException):
    """Ends a user's loop from inside its `report`; no `except Exception` of the loop's own holds it up."""


@dataclass(frozen=True)
class OwnModel:
    """All that a run of a user's own model needs, besides its width and its values.

    Attributes:
        family: the model at every width.
        train: the user's loop.
        table: name of the parametrization.
        hyperparameters: base values of what is not searched.
        seed: seeds initial values, torch, and what the user seeds with it.
        code: fingerprints of the user's functions, kept beside every run.
    """

    family: Family[int]
    train: Train
    table: str
    hyperparameters: BaseHyperparameters
    seed: int
    code: dict[str, str]

    def at(self, params: dict[str, Any]) -> "OwnRun":
        """The run with these of the searched values."""
        hyper = replace(self.hyperparameters, **{name: value for name, value in params.items() if name in NAMES})
        return OwnRun(
            self,
            params.get("width", self.family.base),
            params.get("table", self.table),
            hyper,
            params.get("seed", self.seed),
        )


@dataclass(frozen=True)
class OwnRun:
    """One run of a user's own model."""

    model: OwnModel
    width: int
    table: str
    hyperparameters: BaseHyperparameters
    seed: int

    def __str__(self) -> str:
        return f"a run at width {self.width} (learning_rate={self.hyperparameters.learning_rate:.6g})"

    def parametrized(self) -> Parametrized:
        """The plan and what puts it on the live model.

        Raises:
            Refusal: a role, a site or a shape that cannot be ruled.
        """
        return self.model.family.at(self.width, self.table, self.hyperparameters)

    def as_dict(self) -> dict[str, Any]:
        """What the run is, in the form of a house run's `config.yaml`."""
        return {
            "model": {"width": self.width, "depth": None},
            "parametrization": {"table": self.table},
            "hyperparameters": self.hyperparameters.as_dict(),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class OwnRung:
    """One run of the ladder; `offset` is in octaves from the best trial's learning rate."""

    run: OwnRun
    offset: float
    directory: Path
    fingerprint: str

    def __str__(self) -> str:
        return f"ladder run {self.directory.name}"


def run_task(model: OwnModel, task: Trial | OwnRung) -> RunResult:
    """A trial of the study or a run of its ladder; a worker's whole job."""
    if isinstance(task, Trial):
        return run_own(model.at(task.params), task.directory, task.note)
    return run_own(task.run, task.directory, {"rung": task.run.width, "offset": task.offset})


def rehearse(run: OwnRun) -> None:
    """Build, audit and train up to the first report, writing nothing, on a copy of the user's functions where they can
    be copied; others, which hold a lock or an open file, are only for runs in this process.

    It is done at a width besides the base, where a table gives tensors different rates: there a schedule that destroys
    their ratios shows, and at the base it does not.
    """
    with contextlib.suppress(Exception):
        run = pickle.loads(cloudpickle.dumps(run))
    _train(run, None, stop_at_first=True)


def run_own(run: OwnRun, directory: Path, note: dict[str, Any]) -> RunResult:
    """Train to the end, leaving records and plan under `directory`, as `training.run.run_to_end` does.

    A loss that is not finite, reported or returned, is a divergence: at the first report of one the run ends. Its value
    is the worst finite loss that it reported, infinite where there is none.

    Raises:
        AuditError: the live model or optimizer is not what the plan says: before the first step, at the first, second,
            fourth, eighth, ... report, or at the end.
        UserCodeError: the user's function raised.
        Refusal: it did not return a loss.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = {**note, "code": run.model.code, "versions": versions(), "run": run.as_dict()}
    write_yaml(directory / CONFIG, config)
    with (directory / METRICS).open("w", buffering=1) as lines:
        return _train(run, lines, stop_at_first=False)


def _train(run: OwnRun, lines: TextIO | None, *, stop_at_first: bool) -> RunResult:
    parametrized = run.parametrized()
    if lines is not None:
        write_plan(Path(lines.name).parent, parametrized.plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        model = parametrized.build(run.seed)
        optimizer = parametrized.optimizer(model)
        audit(model, optimizer, parametrized.plan, at_init=True, factor=1.0)
        record = Recorder(model, optimizer, parametrized.plan, run.hyperparameters.learning_rate, lines, stop_at_first)
        value: Any = math.nan
        try:
            value = run.model.train(model, optimizer, run.seed, record.report)
        except _Over:
            return record.result(math.nan)
        except (Refusal, AuditError):
            raise
        except (Exception, SystemExit) as error:
            raise UserCodeError.of(error) from error
        return record.result(_loss(value))


class Recorder:
    """What a user's loop reports to: one record per report, divergence and audits noticed on the way.

    Args:
        peak_lr: the base peak rate; with the optimizer's factor it gives the recorded `lr`.
        lines: where records go; None keeps none.
        stop_at_first: end the loop at its first report, once that is audited.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        plan: Plan,
        peak_lr: float,
        lines: TextIO | None,
        stop_at_first: bool,
    ) -> None:
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self.peak_lr, self.lines, self.stop_at_first = peak_lr, lines, stop_at_first
        self.started, self.worst, self.diverged, self.count = time.monotonic(), -math.inf, False, 0
        self.versions = _versions(model)
        self.last: dict[str, Any] = {"step": 0, "lr": peak_lr, "loss": math.nan, "diverged": False}

    def report(self, step: int, loss: float) -> None:
        """Record the training loss of step `step`, counted from 0 or from 1; a tensor of one number will do."""
        step, loss = _reported(step, loss)
        self.count += 1
        self.diverged |= not math.isfinite(loss)
        group = self.optimizer.param_groups[0]
        self.last = {"step": step, "loss": loss, "lr": self.peak_lr * float(group["lr"]) / group["peak_lr"]}
        self._write()
        if self.diverged:
            raise _Over
        self.worst = max(self.worst, loss)
        if self.count & (self.count - 1) == 0:
            audit(self.model, self.optimizer, self.plan)
        if self.stop_at_first:
            raise _Over

    def result(self, value: float) -> RunResult:
        """How the run ended, with the held-out loss that its loop returned; audits it and writes its last record."""
        self.diverged |= not math.isfinite(value) and not self.stop_at_first
        if not self.diverged:
            require(
                len(self.optimizer.state) > 0 or self.versions == _versions(self.model),
                "train changed the model without a step of the optimizer that it was given, so what is searched had no "
                "effect; call optimizer.step() on it instead of making another.",
            )
            audit(self.model, self.optimizer, self.plan)
            self._write(heldout_loss=value)
        elif not self.last["diverged"]:
            self._write()
        seconds = round(time.monotonic() - self.started, 4)
        told = (self.worst if math.isfinite(self.worst) else math.inf) if self.diverged else value
        return RunResult(told, self.diverged, None, self.last["step"], seconds)

    def _write(self, **facts: Any) -> None:
        self.last |= {"diverged": self.diverged, "seconds": round(time.monotonic() - self.started, 4), **facts}
        if self.lines is not None:
            self.lines.write(json.dumps(self.last) + "\n")


def _versions(model: nn.Module) -> list[int]:
    """How often each tensor was written to."""
    return [parameter._version for parameter in model.parameters()]


def _reported(step: Any, loss: Any) -> tuple[int, float]:
    """What a user's loop reports, as numbers."""
    try:
        return int(step), _number(loss)
    except (TypeError, ValueError, RuntimeError):
        raise Refusal(
            f"report was given step={shown_value(step)} and loss={shown_value(loss)}; give it two numbers, for example "
            f"report(step, loss.item())."
        ) from None


def _loss(value: Any) -> float:
    """What a user's loop returned, as a number."""
    try:
        require(value is not None and not isinstance(value, bool), "")
        return _number(value)
    except (TypeError, ValueError, RuntimeError):
        raise Refusal(
            f"train returned {value!r}; return the final held-out loss as a number, for example return loss.item()."
        ) from None


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)
