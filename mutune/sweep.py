"""Search the base hyperparameters of a small proxy model with Optuna, under a parametrization.

Rerunning the same command continues the study, or returns at once when it is finished. Results: best.yaml, the trials'
records, the figures and report.html under <out>/sweeps/<study>/.

examples:
  python -m mutune.sweep +sweep=smoke                     # eight tiny trials: does everything run?
  python -m mutune.sweep +sweep=proxy dry_run=true        # what it would do, and what a trial costs
  python -m mutune.sweep study=proxy status=true          # from another shell: where does it stand?
  python -m mutune.sweep +sweep=schedule study=proxy      # then tune its schedule, or narrow its space: +sweep=refine
  python -m mutune.sweep +sweep=proxy study=mine data=text data.path=corpus.jsonl model.depth=8
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.compose import build, compose
from mutune.config import SweepConfig, TransferConfig
from mutune.door import CACHED, OK, WorkFailed, drawn, enter, rehearsed
from mutune.errors import Refusal
from mutune.files import read_yaml, require_writable
from mutune.folders import CONFIG, check_claim, claim, entered
from mutune.search.config import Dimension
from mutune.training.config import RunSpec
from mutune.training.price import price

if TYPE_CHECKING:
    from mutune.search.execution import ExecutionPlan
    from mutune.search.results import Confirmed


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    groups = ("data", "tokenizer", "parametrization", "schedule")
    words = sys.argv[1:] if argv is None else argv
    return enter("sweep", SweepConfig, lambda config: work(config, words), groups, words)


def work(config: SweepConfig, words: Sequence[str] = ()) -> int:
    """Check everything, then run the study to its end.

    Args:
        words: the command line, for a sweep that follows another study and decides little itself.
    """
    from mutune.data.prepare import prepare
    from mutune.search.execution import plan_execution
    from mutune.search.launch import check_launcher
    from mutune.search.proposals import total_trials
    from mutune.search.study import check_space
    from mutune.search.workers import WorkError
    from mutune.training.preflight import check_data

    if not config.study:
        raise Refusal("no sweep was chosen; write for example +sweep=proxy (or study=NAME with a search.space).")
    if config.status:
        print("\n".join(_status(config)))
        return OK
    if config.follows:
        from mutune.follow import follow

        config = follow(config, words)
    spec = config.spec()
    space = check_space(spec, config.search)
    require_writable(Path(config.out))
    check_launcher(config.launcher, config.search.storage)
    if config.dry_run:
        print(describe(config, space))
    corpus = prepare(config.data, config.tokenizer)
    check_data(spec, corpus, "run")
    if config.dry_run:
        documents, passes = len(corpus.train_ends), config.run.tokens / corpus.train_tokens
        trained = f"{corpus.train_tokens:,} tokens of {documents:,} documents to train on"
        print(f"data       {corpus.name}: {trained}, {passes:.2g} times over in a trial")
    directory = Path(config.out) / "sweeps" / str(config.study)
    total = total_trials(config.search, space)
    steps = _whole_runs(config, total) * spec.num_steps
    lack = _memory(config, spec, space, config.workers or 1)
    if not lack:
        try:
            plan = plan_execution(spec, directory, config.device, steps, config.workers, total)
        except WorkError as error:
            raise WorkFailed(str(error)) from error
        print(plan.line(steps), _share(config, steps), sep="\n")
        lack = _memory(config, spec, space, plan.workers)
    if config.dry_run:
        return rehearsed(CACHED, lack)
    if lack:
        raise lack
    return _start(replace(config, workers=plan.workers), plan, space, corpus.content_hash, words)


def _start(
    config: SweepConfig, plan: "ExecutionPlan", space: list[Dimension], data_hash: str, words: Sequence[str]
) -> int:
    """Join the study, whose folder this makes where there is none, and run it to its end."""
    from mutune.search.claims import check_company, joined, members, turn
    from mutune.search.execution import agreed
    from mutune.search.launch import Launch, runner
    from mutune.search.once import fingerprint
    from mutune.search.storage import StorageGone, check_database, check_storage, drop_foreign
    from mutune.search.trial import run_trial
    from mutune.search.workers import WorkError

    directory, storage = Path(config.out) / "sweeps" / str(config.study), config.search.storage

    def settled() -> tuple[SweepConfig, dict[str, Any], str]:
        whole = replace(config, loop=agreed(directory, config.loop, plan))
        inputs = {"config": whole.identity(), "data_hash": data_hash}
        return whole, inputs, fingerprint(inputs)

    whole, inputs, mark = settled()
    check_claim(directory, inputs, "study", config.overwrite)
    check_database(directory, directory.name, storage, mark, config.overwrite)
    with ExitStack() as stack:
        with entered(directory):
            whole, inputs, mark = settled()  # by now another process may have begun the study
            check_company(storage, members(directory), config.overwrite)
            claim(directory, inputs, "study", config.overwrite)
            if config.overwrite:
                drop_foreign(directory, directory.name, storage, mark)
            with turn(directory):
                check_storage(directory, directory.name, storage)
            stack.enter_context(joined(directory))
        try:
            where = Launch(config.launcher, config.jobs, plan.workers, config.resources)
            with runner(partial(run_trial, whole.spec(), config.device), where, words, directory) as run:
                _search(whole, space, directory, data_hash, mark, run)
        except (WorkError, StorageGone) as error:
            raise WorkFailed(f"{error}\nThe same command continues the study.") from error
    return OK


def _status(config: SweepConfig) -> list[str]:
    """Where the study stands; whatever sweep it came from, its own configuration says what it is."""
    from mutune.search.status import status_lines

    name = f"{config.study}-{config.follows}" if config.follows else str(config.study)
    directory = Path(config.out) / "sweeps" / name
    if not (directory / CONFIG).is_file():
        raise Refusal(f"study={name} does not exist in {directory.parent}; begin it, for example with +sweep=proxy.")
    try:
        stored = build(SweepConfig, read_yaml(directory / CONFIG, "study's config")["inputs"]["config"])
    except (KeyError, TypeError, Refusal) as error:
        raise Refusal(f"{directory / CONFIG} is damaged ({error}); restore it from a copy.") from None
    given = config.search.storage  # that of a database may have a password, which is not kept
    return status_lines(directory, given if "://" in given else stored.search.storage, stored.run.num_steps)


def _memory(config: SweepConfig, spec: RunSpec, space: list[Dimension], workers: int) -> Refusal | None:
    """Why the sweep's largest trials do not fit side by side on this host; None where they do, or run elsewhere."""
    from mutune.search.proposals import total_trials
    from mutune.search.trial import trial_spec
    from mutune.training.preflight import require_memory

    if config.launcher != "local":
        return None
    widest = max([spec.model.width, *(value for d in space if d.name == "width" for value in d.values)])
    at_once = min(total_trials(config.search, space), workers)
    cure = f"choose a smaller model.width{' or workers' if at_once > 1 else ', or loop.micro_sequences=1'}"
    try:
        require_memory([trial_spec(spec, {"width": widest})] * at_once, config.device, cure)
    except Refusal as refusal:
        return refusal
    return None


def describe(config: SweepConfig, space: list[Dimension]) -> str:
    """What the sweep would do, in words and numbers."""
    from mutune.search.proposals import total_trials
    from mutune.search.pruning import words

    cost = price(config.spec())
    total = total_trials(config.search, space)
    rows = [
        f"study      {config.study} → {Path(config.out) / 'sweeps' / str(config.study)}",
        f"proxy      width {config.model.width}, depth {config.model.depth}, {config.model.heads} heads, "
        f"{cost.parameters:,} parameters, table {config.parametrization.table}",
        f"trial      {config.run.num_steps} steps × {config.run.tokens_per_step} tokens = {config.run.tokens:,} "
        f"tokens, {cost.flops:.3g} FLOPs at the base width",
        f"pruning    {words(config.search.prunes, config.run.num_steps)}",
        f"search     {total} trials by {config.search.sampler}"
        + (f", in {config.jobs} jobs of {config.launcher}" if config.launcher != "local" else ""),
        *(f"space      {dimension.name}: {dimension}" for dimension in space),
        _whole(config, total, cost.flops),
    ]
    return "\n".join(rows)


def _whole(config: SweepConfig, total: int, flops: int) -> str:
    """What all trials cost together, with what pruning saves where that is known beforehand."""
    prices, again = config.prices, _confirming(config, total)
    runs = _whole_runs(config, total)
    hours = runs * flops / prices.flops_per_gpu_second / 3600
    extra = f", {again} of them to confirm the leaders" if again else ""
    return (
        f"together   as many steps as {runs:.3g} whole runs{extra}: {runs * flops:.3g} FLOPs, {hours:.3g} GPU-hours at "
        f"{prices.flops_per_gpu_second:.3g} FLOP/s, {hours * prices.gpu_hour:,.2f} {prices.currency}"
    )


def _share(config: SweepConfig, steps: float) -> str:
    """What the study costs beside its target, a line.

    Args:
        steps: of the whole study.
    """
    proxy = config.spec()
    target = compose("transfer", TransferConfig, [f"target={config.for_target}"]).target
    tokenizer = target.tokenizer or proxy.tokenizer
    whole = price(replace(proxy, model=target.model, stages=target.run_stages(), tokenizer=tokenizer)).flops
    flops = steps * price(proxy).flops / proxy.num_steps
    return f"budget     {flops:.3g} FLOPs, {flops / whole:.2g} of target {config.for_target}'s {whole:.3g}"


def _whole_runs(config: SweepConfig, total: int) -> float:
    """Whole runs' worth of steps of a study of `total` trials."""
    from mutune.search.pruning import cost

    return cost(config.search.prunes, config.run.num_steps, total, config.search.cohort)[0] + _confirming(config, total)


def _confirming(config: SweepConfig, total: int) -> int:
    """Runs that confirm the leaders."""
    from mutune.search.pruning import cost

    search = config.search
    finished = cost(search.prunes, config.run.num_steps, total, search.cohort)[1]
    return min(search.confirm, finished) * search.confirm_seeds


def _search(
    config: SweepConfig, space: list[Dimension], directory: Path, data_hash: str, mark: str, run: Callable[..., Any]
) -> None:
    """Run the study to its end, confirm its leaders, and write its best values.

    Args:
        run: runs trials, as `Workers.run` does.
    """
    from mutune.search.economics import economics_lines
    from mutune.search.proposals import total_trials
    from mutune.search.results import write_best
    from mutune.search.study import best_trial
    from mutune.search.trial import trial_spec

    trials = _trials(config, directory, mark, run)
    best = best_trial(trials)
    if best is None:
        diverged = sum(trial.user_attrs["diverged"] for trial in trials)
        raise WorkFailed(
            f"none of {len(trials)} trials came to its end: {diverged} diverged, and the others were pruned; lower "
            "search.space.learning_rate and choose another study=."
        )
    confirmed = _leaders(config, directory, trials, data_hash, run) if config.search.confirm else []
    if confirmed:
        best = trials[confirmed[0].trial]
    chosen = trial_spec(config.spec(), best.params)
    lines = economics_lines(space, trials)
    if len(trials) < total_trials(config.search, space):
        lines.insert(0, f"stopped    after {len(trials)} trials, by search.stop_regret={config.search.stop_regret}")
    with entered(directory):
        write_best(directory, directory.name, best, chosen.hyperparameters, chosen.schedule, confirmed)
        _conclude(config, directory, lines)


def _trials(config: SweepConfig, directory: Path, mark: str, run: Callable[..., Any]) -> list[Any]:
    """All trials of the study, which is over."""
    from mutune.search.display import followed
    from mutune.search.study import base_values, run_study
    from mutune.search.trial import trial_spec

    spec = config.spec()
    assert config.workers is not None  # of the plan
    with followed(
        directory,
        config.workers * config.jobs,
        lambda params: trial_spec(spec, params).hyperparameters,
        lambda params: trial_spec(spec, params).schedule,
    ) as report:
        return run_study(
            directory,
            directory.name,
            config.search,
            run,
            base=base_values(spec),
            num_steps=spec.num_steps,
            mark=mark,
            report=report,
        )


def _leaders(
    config: SweepConfig, directory: Path, trials: list[Any], data_hash: str, run: Callable[..., Any]
) -> "list[Confirmed]":
    """The best trials, run again by more seeds, the chosen one first."""
    from mutune.search.confirm import confirm
    from mutune.search.display import confirming

    leaders, seeds = config.search.confirm, config.search.confirm_seeds
    with confirming(directory.name) as told:
        confirmed = confirm(directory, config.spec(), trials, leaders, seeds, data_hash, run, told)
    if not confirmed:
        (directory / "best.yaml").unlink(missing_ok=True)
        raise WorkFailed(
            f"each of the best {leaders} trials diverged by one of {seeds} other seeds; lower "
            "search.space.learning_rate and choose another study=, or take the best as it is with search.confirm=0."
        )
    return confirmed


def _conclude(config: SweepConfig, directory: Path, lines: list[str]) -> None:
    """Draw the figures and the page of a finished study, and say what it found, where that lies, and what follows.

    Args:
        lines: what its trials say of the search itself.
    """
    from mutune.reporting.figures import draw_study
    from mutune.reporting.page import study_page
    from mutune.search.results import read_best

    best = read_best(directory)
    where = "" if config.out == SweepConfig.out else f" out={config.out}"
    next_step = f"python -m mutune.transfer study={config.study}{where} target=small  (or target=btlm_3b)"
    if not config.follows and "width" not in best.params:
        next_step += f"; or first its schedule: python -m mutune.sweep +sweep=schedule study={config.study}{where}"
    if "width" in best.params:
        next_step = f"look at {directory / 'figures'}; a transfer wants a study at one width, such as +sweep=proxy"
    written = [directory / "best.yaml", *drawn(lambda: draw_study(directory))]
    written += drawn(lambda: [study_page(directory, next_step)], "report")
    seeds = f", mean over {len(best.confirmed[0].losses)} seeds" if best.confirmed else ""
    print(
        f"best       trial {best.trial}: held-out loss {best.heldout_loss:.4f} nats per token "
        f"({best.heldout_bits_per_byte:.4f} bits per byte){seeds}"
    )
    for key, value in best.params.items():
        print(f"           {key} = {value if isinstance(value, (str, int)) else format(value, '.5g')}")
    for row in best.confirmed:
        print(f"confirmed  {row}")
    if sum(row.tied for row in best.confirmed) > 1:
        print("           (of those that are not told apart, the lowest learning rate is taken; ± is pooled over all)")
    for line in lines:
        print(line)
    print(f"written    {', '.join(map(str, written))}")
    print(f"next       {next_step}")


if __name__ == "__main__":
    sys.exit(main())
