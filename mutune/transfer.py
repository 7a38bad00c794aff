"""Carry a study's best values to a target: train a ladder of widths, measure the drift of the optimum, give a verdict.

Writes the transfer file that `python -m mutune.train` takes, the plan, the certificate and the figures under
<out>/transfer/<study>--<target>/. `study=published` takes BTLM-3B-8K's own values and needs no ladder.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutune.certificate.config import Provenance, TransferFile
from mutune.compose import build, data_dir, plain
from mutune.config import SweepConfig, TransferConfig
from mutune.door import NOT_GO, OK, WorkFailed, enter
from mutune.errors import Refusal
from mutune.files import read_yaml, require_writable, write_yaml
from mutune.folders import check_claim, claim, locked
from mutune.model.shape import BaseConfig, base_config
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.training.config import RunSpec
from mutune.training.price import price, price_table
from mutune.training.schedule import ScheduleConfig
from mutune.versions import versions

PUBLISHED = "published"


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
    """A study's side of a transfer: the file without its verdict, and the proxy's run (None if published)."""

    transfer: TransferFile
    proxy: RunSpec | None


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return enter("transfer", TransferConfig, work, ("target",), sys.argv[1:] if argv is None else argv)


def work(config: TransferConfig) -> int:
    """Check everything, then run the ladder (if any) and write the results."""
    source = _published(config) if config.study == PUBLISHED else _from_study(config)
    target = source.transfer.spec(config.seed)
    require_writable(Path(config.out))
    if config.dry_run:
        print(_dry_run(config, source, target))
        return OK
    directory = Path(config.out) / "transfer" / f"{config.study}--{config.target.name}"
    inputs = _inputs(config, source)
    check_claim(directory, inputs, "target.name", config.overwrite)
    with locked(directory, "target.name"):
        claim(directory, inputs, "target.name", config.overwrite)
        verdict = _certify(config, source, target, directory)
    return NOT_GO if config.require_go and verdict != "GO" else OK


def _inputs(config: TransferConfig, source: Source) -> dict[str, Any]:
    """What two starts of one transfer must agree in."""
    transfer, ladder = plain(source.transfer), plain(config.ladder)
    del transfer["provenance"]["commit"], ladder["workers"]
    inputs = {"transfer": transfer, "seed": config.seed}
    return inputs if source.proxy is None else {**inputs, "ladder": ladder}


def _from_study(config: TransferConfig) -> Source:
    from mutune.search.results import load_study
    from mutune.search.study import trial_spec

    study = load_study(Path(config.out) / "sweeps", config.study)
    stored = build(SweepConfig, study.config)
    proxy = trial_spec(stored.spec(), study.best["params"])
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
        trial=study.best["trial"],
        heldout_loss=study.best["heldout_loss"],
        data_hash=study.data_hash,
        study_commit=study.versions["commit"],
        commit=versions()["commit"],
        overridden=sorted(config.hyperparameters.given()),
    )
    return Source(
        _transfer_file(config, provenance, proxy.parametrization, base_config(proxy.model), hyper, proxy), proxy
    )


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
        target=config.target,
        verdict="NOT CERTIFIED",
    )


def _dry_run(config: TransferConfig, source: Source, target: RunSpec) -> str:
    lines = [price_table(config.target.name, target)]
    if source.proxy is not None:
        widths = sorted({source.proxy.model.width, *config.ladder.widths})
        runs = len(config.ladder.offsets) * config.ladder.seeds
        flops = 0.0
        for width in widths:
            flops += runs * price(replace(source.proxy, model=source.proxy.model.at_width(width))).flops
        share = flops / price(target).flops
        lines.append(
            f"ladder     widths {', '.join(map(str, widths))} × {len(config.ladder.offsets)} rates × "
            f"{config.ladder.seeds} seeds = {runs * len(widths)} runs, {flops:.3g} FLOPs, {share:.2g} of the target's"
        )
    lines.append("dry run: nothing was written; leave out dry_run=true to start.")
    return "\n".join(lines)


def _certify(config: TransferConfig, source: Source, target: RunSpec, directory: Path) -> str:
    """Run the ladder, write every result, and return the verdict."""
    from mutune.certificate.certificate import certificate, write_certificate
    from mutune.certificate.ladder import Rung
    from mutune.certificate.valley import Drift
    from mutune.certificate.verdict import published_differences, published_verdict
    from mutune.training.run import write_plan

    rungs: list[Rung] = []
    drift: Drift | None = None
    if source.proxy is None:
        verdict = published_verdict(source.transfer)
        differing = published_differences(source.transfer.base.width, target)
        figures: list[Path] = []
    else:
        rungs, drift, verdict, differing = _ladder(config, source.proxy, target, directory)
        from mutune.reporting.figures import draw_transfer

        figures = draw_transfer(directory)
    transfer = replace(source.transfer, verdict=verdict.verdict)
    data = certificate(transfer, verdict, differing, rungs, drift)
    write_certificate(directory, data)
    write_plan(directory, target.plan(target.tokenizer.num_ids))
    write_yaml(directory / "transfer.yaml", transfer.as_dict(), "for: python -m mutune.train transfer=<this file>")
    _say(data, transfer, directory, figures)
    return verdict.verdict


def _ladder(config: TransferConfig, proxy: RunSpec, target: RunSpec, directory: Path) -> Any:
    from mutune.certificate.ladder import fit_rungs, ladder_runs, optima, run_ladder
    from mutune.certificate.valley import fit_drift
    from mutune.certificate.verdict import difference_table, judge
    from mutune.data.prepare import prepare
    from mutune.progress import ProgressLine, clock
    from mutune.search.workers import WorkError

    corpus = prepare(proxy.data, proxy.tokenizer)
    runs = ladder_runs(proxy, config.ladder, directory / "ladder", config.device, corpus.content_hash)
    line, seen = ProgressLine(), -1

    def report(done: int, total: int, running: list[str]) -> None:
        nonlocal seen
        now = f" · running {', '.join(running)}" if running else ""
        line.show(f"ladder {done}/{total} runs{now} · {clock(line.elapsed)} elapsed", change=done != seen)
        seen = done

    try:
        points = run_ladder(runs, config.ladder.workers, report)
    except WorkError as error:
        raise WorkFailed(f"{error}\nThe same command continues the ladder.") from error
    finally:
        line.close()
    rungs = fit_rungs(points)
    drift = fit_drift(optima(rungs))
    differing = difference_table(proxy, target, corpus.vocab_size, target.tokenizer.num_ids, rungs[-1].width)
    table, rate = proxy.parametrization.table, proxy.hyperparameters.learning_rate
    return rungs, drift, judge(table, differing, rungs, drift, rate, target.model.width), differing


def _say(data: dict[str, Any], transfer: TransferFile, directory: Path, figures: list[Path]) -> None:
    for rung in data["rungs"]:
        seeds = ", ".join(f"{valley['optimum']:.2f}" for valley in rung["seeds"].values())
        print(
            f"width {rung['width']:<5} optimum 2^{rung['optimum_log2']:.2f} ({rung['octaves_from_base']:+.2f} octaves "
            f"from the base width; by seed {seeds}), loss {rung['loss']:.4f}"
        )
    print(f"verdict    {data['verdict']}")
    for reason in data["reasons"]:
        print(f"           - {reason}")
    names = ["transfer.yaml", "certificate.md", "certificate.json", "parametrization.csv", "multipliers.csv"]
    names += [f"figures/{figure.name}" for figure in figures]
    print(f"written    {directory}/: {', '.join(names)}")
    print(f"next       python -m mutune.train transfer={directory / 'transfer.yaml'} dry_run=true")


if __name__ == "__main__":
    sys.exit(main())
