"""What a sweep searches, and how: plain data, checked before anything starts."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

from mutune.errors import Refusal, require, require_number
from mutune.parametrization.hyperparameters import NAMES, BaseHyperparameters

SAMPLERS = ("random", "tpe", "grid")

#: What a space may name besides the base hyperparameters: the run's shape, its table and its seed.
STRUCTURAL = ("width", "table", "seed")


@dataclass(frozen=True)
class Dimension:
    """One searched quantity: an interval (`low`, `high`, on a log scale unless `log: false`), or a list of `values`."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = True
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class SearchConfig:
    """The search.

    Attributes:
        sampler: `random`, `tpe`, or `grid` (every combination of the listed values).
        n_trials: total number of trials of the study, however often it is started; null for a grid, whose size it is.
        n_startup_trials: random trials before TPE's model takes over.
        cohort: trials proposed together, from the results of all earlier cohorts: what makes an interrupted study
            equal to an undisturbed one. At least the number of workers, to keep them busy.
        workers: single-threaded worker processes; null takes the number of cores.
        space: name → {low, high, log} or {values: [...]}.
        initial: known-good values, tried first; what they leave out takes the configured base value.
    """

    sampler: str = "tpe"
    n_trials: int | None = None
    n_startup_trials: int = 16
    cohort: int = 8
    workers: int | None = None
    space: dict[str, Any] = field(default_factory=dict)
    initial: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            self.sampler in SAMPLERS,
            f"search.sampler={self.sampler} is unknown; known samplers: {', '.join(SAMPLERS)}.",
        )
        for name, example in (("n_startup_trials", 16), ("cohort", 8)):
            require_number(f"search.{name}", getattr(self, name), at_least=1, example=example)
        for name, example in (("n_trials", 32), ("workers", 2)):
            if getattr(self, name) is not None:
                require_number(f"search.{name}", getattr(self, name), at_least=1, example=example)
        for point in self.initial:
            for name in point:
                require(
                    name in self.space,
                    f"search.initial names {name}, which is not in search.space; add search.space.{name} or remove it.",
                )


def dimensions(space: dict[str, Any]) -> list[Dimension]:
    """The searched quantities, checked.

    Raises:
        Refusal: an unknown name, an empty range, a bound that the hyperparameter itself refuses.
    """
    return [_dimension(name, data) for name, data in space.items()]


def grid(space: list[Dimension]) -> list[dict[str, Any]]:
    """Every combination of the listed values, the first dimension varying slowest."""
    for dimension in space:
        require(
            len(dimension.values) > 0,
            f"search.space.{dimension.name} has no values and search.sampler=grid needs them; "
            f"for example search.space.{dimension.name}={{values: [...]}}.",
        )
    names = [dimension.name for dimension in space]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*(d.values for d in space))]


def _dimension(name: str, data: Any) -> Dimension:
    known = (*NAMES, *STRUCTURAL)
    key = f"search.space.{name}"
    require(name in known, f"{key} is unknown; what can be searched: {', '.join(known)}.")
    require(isinstance(data, dict), f"{key}={data} must be a range; for example {key}={{low: 0.001, high: 0.1}}.")
    for part in data:
        require(
            part in ("low", "high", "log", "values"),
            f"unknown key {key}.{part}; a range has low, high and log, or values.",
        )
    if "values" in data:
        return _listed(name, key, data)
    return _interval(name, key, data)


def _listed(name: str, key: str, data: dict[str, Any]) -> Dimension:
    values = data["values"]
    others = " ".join(f"~{key}.{part}" for part in data if part != "values")
    require(len(data) == 1, f"{key} has both values and a range; take the range out with {others}.")
    require(isinstance(values, list) and len(values) > 0, f"{key}.values={values} is empty; list at least one value.")
    if name in NAMES:
        values = [_checked(name, key, value) for value in values]
    require(len(set(values)) == len(values), f"{key}.values={values} repeats a value; list each once.")
    return Dimension(name, values=tuple(values))


def _interval(name: str, key: str, data: dict[str, Any]) -> Dimension:
    require(name in NAMES, f"{key} must list its values; for example {key}={{values: [32, 64]}}.")
    for bound in ("low", "high"):
        require(bound in data, f"{key}.{bound} is missing; for example {key}={{low: 0.001, high: 0.1}}.")
    low, high = _checked(name, key, data["low"]), _checked(name, key, data["high"])
    log = data.get("log", True)
    require(isinstance(log, bool), f"{key}.log={log} must be true or false.")
    require(
        low < high, f"{key} is empty: low={low} is not below high={high}; for example high={2 * abs(low) + 1e-3:g}."
    )
    require(not log or low > 0, f"{key}.low={low} must be above 0 on a log scale; for example low=0.001 or log=false.")
    return Dimension(name, low, high, log)


def _checked(name: str, key: str, value: Any) -> float:
    """The value as a float that `BaseHyperparameters` accepts."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise Refusal(f"{key}={value} must be a number; for example 0.01.") from None
    require(math.isfinite(number), f"{key}={value} must be finite; for example 0.01.")
    BaseHyperparameters(**{name: number})  # refuses what is out of its range
    return number
