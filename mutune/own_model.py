"""The notebook's door: search a user's own model, then climb a ladder of widths. `mutune.search.run`.

    def build(width): return Net(width)                       # an nn.Module with `mutune.Multiplier`s, or sites=

    def train(model, optimizer, seed, report):                # an ordinary loop; rates change by a common factor
        for step in range(200):
            ...
            report(step, loss)
        return heldout_loss

    result = mutune.search.run(build, train, {"learning_rate": {"low": 1e-3, "high": 0.1}}, base=64, widths=[128, 256],
                               n_trials=16, name="mine")

Folders are those of the commands: runs/sweeps/<name>/ with study.db, config.yaml, trials/<n>/, ladder/<rung>/,
best.yaml and figures/.
"""

import base64
import html
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import cloudpickle
import pandas as pd
import torch
from torch import nn

from mutune.certificate.config import LadderConfig
from mutune.certificate.ladder import gather
from mutune.compose import build as build_dataclass
from mutune.compose import plain
from mutune.door import WorkFailed, drawn
from mutune.errors import Refusal, require, require_number, shown
from mutune.files import read_yaml, require_writable, write_text, write_yaml
from mutune.folders import CONFIG, check_claim, claim, differences, locked
from mutune.model.shape import MAX_WIDTH
from mutune.parametrization.arguments import as_hyperparameters, called, check_build, plain_values
from mutune.parametrization.finding import AuditError
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.roles import Role
from mutune.progress import ProgressLine, clock
from mutune.reporting import frames
from mutune.reporting.figures import draw_study, draw_transfer
from mutune.search.config import Dimension, SearchConfig, dimensions, initial_points
from mutune.search.display import followed
from mutune.search.once import fingerprint, run_open
from mutune.search.own_arguments import check_arguments, check_train, grouped, listed
from mutune.search.own_code import fingerprints
from mutune.search.own_trial import OwnModel, OwnRung, Train, rehearse, run_task
from mutune.search.proposals import total_trials
from mutune.search.results import BEST, OWN_MODEL, BestValues
from mutune.search.storage import check_storage
from mutune.search.study import best_trial, run_study
from mutune.search.workers import UserCodeError, WorkError, Workers, default_workers
from mutune.training.config import MAX_SEED
from mutune.training.result import RunResult

Pool: TypeAlias = Workers[Any, RunResult]  # of `Trial`s and `OwnRung`s

HORIZON_ONLY = "is read by decay=horizon only, which is not for a user's loop"
LADDER, SPARE, FAILURE = "ladder", "spare", "failure.txt"


@dataclass(frozen=True)
class OwnSearch:
    """What a search of a user's own model found. In a notebook it shows itself: the best values and the figures.

    Attributes:
        directory: the study's folder.
        best: number, held-out loss and hyperparameters of the best trial, as `best.yaml` has them; for a target:
            `mutune.parametrize(..., hyperparameters=result.best.hyperparameters)`.
        trials: one row per trial: `trial`, the searched values, `value`, `diverged`, `steps`, `seconds`.
        ladder: one row per width: the fitted `optimum` (log2 of the base learning rate) with its 90 % interval,
            `learning_rate`, `loss`, `edge`; empty without a ladder. See `reporting.optima`.
        drift: one row: how far the optimum moves over the widths, in octaves; empty without a ladder. See
            `reporting.drift`.
        figures: PNG files.
    """

    directory: Path
    best: BestValues
    trials: pd.DataFrame
    ladder: pd.DataFrame
    drift: pd.DataFrame
    figures: list[Path]

    def show(self) -> None:
        """Show it in a notebook's cell; elsewhere print what it says and where its figures are."""
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
            sys.modules["IPython"].display.display(self)
        else:
            print("\n".join([str(self), *map(str, self.figures)]))

    def __str__(self) -> str:
        values = ", ".join(f"{k}={v:.5g}" if isinstance(v, float) else f"{k}={v}" for k, v in self.best.params.items())
        best = (
            f"best trial {self.best.trial} of {len(self.trials)}: held-out loss {self.best.heldout_loss:.4f}, {values}"
        )
        return "\n".join([best, *(self._words(row) for _, row in self.drift.iterrows())])

    def _words(self, drift: "pd.Series[Any]") -> str:
        seeds = f"{drift['num_seeds']} seed{'s' if drift['num_seeds'] > 1 else ''}"
        where = f"widths {self.ladder.width.min()} to {self.ladder.width.max()}, {seeds}"
        if drift["edge"]:
            why = "a rung has its optimum at the edge of the rates"
            return f"ladder: the best learning rate moves {drift['range']:.2f} octaves or more, {why} ({where})"
        slope = (
            f"{drift['octaves_per_doubling']:+.2f} ({drift['low']:+.2f} to {drift['high']:+.2f}) octaves per doubling"
        )
        return f"ladder: the best learning rate moves {slope}, {drift['range']:.2f} in all ({where})"

    def _repr_html_(self) -> str:
        images = [base64.b64encode(path.read_bytes()).decode() for path in self.figures if path.is_file()]
        shown = "".join(f'<img src="data:image/png;base64,{image}" width="830">' for image in images)
        return f"<pre>{html.escape(str(self))}</pre>{shown}"


def run(
    build: Callable[[int], nn.Module],
    train: Train,
    space: Mapping[str, Any],
    *,
    base: int,
    delta: int | None = None,
    widths: Sequence[int] = (),
    n_trials: int | None = None,
    seeds: int = 2,
    offsets: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    table: str = "mup",
    hyperparameters: BaseHyperparameters | Mapping[str, float] = {},
    roles: Mapping[str, Role | str] = {},
    sites: Mapping[str, str] = {},
    base_fan_in: Mapping[str, float] = {},
    depth: Callable[[int], int] | None = None,
    head_size: int | Callable[[int], int] | None = None,
    sampler: str = "tpe",
    n_startup_trials: int = 8,
    cohort: int = 8,
    initial: Sequence[Mapping[str, Any]] = (),
    seed: int = 0,
    workers: int | None = None,
    out: str | Path = "runs",
    name: str = "own",
    overwrite: bool = False,
) -> OwnSearch:
    """Search the base hyperparameters of a user's own model, then measure whether the best rate holds at other widths.

    Running it again continues, finished it returns at once, and what came from other inputs or other code is refused.
    A killed kernel loses at most the runs in progress. Before anything is written, a copy of `train` is rehearsed here
    up to its first report, at the width `delta`; one that reports nothing is run to its end. Where it cannot be copied,
    as with a lock, it is rehearsed itself.

    Where `train` raises, all stops with its traceback; once it is mended, running it again keeps what was finished, and
    `config.yaml` keeps the fingerprints of the code that made it.

    Args:
        build: width → a fresh model, as `mutune.parametrize` takes it. It and `train` may be defined anywhere: workers
            get them by value. Files, locks and device memory are to be opened inside them.
        train: (model, optimizer, seed, report) → the final held-out loss, in any unit, lower is better. The model
            comes initialised, on the CPU, and torch is seeded with `seed`; the optimizer is an AdamW of the plan's
            groups, whose rates may be changed by one factor for all (`mutune.set_rates`, LambdaLR).
            `report(step, loss)` keeps a training loss; one that is not finite ends the run as diverged.
        space: base hyperparameter, `table` or `seed` → `{"low": .., "high": ..}` (log scale unless `"log": False`) or
            `{"values": [..]}`.
        base: the width that is searched, at which hyperparameters live.
        delta: another width, which tells what is infinite; twice the base by default.
        widths: rungs of the ladder besides the base; none without a ladder.
        n_trials: the study's total, however often it is started; none for `sampler="grid"`.
        seeds, offsets: of the ladder: seeds per point, and rates in octaves around the best.
        table, roles, sites, base_fan_in, depth, head_size: as in `mutune.Family` and `Family.at`.
        hyperparameters: base values of what is not searched.
        sampler, n_startup_trials, cohort, initial: as in `search.config.SearchConfig`.
        seed: seeds proposals and runs; the ladder's seeds count up from it.
        workers: processes of one thread each, one per core by default; 0 runs everything here, for a debugger.
        out, name: the folder is <out>/sweeps/<name>.
        overwrite: replace what other inputs or other code left there.

    Raises:
        Refusal: input that cannot be used, in one sentence.
        AuditError: the live model or optimizer is not what the plan says, for example after a OneCycleLR.
        WorkError: `train` raised, with its traceback; or workers kept dying.
        WorkFailed: every trial diverged.
    """
    with _as_arguments():
        base, delta, seed, seeds = map(plain_values, (base, delta, seed, seeds))
        n_trials, n_startup_trials, cohort = map(plain_values, (n_trials, n_startup_trials, cohort))
        require_number("base", base, at_least=1, at_most=MAX_WIDTH, example=64, whole=True)
        delta = 2 * base if delta is None else delta
        rungs = listed("widths", widths, [2 * base, 4 * base])
        search = SearchConfig(
            sampler=sampler,
            pruner="none",  # a user's loop cannot pause
            n_trials=n_trials,
            n_startup_trials=n_startup_trials,
            cohort=cohort,
            space=grouped("space", space, {"learning_rate": {"low": 0.001, "high": 0.1}}),
            initial=[
                grouped(f"initial[{i}]", point, {"learning_rate": 0.01})
                for i, point in enumerate(listed("initial", initial, [{"learning_rate": 0.01}]))
            ],
        )
        ladder = (
            LadderConfig(widths=rungs, offsets=listed("offsets", offsets, [-1, 0, 1]), seeds=seeds) if rungs else None
        )
        check_arguments(base, delta, rungs, seed, seeds, workers, out, name, overwrite)
        check_train(train)
        require(isinstance(table, str), f"table={table!r} must be the name of a table; for example table='mup'.")
        values = as_hyperparameters(hyperparameters)
        require(
            values.decay_timescale is None,
            f"hyperparameters.decay_timescale={values.decay_timescale} {HORIZON_ONLY}; set weight_decay.",
        )
        base_fan_in = plain_values(base_fan_in)
        options = {"roles": roles, "sites": sites, "base_fan_in": base_fan_in, "depth": depth, "head_size": head_size}
        family = _family(build, base, delta, options)
        functions = {"build": build, "train": train, "depth": depth, "head_size": head_size}
        code = fingerprints({key: f for key, f in functions.items() if callable(f)})
        facts = {"base": base, "delta": delta, "table": table, "seed": seed, "hyperparameters": values.as_dict()}
        facts |= {key: _stored(option) for key, option in options.items()}
        work = _Work(
            OwnModel(family, train, table, values, seed, code),
            search,
            ladder,
            default_workers() if workers is None else workers,
            Path(out) / "sweeps" / name,
            {OWN_MODEL: facts, "config": {"search": _identity(search)}, "python": _python(), "code": code},
        )
        work.check()
        try:
            return work.to_end(overwrite)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; run it again to continue") from None
        except (WorkError, UserCodeError) as error:
            raise _as_raised(error) from None


@dataclass(frozen=True)
class _Work:
    """A search with all that it needs.

    Attributes:
        ladder: None where none is wanted.
        workers: processes; 0 for none.
        inputs: what two starts of one study must agree in.
    """

    model: OwnModel
    search: SearchConfig
    ladder: LadderConfig | None
    workers: int
    directory: Path
    inputs: dict[str, Any]

    def check(self) -> None:
        """Refuse a space, a width or functions that no run could have."""
        space = dimensions(self.search.space)
        require(len(space) > 0, 'space={} is empty; for example space={"learning_rate": {"low": 0.001, "high": 0.1}}.')
        for dimension in space:
            self._check_dimension(dimension)
        total_trials(self.search, space)
        initial_points(self.search, space)
        for width in (self.ladder.widths or []) if self.ladder else ():
            self.model.at({"width": width}).parametrized()
        if self.workers > 0:
            _check_sendable(self.model)

    def to_end(self, overwrite: bool) -> OwnSearch:
        """Claim the folder and do whatever is still to do."""
        directory = self.directory
        require_writable(directory.parent)
        mended = self._is_mended()
        if not mended:
            check_claim(directory, self.inputs, "name", overwrite)
        if mended or overwrite or not (directory / CONFIG).exists():
            rehearse(self.model.at({"width": self.model.family.delta}))
        with locked(directory, "name"):
            if mended:
                self._adopt()
            else:
                claim(directory, self.inputs, "name", overwrite)
            check_storage(directory, directory.name, self.search.storage)
            try:
                with Workers(partial(run_task, self.model), self.workers) as pool:
                    best = self._search(pool)
                    rungs = self._climb(best, pool)
            except (WorkError, UserCodeError, AuditError, Refusal) as error:
                write_text(directory / FAILURE, f"{error}\n")
                raise
            (directory / FAILURE).unlink(missing_ok=True)
        return self._result(best, rungs)

    def _check_dimension(self, dimension: Dimension) -> None:
        name = dimension.name
        require(name != "width", "space.width is not searched but climbed; for example widths=[128, 256].")
        require(
            name != "decay_timescale",
            f"space.decay_timescale {HORIZON_ONLY}; search weight_decay.",
        )
        for value in dimension.values or (dimension.low, dimension.high):
            if name == "seed":
                require_number("space.seed.values", value, at_least=0, at_most=MAX_SEED, example=0, whole=True)
            self.model.at({name: value}).parametrized()

    def _is_mended(self) -> bool:
        """Whether the study stopped at an error and what differs since is nothing but the code."""
        path = self.directory / CONFIG
        if not (self.directory / FAILURE).exists() or not path.exists():
            return False
        changed = differences(read_yaml(path, "config").get("inputs", {}), self.inputs)
        return bool(changed) and all(change.startswith("code.") for change in changed)

    def _adopt(self) -> None:
        """Let the study go on with the code as it is now; that of the runs so far stays on record."""
        path = self.directory / CONFIG
        stored = read_yaml(path, "config")
        earlier = [*stored.get("earlier_code", []), stored["inputs"]["code"]]
        write_yaml(path, {**stored, "inputs": self.inputs, "earlier_code": earlier})
        (self.directory / FAILURE).unlink()

    def _search(self, pool: Pool) -> BestValues:
        model, directory = self.model, self.directory
        base = {"table": model.table, "seed": model.seed, **model.hyperparameters.as_dict()}
        with followed(directory, self.workers, lambda params: model.at(params).hyperparameters) as report:
            trials = run_study(directory, directory.name, self.search, pool.run, base=base, report=report)
        if best_trial(trials) is None:
            raise WorkFailed(
                f"all {len(trials)} trials diverged; lower the learning rates in space, under another name."
            )
        return build_dataclass(BestValues, read_yaml(directory / BEST, "study's best values"))

    def _climb(self, best: BestValues, pool: Pool) -> list[OwnRung]:
        """Run the ladder around the best trial; returns its runs."""
        if self.ladder is None:
            return []
        rungs = self._rungs(best, self.ladder)
        gather(rungs, self.directory / LADDER, self.directory / SPARE)
        seen = -1
        with closing(ProgressLine()) as line:

            def report(done: int, total: int, running: list[str]) -> None:
                nonlocal seen
                now = f" · running {', '.join(running)}" if running else ""
                line.show(f"ladder {done}/{total} runs{now} · {clock(line.elapsed)} elapsed", change=done != seen)
                seen = done

            run_open(rungs, pool.run, report)
        return rungs

    def _rungs(self, best: BestValues, ladder: LadderConfig) -> list[OwnRung]:
        """Every run of the ladder, the base width included, the widest first."""
        chosen = self.model.at(best.params)
        facts = {key: value for key, value in self.inputs.items() if key != "config"}
        rungs = []
        widths, offsets, seeds = ladder.widths or [], ladder.offsets or [], ladder.seeds or 1
        for width in sorted({self.model.family.base, *widths}, reverse=True):
            for seed in range(chosen.seed, chosen.seed + seeds):
                for offset in sorted(offsets):
                    rate = chosen.hyperparameters.learning_rate * 2.0**offset
                    hyper = replace(chosen.hyperparameters, learning_rate=rate)
                    run = replace(chosen, width=width, seed=seed, hyperparameters=hyper)
                    name = f"w{width}_lr{rate:.4g}_s{seed}"
                    rungs.append(
                        OwnRung(run, offset, self.directory / LADDER / name, fingerprint(run.as_dict(), facts))
                    )
        return rungs

    def _result(self, best: BestValues, rungs: list[OwnRung]) -> OwnSearch:
        runs = frames.load_runs(self.directory / "trials")
        figures = drawn(lambda: draw_study(self.directory))
        if rungs:
            valleys = frames.valleys(frames.load_runs(self.directory / LADDER))
            figures += drawn(lambda: draw_transfer(self.directory))
        else:
            valleys = pd.DataFrame(columns=[*frames.POINT, "learning_rate", "loss", "diverged"])
        return OwnSearch(
            directory=self.directory,
            best=best,
            trials=runs[["trial", *self.search.space, "value", "diverged", "steps", "seconds"]],
            ladder=frames.optima(valleys),
            drift=frames.drift(valleys),
            figures=figures,
        )


def _family(build: Callable[[int], nn.Module], base: int, delta: int, options: Mapping[str, Any]) -> Family[int]:
    check_build(build)
    for width in (base, delta):
        with torch.random.fork_rng(devices=[]):
            model = called("build", build, width, "make a model at every width")
        require(isinstance(model, nn.Module), f"build({width}) returned {type(model).__name__}, not a torch.nn.Module.")
    return Family(build, base, delta, **options)


def _check_sendable(model: OwnModel) -> None:
    try:
        cloudpickle.dumps(model)
    except Exception as error:
        raise Refusal(
            f"build and train cannot be sent to worker processes ({shown(error)}); open files, locks and generators "
            "inside train, or run everything here with workers=0."
        ) from error


def _stored(option: Any) -> Any:
    """An option of the family as plain data; functions are known by their fingerprints."""
    if isinstance(option, Mapping):
        return {key: value if isinstance(value, (int, float)) else str(value) for key, value in option.items()}
    return None if callable(option) else option


def _identity(search: SearchConfig) -> dict[str, Any]:
    data = plain(search)
    del data["n_trials"]
    return data


def _python() -> str:
    """The fingerprints of code are those of one minor version's bytecode."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _as_raised(error: WorkError | UserCodeError) -> BaseException:
    """What the user is to see: one sentence, the audit, his own exception, or a worker's message."""
    cause = error.__cause__
    if isinstance(error, UserCodeError):  # workers=0: it has the whole traceback
        assert cause is not None
        for note in getattr(error, "__notes__", []):
            cause.add_note(note)
        return cause
    if isinstance(cause, Refusal):
        return Refusal(f"{cause} ({str(error).partition(' failed:')[0]})")
    if isinstance(cause, AuditError):
        cause.add_note(f"in {str(error).partition(' failed:')[0]}")
        return cause
    return WorkError(f"{error}\nRun it again when that is mended: what is finished stays.")


@contextmanager
def _as_arguments() -> Iterator[None]:
    """Refusals name the commands' keys; here the same things are arguments of a function."""
    try:
        yield
    except Refusal as refusal:
        text = re.sub(r"(?<![\w.])(search|ladder|parametrization)\.(?=[a-z])", "", str(refusal))
        raise Refusal(text.replace("overwrite=true", "overwrite=True").replace("=null", "=None")) from refusal.__cause__
