"""Train the target of a transfer file, with its stages and its schedule, and keep checkpoints.

Rerunning the same command resumes from the newest checkpoint. Results: metrics.jsonl, checkpoints and figures under
<out>/train/<name>/.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.certificate.config import TransferFile
from mutune.compose import build, plain
from mutune.config import TrainConfig
from mutune.door import OK, StopRequest, WorkFailed, enter
from mutune.errors import Refusal, require
from mutune.files import read_yaml, require_writable, write_text
from mutune.folders import check_claim, claim, locked
from mutune.parametrization.finding import AuditError
from mutune.progress import ProgressLine, clock
from mutune.training.config import RunSpec
from mutune.training.price import price, price_table

if TYPE_CHECKING:
    from mutune.training.loop import Record
    from mutune.training.run import Run


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return enter("train", TrainConfig, work, (), sys.argv[1:] if argv is None else argv)


def work(config: TrainConfig) -> int:
    """Check everything, then train to the end."""
    if config.transfer is None:
        raise Refusal("transfer= is missing; for example transfer=runs/transfer/proxy--small/transfer.yaml.")
    transfer = build(TransferFile, read_yaml(Path(config.transfer), "transfer file"))
    spec = transfer.spec(config.seed)
    name = config.name or transfer.target.name
    require(
        "/" not in name and not name.startswith("."),
        f"name={name} must be a plain folder name; for example name=small.",
    )
    if config.dry_run:
        print(price_table(name, spec))
        print("dry run: nothing was allocated or written; leave out dry_run=true to start.")
        return OK
    require_writable(Path(config.out))
    _require_memory(spec, config.device)
    data_hash = _check_data(transfer, spec)
    directory = Path(config.out) / "train" / name
    inputs = {"run": plain(spec), "data_hash": data_hash, "verdict": transfer.verdict}
    check_claim(directory, inputs, "name", config.overwrite)
    with locked(directory, "name"):
        claim(directory, inputs, "name", config.overwrite)
        _train(config, spec, directory, {"inputs": inputs})
    return OK


def _require_memory(spec: RunSpec, device: str) -> None:
    """Refuse a run whose state alone does not fit."""
    import psutil
    import torch

    from mutune.training.run import resolve_device

    where, need = resolve_device(device), price(spec).bytes
    have = torch.cuda.mem_get_info()[0] if where.type == "cuda" else psutil.virtual_memory().available
    require(
        need <= have,
        f"device={where} has {have / 2**30:.1f} GiB free and this run needs about {need / 2**30:.1f} GiB on one "
        f"device; look at its price with dry_run=true, or choose a smaller target=small at the transfer.",
    )


def _check_data(transfer: TransferFile, spec: RunSpec) -> str:
    """The hash of the run's data; where it is the study's data, it must not have changed."""
    from mutune.data.prepare import prepare
    from mutune.training.run import check_data

    corpus = prepare(spec.data, spec.tokenizer)
    check_data(spec, corpus)
    data_hash = corpus.content_hash
    same = (spec.data, spec.tokenizer) == (transfer.data, transfer.tokenizer)
    known = transfer.provenance.data_hash
    require(
        not same or known is None or known == data_hash,
        f"the text behind data.source={spec.data.source} has changed since the study ({str(known)[:12]} → "
        f"{data_hash[:12]}); run the study and the transfer again.",
    )
    return data_hash


def _train(config: TrainConfig, spec: RunSpec, directory: Path, note: dict[str, Any]) -> None:
    import torch

    from mutune.reporting.figures import draw_train
    from mutune.search.workers import default_workers
    from mutune.training.checkpoint import check_meta, newest, restore
    from mutune.training.run import METRICS, Run, describe, resolve_device

    torch.set_num_threads(config.threads or default_workers())
    run = Run(spec, resolve_device(config.device))
    meta = {"data_hash": run.corpus.content_hash, "tokenizer_hash": run.corpus.tokenizer.content_hash}
    checkpoint = newest(directory / "checkpoints")
    start = 0
    if checkpoint is not None:
        check_meta(checkpoint, run.plan, meta)
        restore(checkpoint, run.model, run.optimizer)
        start = checkpoint.step
    describe(directory, run, note)
    _cut_metrics(directory / METRICS, start)
    if start:
        print(f"resuming   {directory.name} at step {start:,} of {spec.num_steps:,}", file=sys.stderr)
    if start < spec.num_steps:
        try:
            _run_to_end(config, run, directory, start, meta)
        except AuditError as error:
            raise WorkFailed(str(error)) from error
    last = json.loads((directory / METRICS).read_text().splitlines()[-1])
    figures = draw_train(directory)
    loss, bits = last["heldout_loss"], last["heldout_bits_per_byte"]
    names = ["metrics.jsonl", f"checkpoints/{last['step']}", *(f"figures/{figure.name}" for figure in figures)]
    print(f"finished   step {last['step']:,}, {last['tokens']:,} tokens")
    print(f"held-out   {loss:.4f} nats per token, {bits:.4f} bits per byte")
    print(f"written    {directory}/: {', '.join(names)}")
    print("next       open analysis/transfer.ipynb to look at it")


def _run_to_end(config: TrainConfig, run: "Run", directory: Path, start: int, meta: dict[str, str]) -> None:
    from mutune.training.checkpoint import save
    from mutune.training.run import METRICS

    total = run.spec.num_steps
    every = config.checkpoint_every or max(1, total // 20)
    with closing(ProgressLine()) as line, StopRequest() as stop, (directory / METRICS).open("a", buffering=1) as lines:
        for record in run.records(start):
            step = record["step"]
            lines.write(json.dumps(record) + "\n")
            if record["diverged"]:
                raise WorkFailed(
                    f"the run diverged at step {step:,} (loss {record['loss']:.4g}, gradient norm "
                    f"{record['grad_norm']:.4g}); the newest checkpoint is in {directory / 'checkpoints'}."
                )
            if step % every == 0 or step == total or stop.requested:
                save(directory / "checkpoints", step, run.model, run.optimizer, run.plan, meta, config.keep_checkpoints)
            line.show(_progress(directory.name, record, start, total, line.elapsed), change=step % every == 0)
            if stop.requested and step < total:
                stop.obey()


def _progress(name: str, record: "Record", start: int, total: int, elapsed: float) -> str:
    step = record["step"]
    left = elapsed / (step - start) * (total - step)
    return (
        f"{name} step {step:,}/{total:,} · loss {record['loss']:.4f} · lr {record['lr']:.3g} · "
        f"{clock(elapsed)} elapsed · about {clock(left)} left"
    )


def _cut_metrics(path: Path, step: int) -> None:
    """Drop the records after `step`: those updates are about to be made again."""
    if path.exists():
        write_text(path, "".join(_lines_until(path, step)))


def _lines_until(path: Path, step: int) -> Iterator[str]:
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            return  # a torn last line, or what came after the checkpoint
        yield line


if __name__ == "__main__":
    sys.exit(main())
