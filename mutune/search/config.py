"""What a sweep searches, and how: plain data, checked before anything starts."""

import itertools
import math
import re
from dataclasses import dataclass, field
from typing import Any

from mutune.errors import Refusal, require, require_number, shown
from mutune.parametrization.hyperparameters import NAMES, BaseHyperparameters

SAMPLERS = ("random", "qmc", "tpe", "gp", "grid")
PRUNERS = ("halving", "wide", "none", "median", "percentile", "successive_halving", "hyperband")

LAUNCHERS = ("local", "slurm", "ray")
WHERE = ("workers", "launcher", "jobs", "resources")  # keys of a sweep, above this group, that say where it runs

#: What a space may name besides the base hyperparameters and the schedule: the run's shape, its table and its seed.
STRUCTURAL = ("width", "table", "seed")
#: Storages that lie in a study's folder.
FILES = {"sqlite": "study.db", "journal": "study.journal"}
#: What a space calls a part of the schedule → its key there. Only lists of values.
SCHEDULE = {
    "schedule_kind": "kind",
    "warmup_fraction": "warmup_fraction",
    "end_ratio": "end_ratio",
    "decay_fraction": "decay_fraction",
}
#: In what trials may not differ that are compared on their way: size, schedule, batches.
UNEVEN = ("width", "seed", *SCHEDULE)
MAX_TRIALS = 10**6
EXAMPLES = {"width": 32, "seed": 0, "schedule_kind": "linear", "table": "mup"}


@dataclass(frozen=True)
class Dimension:
    """One searched quantity: an interval (`low`, `high`, on a log scale unless `log: false`), or a list of `values`."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = True
    values: tuple[Any, ...] = ()

    def contains(self, value: Any) -> bool:
        """Whether the search could propose `value`."""
        if self.values:
            return value in self.values
        return value is not None and self.low <= value <= self.high

    def __str__(self) -> str:
        return str(list(self.values)) if self.values else f"{self.low:g} … {self.high:g}"


@dataclass(frozen=True)
class SearchConfig:
    """The search.

    Attributes:
        sampler: `random`, `qmc` (scrambled Sobol points), `tpe`, `gp` (a Gaussian process: few trials of few numbers),
            or `grid` (every combination of the listed values).
        pruner: which trials of a cohort go on at the full length, while the others stop and cannot win. `halving`: the
            better half at a tenth of the run, and of these at half of it; `wide`: a third at a ninth and at a third,
            for wide spaces; `none`; or Optuna's `median`, `percentile`, `successive_halving` or `hyperband`, asked at
            every tenth. null is `none` for a grid, and where widths, schedules or seeds are searched, which do not
            compare on the way; else `halving`.
        n_trials: total number of trials of the study, however often it is started; null for a grid, whose size it is.
        n_startup_trials: random trials before the model of `tpe` or `gp` takes over.
        cohort: trials proposed together, from the results of all earlier cohorts: what makes an interrupted study
            equal to an undisturbed one. At least the number of workers, to keep them busy.
        confirm: so many of the best trials are run again by more seeds, and chosen by their mean; 0 takes the best as
            it is.
        confirm_seeds: by how many more seeds.
        stop_regret: end the study, at the end of a cohort, once its best trial is expected to lie less than this above
            the lowest point near it, nats per token; null runs all trials.
        storage: where Optuna keeps the trials: `sqlite` or `journal`, files in the study's folder, or the URL of a
            database, for example postgresql+psycopg://user@host/database, or grpc://host:13000, Optuna's gRPC proxy.
        space: name → {low, high, log} or {values: [...]}.
        initial: known-good values, tried first; what they leave out takes the configured base value, or where that
            lies outside its range, the sampler's own. A grid has none.
    """

    sampler: str = "tpe"
    pruner: str | None = None
    n_trials: int | None = None
    n_startup_trials: int = 16
    cohort: int = 8
    confirm: int = 0
    confirm_seeds: int = 2
    stop_regret: float | None = None
    storage: str = "sqlite"
    space: dict[str, Any] = field(default_factory=dict)
    initial: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        require(
            self.sampler in SAMPLERS,
            f"search.sampler={self.sampler} is unknown; known samplers: {', '.join(SAMPLERS)}.",
        )
        require(
            self.pruner is None or self.pruner in PRUNERS,
            f"search.pruner={self.pruner} is unknown; known pruners: {', '.join(PRUNERS)}.",
        )
        uneven = next((name for name in UNEVEN if name in self.space), None)
        require(
            self.prunes == "none" or uneven is None,
            f"search.pruner={self.prunes} compares trials on the way, which tells nothing where search.space.{uneven} "
            "differs; for example search.pruner=none.",
        )
        for name, example in (("n_startup_trials", 16), ("cohort", 8), ("n_trials", 32)):
            value, key = getattr(self, name), f"search.{name}"
            if value is not None or name in ("n_startup_trials", "cohort"):
                require_number(key, value, at_least=1, at_most=MAX_TRIALS, example=example, whole=True)
        for name, least in (("confirm", 0), ("confirm_seeds", 1)):
            value = getattr(self, name)
            require_number(f"search.{name}", value, at_least=least, at_most=MAX_TRIALS, example=3 - least, whole=True)
        require(
            self.storage in FILES or ("://" in self.storage and not self.storage.startswith("sqlite")),
            f"search.storage={without_password(self.storage)} is unknown; take sqlite, journal, or the URL of a "
            "database, for example search.storage=postgresql+psycopg://user@host/database.",
        )
        if self.stop_regret is not None:
            require_number("search.stop_regret", self.stop_regret, above=0.0, example=0.001)
        odd = next((name for name in ("seed", "width") if name in self.space), None)
        require(
            self.confirm == 0 or odd is None,
            f"search.confirm={self.confirm} runs leaders by other seeds, which search.space.{odd} does not go with; "
            "for example search.confirm=0.",
        )
        if self.sampler == "grid":
            for name, unset in (("n_trials", None), ("initial", [])):
                value = getattr(self, name)
                require(
                    value == unset,
                    f"search.{name}={value} is not read by search.sampler=grid, which tries every combination once; "
                    f"for example search.{name}={'null' if unset is None else unset}.",
                )
        for i, point in enumerate(self.initial):
            for name in point:
                require(
                    name in self.space,
                    f"search.initial[{i}] names {name}, which is not in search.space; add search.space.{name} or "
                    "remove it.",
                )

    @property
    def prunes(self) -> str:
        """The pruner."""
        uneven = any(name in self.space for name in UNEVEN)
        return self.pruner or ("none" if self.sampler == "grid" or uneven else "halving")


def without_password(url: str) -> str:
    """A storage's URL as it may be shown and kept."""
    url = re.sub(r"(://[^:/@]*):[^@]*(?=@)", r"\1", url)
    return re.sub(r"(?<=[?&])(\w*password)=[^&]*", r"\1=", url)


def dimensions(space: dict[str, Any]) -> list[Dimension]:
    """The searched quantities, checked.

    Raises:
        Refusal: an unknown name, an empty range, a bound that the hyperparameter itself refuses.
    """
    return [_dimension(name, data) for name, data in space.items()]


def initial_points(search: SearchConfig, space: list[Dimension]) -> list[dict[str, Any]]:
    """`search.initial` with every value checked.

    Raises:
        Refusal: a value of the wrong kind, or outside its range.
    """
    by_name = {dimension.name: dimension for dimension in space}
    points = []
    for i, given in enumerate(search.initial):
        point = {}
        for name, value in given.items():
            key = f"search.initial[{i}].{name}"
            point[name] = _value(name, key, value)
            require(
                by_name[name].contains(point[name]),
                f"{key}={shown(value)} lies outside search.space.{name} ({by_name[name]}); move it inside, or try no "
                "known values first with search.initial=[].",
            )
        points.append(point)
    return points


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
    known = (*NAMES, *SCHEDULE, *STRUCTURAL)
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
    require(
        isinstance(values, list),
        f"{key}.values={shown(values)} must be a list; for example {key}.values=[{shown(values)}].",
    )
    require(len(values) > 0, f"{key}.values=[] is empty; list at least one value.")
    values = [_value(name, f"{key}.values[{i}]", value) for i, value in enumerate(values)]
    require(len(set(values)) == len(values), f"{key}.values={values} repeats a value; list each once.")
    return Dimension(name, values=tuple(values))


def _interval(name: str, key: str, data: dict[str, Any]) -> Dimension:
    works = "[0.0, 0.1]" if name in SCHEDULE else "[32, 64]"
    if name in ("table", "schedule_kind"):
        works = f"[{EXAMPLES[name]}]"
    require(name in NAMES, f"{key} must list its values; for example {key}={{values: {works}}}.")
    for bound in ("low", "high"):
        require(bound in data, f"{key}.{bound} is missing; for example {key}={{low: 0.001, high: 0.1}}.")
    low, high = (_number(name, f"{key}.{bound}", data[bound]) for bound in ("low", "high"))
    log = data.get("log", True)
    require(isinstance(log, bool), f"{key}.log={log} must be true or false.")
    require(
        low < high, f"{key} is empty: low={low} is not below high={high}; for example high={2 * abs(low) + 1e-3:g}."
    )
    require(not log or low > 0, f"{key}.low={low} must be above 0 on a log scale; for example low=0.001 or log=false.")
    return Dimension(name, low, high, log)


def _value(name: str, key: str, value: Any) -> Any:
    """A value of `name` as what it stands for: a float, a whole number (`width`, `seed`) or a word (`table`)."""
    if name in NAMES:
        return _number(name, key, value)
    if name in ("table", "schedule_kind"):
        require(isinstance(value, str), f"{key}={shown(value)} must be a word; for example {key}={EXAMPLES[name]}.")
        return value
    if name in SCHEDULE:
        return _ratio(name, key, value)
    whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    require(whole, f"{key}={shown(value)} must be a whole number; for example {key}={EXAMPLES[name]}.")
    return int(value)


def _ratio(name: str, key: str, value: Any) -> float:
    """A part of the schedule, as `ScheduleConfig` accepts it."""
    require(not isinstance(value, bool), f"{key}={shown(value)} must be a number; for example 0.1.")
    require_number(key, value, at_least=0.0, at_most=1.0, example=0.1)
    return float(value)


def _number(name: str, key: str, value: Any) -> float:
    """The value as a float that `BaseHyperparameters` accepts."""
    require(not isinstance(value, bool), f"{key}={shown(value)} must be a number; for example 0.01.")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Refusal(f"{key}={shown(value)} must be a number; for example 0.01.") from None
    require(math.isfinite(number), f"{key}={shown(value)} must be finite; for example 0.01.")
    try:
        BaseHyperparameters(**{name: number})
    except Refusal as refusal:
        raise Refusal(str(refusal).replace(f"hyperparameters.{name}", key)) from refusal
    return number
