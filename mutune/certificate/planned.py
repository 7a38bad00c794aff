"""What a ladder will do: its rungs, its budget, the trials of the study that it need not run again."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from mutune.certificate.budget import Budget, Timed, budget_of
from mutune.certificate.config import BudgetConfig, LadderConfig
from mutune.certificate.design import Design, Next, Plan, first_offsets, grid_runs
from mutune.certificate.ladder import LadderRun, made_here
from mutune.certificate.rungs import at, place, places, rung_name, rung_specs
from mutune.errors import require
from mutune.search.once import fingerprint, finished
from mutune.search.workers import default_workers
from mutune.training.config import MAX_SEED, RunSpec
from mutune.training.price import price
from mutune.training.result import RunResult

GRID_SEEDS, DESIGN_SEEDS = 2, 8


@dataclass(frozen=True)
class Paid:
    """A finished trial of the study, which the ladder need not run again."""

    spec: RunSpec
    result: RunResult
    directory: Path


@dataclass(frozen=True)
class Ladder:
    """What a ladder will do.

    Attributes:
        rungs: the study's run first. design: the same as places.
        paid: trials of the study, by fingerprint.
        directory: of its runs; `spare` is beside it.
        elsewhere: folders of other ladders, whose runs are copied where they are this one's.
    """

    config: LadderConfig
    rungs: tuple[RunSpec, ...]
    target: RunSpec
    design: Design
    budget: Budget
    paid: Mapping[str, Paid]
    directory: Path
    device: str
    data_hash: str
    elsewhere: tuple[Path, ...] = ()

    @property
    def workers(self) -> int:
        """How many processes."""
        return _workers(self.config, self.rungs[0])

    @cached_property
    def first(self) -> Plan:
        """The runs that are sure: of a grid all, by design those of every rung that the budget has room for."""
        cost = self.budget.shares(self.rungs, [])
        offsets = self.config.offsets
        by_seed = first_offsets(self.design.max_seeds) if offsets is None else [sorted(offsets)] * self.design.max_seeds
        return grid_runs(self.design, by_seed, cost, 1.0)

    def run(self, wanted: Next) -> LadderRun:
        """A planned run."""
        spec = self.rungs[wanted.rung]
        rate = self.rungs[0].hyperparameters.learning_rate * 2.0**wanted.offset
        spec = replace(spec, hyperparameters=replace(spec.hyperparameters, learning_rate=rate), seed=wanted.seed)
        return self._of(spec, wanted.offset)

    def reused(self) -> list[LadderRun]:
        """The study's trials that differ from its best in learning rate and seed alone; a grid takes only its own."""
        best = self.rungs[0]
        runs = []
        for paid in self.paid.values() if self.config.offsets is None else ():
            rate = paid.spec.hyperparameters.learning_rate
            hyper = replace(paid.spec.hyperparameters, learning_rate=best.hyperparameters.learning_rate)
            if replace(paid.spec, hyperparameters=hyper, seed=best.seed) == best:
                runs.append(self._of(paid.spec, math.log2(rate / best.hyperparameters.learning_rate)))
        return list({run.directory: run for run in runs}.values())

    def twin(self, run: LadderRun) -> Paid | None:
        """The same run, finished, of another ladder, made by the same code and libraries on the same kind of device."""
        for folder in self.elsewhere:
            other = replace(run, directory=folder / run.directory.name)
            if (result := finished(other)) is not None and made_here(other):
                return Paid(run.spec, result, other.directory)
        return None

    def _of(self, spec: RunSpec, offset: float) -> LadderRun:
        rate, name = spec.hyperparameters.learning_rate, rung_name(spec, self.rungs[0])
        directory = self.directory / f"{name}_lr{rate:.4g}_s{spec.seed}"
        return LadderRun(name, offset, spec, directory, self.device, self.data_hash)


def plan_ladder(
    proxy: RunSpec,
    target: RunSpec,
    config: LadderConfig,
    limits: BudgetConfig,
    directory: Path,
    device: str,
    data_hash: str,
    trials: Iterable[Paid] = (),
) -> Ladder:
    """What to do for a target.

    Raises:
        Refusal: no rung besides the study's own, one that its run cannot be, or too many seeds.
    """
    seeds = config.seeds or (DESIGN_SEEDS if config.offsets is None else GRID_SEEDS)
    require(
        proxy.seed + seeds - 1 <= MAX_SEED,
        f"seed={proxy.seed} and ladder.seeds={seeds} go beyond the largest seed, {MAX_SEED}; for example seed=0.",
    )
    paid = {fingerprint(trial.spec.as_dict(), data_hash): trial for trial in trials}
    timed = [Timed(trial.spec, trial.result.seconds) for trial in paid.values() if not trial.result.diverged]
    count = sum(map(len, first_offsets(seeds))) if config.offsets is None else len(config.offsets) * seeds
    workers = _workers(config, proxy)
    listed = sum(count * price(spec).flops for spec in _listed(proxy, config))
    budget = budget_of(limits, proxy, target, workers, timed, listed)
    rungs = rung_specs(proxy, target, config, limits, lambda spec: count * float(budget.shares([spec], [])[0]))
    log2_rate = math.log2(proxy.hyperparameters.learning_rate)
    design = Design(places(rungs), 0, place(target), log2_rate, proxy.seed, seeds)
    return Ladder(config, tuple(rungs), target, design, budget, paid, directory, device, data_hash)


def _workers(config: LadderConfig, proxy: RunSpec) -> int:
    return config.workers or max(1, default_workers() // (proxy.loop.threads or 1))


def _listed(proxy: RunSpec, config: LadderConfig) -> list[RunSpec]:
    """The rungs that are listed, the base too; none where none is."""
    listed = [at(proxy, axis, value) for axis in config.chosen_axes for value in config.rungs(axis) or []]
    return [proxy, *listed] if listed else []


def words(ladder: Ladder, name: str = "ladder") -> list[str]:
    """What a ladder of this name will do and cost: a line for each rung, and what follows."""
    lines = [_rung_words(ladder, rung) for rung in range(len(ladder.rungs))]
    lines.append(f"{'together':<14} {_cost(ladder, ladder.first.runs)}")
    own = [run for run in map(ladder.run, ladder.first.runs) if run.fingerprint not in ladder.paid]
    if known := sum(ladder.twin(run) is not None for run in own):
        lines.append(f"{'known':<14} runs of other transfers, which are copied: {known}")
    if ladder.config.offsets is None:
        budget = ladder.budget
        limits = [f"{budget.flops:.3g} FLOPs"] if math.isfinite(budget.flops) else []
        limits += [f"{budget.minutes(ladder.workers):g} minutes"] if math.isfinite(budget.seconds) else []
        lines.append(
            f"{'then':<14} rates beyond an edge, and rates and seeds where they tell most, up to {' and '.join(limits)}"
        )
    return [f"{name if i == 0 else '':<10} {line}" for i, line in enumerate(lines)]


def _rung_words(ladder: Ladder, rung: int) -> str:
    name = rung_name(ladder.rungs[rung], ladder.rungs[0])
    runs = [run for run in ladder.first.runs if run.rung == rung]
    if not runs:
        return f"{name:<14} left out: the budget has no room for it"
    rates = ", ".join(f"{offset:+g}" for offset in sorted({run.offset for run in runs}))
    known = rung == 0 or ladder.config.offsets is not None
    around = "the study's best" if known else "the expected optimum"
    seeds = len({run.seed for run in runs})
    return f"{name:<14} {_cost(ladder, runs)}; rates {rates} octaves around {around}, {seeds} seed{'s' * (seeds > 1)}"


def _cost(ladder: Ladder, runs: list[Next]) -> str:
    specs = [ladder.rungs[run.rung] for run in runs]
    flops = sum(price(spec).flops for spec in specs)
    minutes = ladder.budget.seconds_of(specs) / 60 / min(ladder.workers, len(runs))
    share = flops / price(ladder.target).flops
    return f"{len(runs)} runs, {flops:.3g} FLOPs, {share:.2g} of the target's, about {minutes:.2g} minutes"
