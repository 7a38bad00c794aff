"""Carry a study's best values to a target: train a ladder, measure the drift of the optimum, give a verdict.

The ladder varies the width, and the tokens, each alone: `ladder=[width,tokens,batch,depth]` says which (short for
`ladder.axes=`), `ladder.widths=[64,128]` and the like which rungs, `budget_minutes=` what it may cost.

Writes the transfer file that `python -m mutune.train` takes, the plan, the certificate, figures and report.html under
<out>/transfer/<study>--<target>/. `study=published` takes BTLM-3B-8K's own values and needs no ladder.

examples:
  python -m mutune.transfer target=small                  # the study `proxy`, to a target for a laptop
  python -m mutune.transfer study=mine target=small target.model.width=256 target.name=wider ladder.seeds=3
  python -m mutune.transfer study=published dry_run=true  # what BTLM-3B-8K costs
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.certificate.config import Provenance, TransferFile
from mutune.compose import build, compose, data_dir, plain
from mutune.config import PUBLISHED, SweepConfig, TransferConfig
from mutune.door import CACHED, NOT_GO, OK, WorkFailed, drawn, enter, rehearsed
from mutune.errors import Refusal, require
from mutune.files import read_yaml, require_writable, write_yaml
from mutune.folders import check_claim, claim, locked
from mutune.model.shape import BaseConfig, base_config
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.training.config import RunSpec
from mutune.training.passes import readings, text_lines
from mutune.training.price import price, price_table
from mutune.training.schedule import ScheduleConfig
from mutune.versions import versions

if TYPE_CHECKING:
    from mutune.certificate.adviser import Advice
    from mutune.certificate.judged import Judged
    from mutune.certificate.planned import Ladder, Paid

LADDER, SPARE, COMPARED = "ladder", "spare", "compare"


@dataclass(frozen=True)
class PublishedValues:
    """`conf/published.yaml`: base hyperparameters that were published, with their source."""

    source: str
    parametrization: ParametrizationConfig
    base: BaseConfig
    hyperparameters: BaseHyperparameters
    schedule: ScheduleConfig


@dataclass(frozen=True)
class Source:
    """A study's side of a transfer: the file without its verdict, the proxy's run (None if published), its trials."""

    transfer: TransferFile
    proxy: RunSpec | None
    trials: tuple["Paid", ...] = ()
    steps: int = 0  # that the study made


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    words = [_axes(word) for word in (sys.argv[1:] if argv is None else argv)]
    return enter("transfer", TransferConfig, work, ("target",), words)


def _axes(word: str) -> str:
    """`ladder=[width,tokens]` is short for `ladder.axes=[width,tokens]`."""
    key, equals, value = word.partition("=")
    if key != "ladder" or not equals or value.startswith("{"):
        return word
    return f"ladder.axes={value if value.startswith('[') else f'[{value}]'}"


def work(config: TransferConfig) -> int:
    """Check everything, then run the ladder (if any) and write the results."""
    if config.runs or config.optima:
        return _from_table(config)
    source = _published(config) if config.study == PUBLISHED else _from_study(config)
    target = source.transfer.spec(config.seed)
    require_writable(Path(config.out))
    directory = Path(config.out) / "transfer" / f"{config.study}--{config.target.name}"
    ladders = _plan_ladders(config, source, target, directory)
    _check_target_data(source.transfer, target)
    own = next(iter(ladders.values()), None)
    advice, unable = _advice(config, source.proxy, target, own), _foreseen(config, source, target, own)
    if config.dry_run:
        tuning = [f"tuning     {words}" for words in _tuning(source, target)]
        print("\n".join([_dry_run(config, ladders, target, advice), *tuning, *unable]))
        return rehearsed(CACHED)
    for line in unable:
        print(line, flush=True)
    inputs = _inputs(source)
    check_claim(directory, inputs, "target.name", config.overwrite)
    with locked(directory, "target.name"):
        claim(directory, inputs, "target.name", config.overwrite, keep=(LADDER, SPARE, COMPARED))
        verdict = _certify(config, source, target, directory, ladders, advice)
    return NOT_GO if config.require_go and verdict != "GO" else OK


def _from_table(config: TransferConfig) -> int:
    """The certificate, or the drift statement, of somebody's finished runs."""
    from mutune.certificate.anyone import Asked, from_optima, from_runs, runs_hash
    from mutune.certificate.certificate import spoken, write_certificate
    from mutune.certificate.table import read_optima, read_tables, to_tables
    from mutune.reporting.figures import draw_certificate
    from mutune.reporting.page import transfer_page

    require(
        config.target == compose("transfer", TransferConfig, []).target,
        f"target is read with a study, and {config.from_table} has none; ask with target_width=, for example "
        "target_width=256.",
    )
    rate, parameters = config.hyperparameters.learning_rate, config.target_parameters
    asked = Asked(config.asked, rate, parameters, config.prices, config.horizon)
    if config.optima:
        source, data = config.optima, from_optima(read_optima(config.optima), asked, config.optima)
    else:
        source = str(config.runs)
        if "://" in source:
            from mutune.search.foreign import read_foreign

            tables = to_tables(read_foreign(source, config.runs_study), f"runs={source}", independent=True)
        else:
            tables = read_tables(source)
        data = from_runs(tables, asked, source)
    print("\n".join([*_question(config, data), *spoken(data)]))
    code = NOT_GO if config.require_go and data["verdict"] != "GO" else OK
    if config.dry_run:
        print("dry run: nothing was written; leave out dry_run=true to keep the certificate.")
        return code
    require_writable(Path(config.out))
    directory = Path(config.out) / "transfer" / f"{_stem(source)}--{_asked_about(data)}"
    question: dict[str, Any] = {"asked": plain(asked) | {"target": data["target"]}, "runs_hash": runs_hash(data)}
    if "laws" not in data:
        question["asked"].pop("horizon")  # nothing was asked of it
    check_claim(directory, question, "out", config.overwrite)
    with locked(directory, "out"):
        claim(directory, question, "out", config.overwrite)
        write_certificate(directory, data)
        figures = drawn(lambda: draw_certificate(directory))
        next_step = (
            "\n".join(data["settle"]) or f"train the target at the base learning rate {data['learning_rate']:.5g}"
        )
        pages = drawn(lambda: [transfer_page(directory, next_step)], "report")
    names = ["certificate.md", "certificate.json", *_names(figures), *(page.name for page in pages)]
    print(f"written    {directory}/: {', '.join(names)}")
    if not data["settle"]:  # which were said already
        print(f"next       {next_step}")
    return code


def _question(config: TransferConfig, data: dict[str, Any]) -> list[str]:
    """What is answered: the target, and the rate that is judged, with where they are from."""
    width, narrowest = data["target"]["width"], min(found["width"] for found in data.get("optima") or data["rungs"])
    asked = "" if config.target_width else ", twice the widest; target_width= asks about another"
    given = config.hyperparameters.learning_rate is not None
    whose = "hyperparameters.learning_rate=" if given else f"the optimum at width {narrowest:,.10g}"
    return [
        f"target     width {width:,.10g}{asked}",
        f"rate       {data['learning_rate']:.5g} is the transferred one: {whose}",
    ]


def _names(figures: list[Path]) -> list[str]:
    return [f"figures/{figure.name}" for figure in figures]


def _asked_about(data: dict[str, Any]) -> str:
    """The target's width, and what else of it is not that of the largest run: `width256-tokens4000000000`."""
    largest = {
        axis: max((rung[axis] or 0 for rung in data["rungs"]), default=0) for axis in ("depth", "tokens", "batch")
    }
    others = [axis for axis, value in largest.items() if data["target"].get(axis, value) != value]
    return "-".join(f"{axis}{data['target'][axis]:.10g}" for axis in ("width", *others))


def _stem(source: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(source).stem) or "runs"


def _inputs(source: Source) -> dict[str, Any]:
    """What two starts of one transfer must agree in; each run of the ladder says for itself what made it."""
    transfer = source.transfer.as_dict()
    del transfer["provenance"]["commit"], transfer["prediction"]
    return {"transfer": transfer}


def _plan_ladders(config: TransferConfig, source: Source, target: RunSpec, directory: Path) -> dict[str, "Ladder"]:
    """What each table's ladder will do, the study's own first, checked against text and memory.

    There is none for published values.
    """
    from mutune.certificate.judged import under
    from mutune.certificate.planned import plan_ladder
    from mutune.data.prepare import prepare
    from mutune.training.preflight import check_data, require_memory

    if (proxy := source.proxy) is None:
        return {}
    corpus = prepare(proxy.data, proxy.tokenizer)
    source.transfer.check_text(corpus.content_hash)
    check_data(proxy, corpus, "the study's run")
    own, ladders = proxy.parametrization.table, {}
    for table in dict.fromkeys([own, *(config.compare or [])]):
        folder = directory / LADDER if table == own else directory / COMPARED / table
        files = (folder, config.device, corpus.content_hash, source.trials)
        try:
            ladder = plan_ladder(under(table, proxy), target, config.ladder, config, *files)
            ladders[table] = replace(ladder, elsewhere=_elsewhere(directory, "" if table == own else table))
        except Refusal as refusal:
            if table == own:
                raise
            raise Refusal(
                f"compare={config.compare}: the study's run cannot be one of {table} ({str(refusal).rstrip('.')}); "
                "leave that table out, for example compare=[sp]."
            ) from refusal
    ladder = ladders[own]
    runs = sorted((ladder.rungs[run.rung] for run in ladder.first.runs), key=lambda spec: -price(spec).bytes)
    require_memory(runs[: ladder.workers], config.device, "choose a smaller ladder.widths or ladder.workers")
    return ladders


def _elsewhere(directory: Path, compared: str) -> tuple[Path, ...]:
    """Where other transfers keep the runs of their ladders, of a table that is compared or of the study's own."""
    places = (Path(COMPARED) / compared if compared else Path(LADDER), Path(SPARE) / compared)
    others = [path for path in sorted(directory.parent.glob("*")) if path != directory]
    return tuple(path / place for path in others for place in places)


def _check_target_data(transfer: TransferFile, target: RunSpec) -> None:
    """Refuse a target whose text is here and does not serve it; text that lies elsewhere is for `mutune.train`."""
    from mutune.data.prepare import prepare
    from mutune.training.preflight import check_data

    same = (target.data, target.tokenizer) == (transfer.data, transfer.tokenizer)
    if same or transfer.target.data is not None:
        check_data(target, prepare(target.data, target.tokenizer), "target.stages[{}]")


def _from_study(config: TransferConfig) -> Source:
    from mutune.certificate.planned import Paid
    from mutune.search.confirm import FOLDER, confirmed_runs
    from mutune.search.results import check_best, load_study
    from mutune.search.study import finished_trials
    from mutune.search.trial import trial_spec
    from mutune.training.result import METRICS

    study = load_study(Path(config.out) / "sweeps", config.study)
    try:
        stored = build(SweepConfig, study.config)
    except Refusal as refusal:
        raise Refusal(
            f"study={config.study}: its config.yaml is damaged ({refusal}); run its sweep again."
        ) from refusal
    best = trial_spec(stored.spec(), study.best.params)
    check_best(study, stored.search.space, best.hyperparameters, best.schedule)
    proxy = replace(best, seed=config.seed)
    hyper = config.hyperparameters.apply(proxy.hyperparameters)
    if proxy.model.width != proxy.base.width:
        raise Refusal(
            f"study={config.study} searched over widths, so it has no proxy of its own; "
            f"use a study at one width, for example study=proxy."
        )
    proxy = replace(proxy, hyperparameters=hyper)
    provenance = Provenance(
        study=config.study,
        source=str(study.directory),
        trial=study.best.trial,
        heldout_loss=study.best.heldout_loss,
        data_hash=study.data_hash,
        study_commit=study.commit,
        commit=versions()["commit"],
        overridden=sorted(config.hyperparameters.given()),
    )
    trials = [
        Paid(trial_spec(stored.spec(), trial.params), result, study.directory / "trials" / str(trial.number))
        for trial, result in finished_trials(study.directory, study.name, stored.search.storage)
        if (study.directory / "trials" / str(trial.number)).is_dir()
    ]
    trials += [Paid(*made) for made in confirmed_runs(study.directory, stored.spec(), study.data_hash)]
    transfer = _transfer_file(config, provenance, proxy.parametrization, base_config(proxy.model), hyper, proxy)
    records = [path for part in ("trials", FOLDER) for path in (study.directory / part).glob(f"*/{METRICS}")]
    return Source(transfer, proxy, tuple(trials), sum(path.read_bytes().count(b"\n") for path in records))


def _published(config: TransferConfig) -> Source:
    values = build(PublishedValues, read_yaml(data_dir("conf") / "published.yaml", "file of published values"))
    provenance = Provenance(
        study=PUBLISHED,
        source=values.source,
        commit=versions()["commit"],
        overridden=sorted(config.hyperparameters.given()),
    )
    hyper = config.hyperparameters.apply(values.hyperparameters)
    defaults = replace(SweepConfig().spec(), schedule=values.schedule)
    return Source(_transfer_file(config, provenance, values.parametrization, values.base, hyper, defaults), None)


def _transfer_file(
    config: TransferConfig,
    provenance: Provenance,
    parametrization: ParametrizationConfig,
    base: BaseConfig,
    hyper: BaseHyperparameters,
    study: RunSpec,
) -> TransferFile:
    if not config.target.stages:
        raise Refusal("target.stages=[] is empty; choose a target, for example target=small.")
    return TransferFile(
        provenance=provenance,
        parametrization=parametrization,
        base=base,
        hyperparameters=hyper,
        schedule=study.schedule,
        data=study.data,
        tokenizer=study.tokenizer,
        target=config.target.resolved(),
        verdict="NOT CERTIFIED",
    )


def _advice(config: TransferConfig, proxy: RunSpec | None, target: RunSpec, ladder: "Ladder | None") -> list["Advice"]:
    from mutune.certificate.adviser import advise, by_severity, repeating, without_shares
    from mutune.certificate.rungs import places

    if ladder is None:
        found = advise(proxy, target)
    else:
        furthest = places(ladder.rungs).max()
        measured = {axis: float(furthest[axis]) for axis in ladder.config.chosen_axes}
        found = advise(proxy, target, measured, [rung.model.width for rung in ladder.rungs])
    found = found if config.target.tokens is None else without_shares(found)
    return by_severity([*found, *repeating(readings(target))])


def _tuning(source: Source, target: RunSpec) -> list[str]:
    """What the study cost beside the target, a line or none."""
    if source.proxy is None or source.steps == 0:
        return []
    flops = source.steps * price(source.proxy).flops / source.proxy.num_steps
    study = source.transfer.provenance.study
    share = flops / price(target).flops
    return [f"study {study} made {source.steps:,} steps: {flops:.3g} FLOPs, {share:.2g} of the target's"]


def _foreseen(config: TransferConfig, source: Source, target: RunSpec, ladder: "Ladder | None") -> list[str]:
    """Lines about what no run of the ladder can certify."""
    from mutune.certificate.differences import difference_table
    from mutune.certificate.laws import law_slopes
    from mutune.certificate.points import AXES
    from mutune.certificate.rungs import place, places
    from mutune.certificate.verdict import foreseen
    from mutune.data.prepare import prepare

    if (proxy := source.proxy) is None or ladder is None:
        return []
    vocab_size = prepare(proxy.data, proxy.tokenizer).vocab_size
    differing = difference_table(proxy, target, vocab_size, target.tokenizer.num_ids, {})
    rungs = places(ladder.rungs)
    laws = law_slopes(config.horizon, [axis for axis in AXES if rungs[axis].nunique() > 1])
    reasons = foreseen(differing, rungs, place(target), proxy.parametrization.table, laws)
    lead = "foreseen   NOT CERTIFIED, if not NO-GO, whatever the ladder finds:"
    return [lead, *(f"           - {reason}" for reason in reasons)] if reasons else []


def _dry_run(config: TransferConfig, ladders: dict[str, "Ladder"], target: RunSpec, advice: list["Advice"]) -> str:
    from mutune.certificate.adviser import advice_lines
    from mutune.certificate.planned import words

    lines = [price_table(config.target.name, target), *text_lines(readings(target))]
    for table, ladder in ladders.items():
        lines += words(ladder, f"ladder {table}" if len(ladders) > 1 else "ladder")
    lines += advice_lines(advice)
    return "\n".join(lines)


def _certify(
    config: TransferConfig,
    source: Source,
    target: RunSpec,
    directory: Path,
    ladders: dict[str, "Ladder"],
    advice: list["Advice"],
) -> str:
    """Give the advice, run the ladder, write every result, and return the verdict."""
    from mutune.certificate.adviser import advice_lines
    from mutune.certificate.certificate import spoken, write_certificate
    from mutune.reporting.figures import draw_certificate, draw_transfer
    from mutune.reporting.page import transfer_page
    from mutune.training.run import write_plan

    for line in advice_lines(advice):
        print(line, flush=True)
    if source.proxy is None:
        judged = _judge_published(source.transfer, target)
    else:
        judged = _judge_ladders(config, ladders, target, directory)
    tables = [table for table in config.compare or [] if table != source.transfer.parametrization.table]
    compared = [directory / COMPARED / table for table in tables]
    figures = drawn(lambda: draw_transfer(directory, compared)) if judged.assessment else []
    transfer = replace(source.transfer, prediction=judged.prediction).sealed(judged.verdict.verdict)
    data = _data(config, source.proxy, target, transfer, judged, advice, directory)
    data["notes"] = [*data.get("notes", []), *_tuning(source, target)]
    write_certificate(directory, data)
    write_plan(directory, target.plan(target.tokenizer.num_ids))
    write_yaml(directory / "transfer.yaml", transfer.as_dict(), "for: python -m mutune.train transfer=<this file>")
    print("\n".join(spoken(data)))
    names = ["transfer.yaml", "certificate.md", "certificate.json", "parametrization.csv", "multipliers.csv"]
    names += _names(figures + drawn(lambda: draw_certificate(directory)))
    next_step = f"python -m mutune.train transfer={directory / 'transfer.yaml'} dry_run=true{_hardware(target)}"
    names += [path.name for path in drawn(lambda: [transfer_page(directory, next_step)], "report")]
    print(f"written    {directory}/: {', '.join(names)}")
    print(f"next       {next_step}")
    return judged.verdict.verdict


def _hardware(target: RunSpec) -> str:
    """The hardware to price a target on that is too large for this machine's memory; nothing where it is not."""
    from mutune.training.device import device_name, free_memory

    if price(target).bytes <= free_memory(device_name("auto")):
        return ""
    gpus = next(n for n in (8, 4, 2, 1) if all(stage.batch_sequences % n == 0 for stage in target.stages))
    return f" hardware=h100-sxm gpus={gpus}"


def _judge_ladders(config: TransferConfig, ladders: dict[str, "Ladder"], target: RunSpec, directory: Path) -> "Judged":
    from mutune.certificate.judged import UnmeasuredError, judge_ladders
    from mutune.search.workers import WorkError

    own = next(iter(ladders))
    spares = {table: directory / SPARE / ("" if table == own else table) for table in ladders}
    try:
        return judge_ladders(ladders, target, config.horizon, spares)
    except WorkError as error:
        raise WorkFailed(f"{error}\nThe same command continues the ladder.") from error
    except UnmeasuredError as error:
        raise WorkFailed(str(error)) from error


def _judge_published(transfer: TransferFile, target: RunSpec) -> "Judged":
    from mutune.certificate.differences import published_differences
    from mutune.certificate.judged import Judged
    from mutune.certificate.prediction import PUBLISHED as UNPREDICTED
    from mutune.certificate.verdict import published_verdict

    differing = published_differences(transfer.base.width, target)
    return Judged(published_verdict(transfer), differing, UNPREDICTED)


def _data(
    config: TransferConfig,
    proxy: RunSpec | None,
    target: RunSpec,
    transfer: TransferFile,
    judged: "Judged",
    advice: list["Advice"],
    directory: Path,
) -> dict[str, Any]:
    """The certificate as plain data."""
    from mutune.certificate.certificate import certificate
    from mutune.certificate.comparison import comparison
    from mutune.certificate.laws import law_table
    from mutune.certificate.prediction import outcomes

    rate, table, found = transfer.hyperparameters.learning_rate, transfer.parametrization.table, judged.assessment
    cost = price(target)
    regret = found.price(cost.flops / cost.tokens, config.prices) if found else None
    named = asdict(transfer.target)
    data = certificate(named, rate, table, judged.verdict, judged.differences, found, regret, advice)
    data["prediction"], data["seal"] = asdict(judged.prediction), transfer.seal
    data["outcome"] = outcomes(directory / "certificate.json", transfer.seal) or []
    if proxy and found:
        data["laws"] = law_table(config.horizon, proxy, target, found.nearest_values())
    if judged.notes:
        data["notes"] = judged.notes
    if judged.compared:
        data |= comparison(judged.compared)
    return data


if __name__ == "__main__":
    sys.exit(main())
