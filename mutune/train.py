"""Train the target of a transfer file, with its stages and its schedule, and keep checkpoints.

Rerunning the same command resumes from the newest checkpoint. Results: metrics.jsonl, checkpoints, figures and
report.html under <out>/train/<name>/. The held-out loss is compared with what the transfer file predicted of it.

examples:
  python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml dry_run=true
  python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml name=second seed=1
  python -m mutune.train transfer=runs/transfer/published--btlm_3b/transfer.yaml dry_run=true hardware=h100-sxm gpus=8
"""

import json
import os
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.certificate.config import TransferFile
from mutune.compose import build, plain
from mutune.config import TrainConfig
from mutune.door import OK, StopRequest, WorkFailed, drawn, enter, nothing_written
from mutune.errors import Refusal, require
from mutune.files import read_yaml, require_writable, write_json, write_text
from mutune.folders import check_claim, claim, locked
from mutune.parametrization.finding import AuditError
from mutune.progress import ProgressLine, clock
from mutune.training.config import RunSpec
from mutune.training.price import price, price_table
from mutune.training.quote import Machine, lacking, largest_table, machine, quote_table
from mutune.training.writers import require_writers

PREDICTION = "prediction.json"
FIRST_STEPS = 4  # after which it is known how long the run will take

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
    require_writers(config.writers)
    transfer = build(TransferFile, read_yaml(Path(config.transfer), "transfer file"))
    spec = transfer.spec(config.seed)
    transfer.check_seal()
    name = config.name or transfer.target.name
    if config.fit:
        print(price_table(name, spec), _fit(config, spec), sep="\n")
        return OK
    if config.dry_run:
        print(price_table(name, spec), _priced(config, spec), sep="\n")
        return OK
    lack = _memory(config, spec)
    require_writable(Path(config.out))
    if lack:
        raise lack
    data_hash = _check_data(transfer, spec)
    directory = Path(config.out) / "train" / name
    inputs = {"run": plain(spec), "data_hash": data_hash, "verdict": transfer.verdict}
    check_claim(directory, inputs, "name", config.overwrite)
    with locked(directory, "name"):
        claim(directory, inputs, "name", config.overwrite)
        _train(config, spec, directory, {"inputs": inputs}, transfer)
    return OK


def _priced(config: TrainConfig, spec: RunSpec) -> str:
    """The last lines of a dry run: on named hardware what it costs there, else whether it fits here."""
    if config.hardware is None:
        return nothing_written("", _memory(config, spec))
    on = _machine(config, spec)
    lack = lacking(spec, config.parallel, on)
    return f"{quote_table(spec, config.parallel, on)}\n{nothing_written('', Refusal(lack) if lack else None)}"


def _fit(config: TrainConfig, spec: RunSpec) -> str:
    """The most sequences per forward pass that fit, on named hardware or here."""
    if config.hardware is None:
        from mutune.training.fitting import fit_here, fit_table

        return fit_table(fit_here(spec, config.parallel, config.device))
    on = _machine(config, spec)
    return largest_table(spec, config.parallel, on)


def _machine(config: TrainConfig, spec: RunSpec) -> Machine:
    return machine(
        str(config.hardware),
        dtype=str(spec.loop.settled().dtype),
        gpus=config.gpus,
        mfu=config.mfu,
        peak_flops=config.peak_flops,
        memory_gb=config.memory_gb,
        gpu_hour=config.gpu_hour,
    )


def _memory(config: TrainConfig, spec: RunSpec) -> Refusal | None:
    """Why the run does not fit here; None where it does."""
    from mutune.training.fit import require_memory

    cure = "transfer to a smaller target, as in target=small (several devices are not built yet)"
    cure = cure if config.dry_run else f"dry_run=true prices it; {cure}"
    try:
        require_memory([spec], config.device, cure)
    except Refusal as refusal:
        return refusal
    return None


def _check_data(transfer: TransferFile, spec: RunSpec) -> str:
    """The hash of the run's data; where it is the study's data, it must not have changed."""
    from mutune.data.prepare import prepare
    from mutune.training.fit import check_data

    corpus = prepare(spec.data, spec.tokenizer)
    check_data(spec, corpus, "target.stages[{}]")
    if (spec.data, spec.tokenizer) == (transfer.data, transfer.tokenizer):
        transfer.check_text(corpus.content_hash)
    return corpus.content_hash


def _train(config: TrainConfig, spec: RunSpec, directory: Path, note: dict[str, Any], transfer: TransferFile) -> None:
    import torch

    from mutune.reporting.figures import draw_train
    from mutune.reporting.page import train_page
    from mutune.search.workers import default_workers
    from mutune.training.checkpoint import check_meta, newest, restore
    from mutune.training.device import resolve_device
    from mutune.training.result import METRICS
    from mutune.training.run import Run, describe

    torch.set_num_threads(config.threads or spec.loop.threads or default_workers())
    checkpoint = newest(directory / "checkpoints")
    start = 0 if checkpoint is None else checkpoint.step
    records = _records_until(directory / METRICS, start, finished=start == spec.num_steps)
    where = resolve_device(config.device)
    run = Run(spec, where)
    meta = {
        "run": plain(spec),
        "data_hash": run.corpus.content_hash,
        "tokenizer_hash": run.corpus.tokenizer.content_hash,
    }
    if checkpoint is not None:
        check_meta(checkpoint, run.plan, meta)
        restore(checkpoint, run.model, run.optimizer)
    describe(directory, run, note)
    write_text(directory / METRICS, "".join(records))  # those after the checkpoint are about to be made again
    how = (
        f"resuming   {directory.name} at step {start:,} of {spec.num_steps:,}"
        if start
        else f"training   {directory.name}: {price(spec).parameters:,} parameters, {spec.num_steps:,} steps"
    )
    threads = torch.get_num_threads()
    on = f"{threads} thread{'s' if threads > 1 else ''}" if where.type == "cpu" else str(where)
    print(f"{how}, by {on} → {directory}/", file=sys.stderr)
    if start < spec.num_steps:
        try:
            _run_to_end(config, run, directory, start, meta)
        except AuditError as error:
            raise WorkFailed(str(error)) from error
    last = json.loads((directory / METRICS).read_text().splitlines()[-1])
    figures = drawn(lambda: draw_train(directory))
    loss, bits = last["heldout_loss"], last["heldout_bits_per_byte"]
    names = ["metrics.jsonl", f"checkpoints/{last['step']}", *(f"figures/{figure.name}" for figure in figures)]
    print(f"finished   step {last['step']:,}, {last['tokens']:,} tokens")
    print(f"held-out   {loss:.4f} nats per token, {bits:.4f} bits per byte")
    names += _compare(config, transfer, directory, loss)
    next_step = "open analysis/transfer.ipynb to look at it"
    names += [path.name for path in drawn(lambda: [train_page(directory, next_step)], "report")]
    print(f"written    {directory}/: {', '.join(names)}")
    print(f"next       {next_step}")


def _compare(config: TrainConfig, transfer: TransferFile, directory: Path, loss: float) -> list[str]:
    """Hold the loss against the prediction, here and in the certificate it came with; the names of files written."""
    from mutune.certificate.prediction import append_outcome, compare

    if transfer.prediction is None:
        return []
    outcome = compare(transfer.prediction, loss, str(directory), config.seed)
    write_json(directory / PREDICTION, plain(outcome))
    print(f"predicted  {outcome}")
    append_outcome(Path(str(config.transfer)).with_name("certificate.json"), transfer.seal, outcome)
    return [PREDICTION]


def _run_to_end(config: TrainConfig, run: "Run", directory: Path, start: int, meta: dict[str, Any]) -> None:
    from mutune.training.checkpoint import save
    from mutune.training.result import METRICS

    total = run.spec.num_steps
    every, first = config.checkpoint_every or max(1, total // 20), 0.0
    with closing(ProgressLine()) as line, StopRequest() as stop, (directory / METRICS).open("a", buffering=1) as lines:
        for record in run.records(start):
            step = record["step"]
            lines.write(json.dumps(record) + "\n")
            if record["diverged"]:
                raise WorkFailed(_diverged(record, directory / "checkpoints"))
            if step % every == 0 or step == total or stop.requested:
                os.fsync(lines.fileno())  # a checkpoint never knows a step that the records do not
                save(directory / "checkpoints", step, run.model, run.optimizer, run.plan, meta, config.keep_checkpoints)
            told = step % every == 0 or step == start + FIRST_STEPS
            first = first or line.elapsed  # before which it is audited, and compiled
            done = step - start - 1  # since then
            left = f" · about {clock((line.elapsed - first) / done * (total - step))} left" if done else ""
            line.show(_progress(directory.name, record, total, line.elapsed) + left, change=told)
            if stop.requested and step < total:
                stop.obey()


def _progress(name: str, record: "Record", total: int, elapsed: float) -> str:
    return (
        f"{name} step {record['step']:,}/{total:,} · loss {record['loss']:.4f} · lr {record['lr']:.3g} · "
        f"{clock(elapsed)} elapsed"
    )


def _diverged(record: "Record", checkpoints: Path) -> str:
    """What to say of a run that diverged, and which checkpoint is from before it."""
    from mutune.training.checkpoint import list_steps

    step = record["step"]
    good = [saved for saved in list_steps(checkpoints) if saved < step - 1]  # the loss is that of step - 1 updates
    kept = f"the newest checkpoint before it is {checkpoints}/{max(good)}" if good else "no checkpoint is before it"
    return (
        f"the run diverged at step {step:,} (loss {record['loss']:.4g}, gradient norm {record['grad_norm']:.4g}); "
        f"{kept}."
    )


def _records_until(path: Path, step: int, finished: bool) -> list[str]:
    """The lines of the records of steps 1 to `step`, where a checkpoint was taken.

    Raises:
        Refusal: one of them is missing or damaged, or the last has no held-out loss though the run is finished.
    """
    lines = path.read_text(errors="replace").splitlines(keepends=True)[:step] if path.is_file() else []
    last = {}
    for number in range(1, step + 1):
        try:
            last = json.loads(lines[number - 1])
            whole = last["step"] == number and (not finished or number < step or "heldout_loss" in last)
        except (IndexError, ValueError, TypeError, KeyError):
            whole = False
        require(
            whole,
            f"{path} lacks the whole record of step {number:,}, though there is a checkpoint of step {step:,}; restore "
            f"that file, or train again under another name=NAME.",
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
