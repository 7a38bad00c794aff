"""Coordinate check: is a model parametrized as its table says, over width or depth?

Trains a few steps at several sizes and seeds, and holds the slopes of activations, updates, weight updates and
gradients against their bounds. Exit code 0 where all keep to them, 1 where one does not, with the likely cause.
Results: verdict.json, and slopes, coordinates and a figure by axis, under <out>/checks/<name>/.

examples:
  python -m mutune.check
  python -m mutune.check parametrization=completep model.width=64 model.depth=2 'widths=[]' 'depths=[2,4,8,16]'
  python -m mutune.check family=examples.llama:family     # your own model, as a mutune.Family
"""

import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from mutune.compose import plain
from mutune.config import CheckConfig
from mutune.door import CACHED, FAILED, OK, WorkFailed, enter, rehearsed
from mutune.errors import Refusal, require_name
from mutune.files import require_writable, write_json, write_text
from mutune.folders import check_claim, claim, locked
from mutune.parametrization.plan import Decay
from mutune.progress import ProgressLine, clock

if TYPE_CHECKING:
    from mutune.verification.subjects import DecoderSubject, FamilySubject, Text
    from mutune.verification.verdict import Judgement

    Subject = DecoderSubject | FamilySubject


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    groups = ("data", "tokenizer", "parametrization")
    return enter("check", CheckConfig, work, groups, sys.argv[1:] if argv is None else argv)


def work(config: CheckConfig) -> int:
    """Check every axis that has sizes; returns the exit code of the verdict."""
    from mutune.data.prepare import prepare
    from mutune.search.workers import WorkError
    from mutune.verification.subjects import check_runs

    name = config.name or _default_name(config)
    require_name("name", name)
    axes = [(axis, sizes) for axis, sizes in (("width", config.widths), ("depth", config.depths)) if sizes]
    require_writable(Path(config.out))
    vocab_size = prepare(config.data, config.tokenizer).vocab_size
    checks = [(subject(config, axis, vocab_size), sizes) for axis, sizes in axes]
    text = training(config)
    text.batch(config.seed, 0)  # refuses a context that the text cannot give
    for of, sizes in checks:
        for size in sizes:
            of.plan(size)  # refuses a size or a table that cannot be
        check_runs(of, min(sizes), text.probe)
    if config.dry_run:
        print(describe(config, name))
        return rehearsed(CACHED)
    directory = Path(config.out) / "checks" / name
    inputs = plain(config)
    for key in ("out", "device", "dry_run", "overwrite", "workers", "name"):
        del inputs[key]
    check_claim(directory, inputs, "name", config.overwrite)
    with locked(directory, "name"):
        claim(directory, inputs, "name", config.overwrite)
        (directory / "verdict.json").unlink(missing_ok=True)  # an older one says nothing about today's model
        try:
            judgements = [_check(config, of, sizes, directory) for of, sizes in checks]
        except WorkError as error:
            raise WorkFailed(str(error)) from error
        passed = all(judgement.passed for judgement in judgements)
        _write_verdict(directory, judgements, passed)
    print(f"written    {directory}: verdict.json, slopes, coordinates and figures by axis")
    print(f"verdict    {'PASS' if passed else 'FAIL'}: table {config.parametrization.table} over {_over(axes)}")
    print(f"next       {_next(config, passed)}")
    return OK if passed else FAILED


def _next(config: CheckConfig, passed: bool) -> str:
    table = config.parametrization.table
    if not passed:
        return "mend what is named above, in the model or in its table, and run the same command again"
    if table == "completep" and not config.depths:
        return "completep is for depth too: add depths=[2,4,8,16] name=completep-depth"
    if config.family:
        return "search its base hyperparameters with mutune.search.run, as README shows"
    return f"search its base hyperparameters: python -m mutune.sweep +sweep=proxy parametrization={table}"


def _default_name(config: CheckConfig) -> str:
    family = "" if config.family is None else f"{config.family.replace(':', '.')}-"
    return f"{family}{config.parametrization.table}"


def subject(config: CheckConfig, axis: str, vocab_size: int) -> "Subject":
    """What the configuration asks to check over one axis."""
    from mutune.verification.subjects import DecoderSubject, FamilySubject

    theory = config.parametrization
    if theory.decay == "horizon":
        raise Refusal("parametrization.decay=horizon needs a run's length, which a check has not; use decay=scaled.")
    decay = Decay(theory.decay, theory.decay_exponent)
    if config.family is not None:
        return FamilySubject(axis, config.family, config.shapes, theory.theory(), config.hyperparameters, decay)
    return DecoderSubject(axis, config.model, theory.theory(), config.hyperparameters, vocab_size, decay)


def training(config: CheckConfig) -> "Text":
    """The steps that every model trains; coordinates are taken after 1, 2, 5, 10, ... of them and after the last."""
    from mutune.verification.subjects import Text

    last = config.run.num_steps
    steps = sorted({s for k in range(10) for s in (10**k, 2 * 10**k, 5 * 10**k) if s < last} | {last})
    hyper = config.hyperparameters
    return Text(
        data=config.data,
        tokenizer=config.tokenizer,
        context_length=config.run.context_length,
        batch_sequences=config.run.batch_sequences,
        steps=tuple(steps),
        betas=(hyper.beta1, hyper.beta2),
    )


def describe(config: CheckConfig, name: str) -> str:
    """What the check would do, in words and numbers."""
    run, shape = config.run, config.model
    rows = [
        f"check      {name} → {Path(config.out) / 'checks' / name}",
        f"base       {config.family or f'width {shape.width}, depth {shape.depth}, {shape.heads} heads'}",
        f"table      {config.parametrization.table}",
        *(f"{axis:<10} {sizes}" for axis, sizes in (("widths", config.widths), ("depths", config.depths)) if sizes),
        f"each       {config.seeds} seeds × {run.num_steps} steps of {run.tokens_per_step} tokens",
    ]
    return "\n".join(rows)


def _check(config: CheckConfig, of: "Subject", sizes: list[int], directory: Path) -> "Judgement":
    from mutune.reporting.figures import draw_check
    from mutune.search.workers import default_workers
    from mutune.verification.check import as_words, check, coordinates_csv, slopes_csv

    line, started = ProgressLine(), time.monotonic()

    def report(done: int, total: int) -> None:
        line.show(f"{of.axis} {done}/{total} runs · {clock(line.elapsed)} elapsed", change=done == total)

    seeds = [config.seed + i for i in range(config.seeds)]
    workers = config.workers or default_workers()
    try:
        coordinates, judgement = check(of.axis, of, training(config), sizes, seeds, workers, report)
    finally:
        line.close()
    write_text(directory / f"coordinates-{of.axis}.csv", coordinates_csv(coordinates))
    write_text(directory / f"slopes-{of.axis}.csv", slopes_csv(judgement))
    figure = draw_check(directory, of.axis)
    print(f"{of.axis:<10} {sizes}, {config.seeds} seeds, {time.monotonic() - started:.0f} s → {figure}")
    print("\n".join(f"  {text}" for text in as_words(judgement)))
    return judgement


def _write_verdict(directory: Path, judgements: "list[Judgement]", passed: bool) -> None:
    findings = [
        {"axis": j.axis, "quantity": f.slope.quantity, "place": f.slope.place, "step": f.slope.step}
        | {"slope": _finite(f.slope.mean), "low": _finite(f.bound.low), "high": _finite(f.bound.high)}
        | {"diagnosis": f.diagnosis}
        for j in judgements
        for f in j.findings
    ]
    write_json(directory / "verdict.json", {"verdict": "PASS" if passed else "FAIL", "findings": findings})


def _finite(value: float) -> float | None:
    """JSON has no infinity."""
    return value if math.isfinite(value) else None


def _over(axes: list[tuple[str, list[int]]]) -> str:
    return " and ".join(f"{axis} {min(sizes)}-{max(sizes)}" for axis, sizes in axes)


if __name__ == "__main__":
    sys.exit(main())
