"""Train the target of a transfer file, with its stages and its schedule, and keep checkpoints.

Rerunning the same command resumes from the newest checkpoint. Results: metrics.jsonl, checkpoints, figures and
report.html under <out>/train/<name>/. The held-out loss is compared with what the transfer file predicted of it.
Under torchrun the model is sharded over its processes (FSDP2), and resumes on any number of them.

examples:
  python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml dry_run=true
  python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml name=second seed=1
  python -m mutune.train transfer=runs/transfer/published--btlm_3b/transfer.yaml dry_run=true hardware=h100-sxm gpus=8
  torchrun --standalone --nproc-per-node=8 -m mutune.train transfer=runs/transfer/published--btlm_3b/transfer.yaml
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.beginning import check_paths, claimed, rehearse
from mutune.certificate.band import band_at
from mutune.certificate.config import TransferFile
from mutune.compose import build, plain
from mutune.config import TrainConfig
from mutune.door import OK, ProcessLost, WorkFailed, drawn, enter, rehearsed
from mutune.errors import Refusal
from mutune.files import read_yaml, write_json, write_text
from mutune.parametrization.finding import AuditError
from mutune.search.workers import default_workers
from mutune.training.config import RunSpec, micro_sequences
from mutune.training.device import device_name, kind_of
from mutune.training.launched import OMP, asked_threads, is_launched, processes, rank, share
from mutune.training.passes import readings, text_lines
from mutune.training.price import price_table
from mutune.training.quote import Machine, lacking, largest_table, machine, quote_table
from mutune.training.result import CHECKPOINTS, METRICS, PREDICTION, smoothing
from mutune.training.writers import require_writers
from mutune.underway import run_to_end

#: Keys of the transfer, whose file has what they decide, and what to write before them there.
OF_THE_TRANSFER = {
    **dict.fromkeys(("study", "target", "hyperparameters", "ladder", "compare"), "mutune.transfer "),
    **dict.fromkeys(("model", "data", "tokenizer", "schedule", "stages", "loop"), "mutune.transfer target."),
}

if TYPE_CHECKING:
    from mutune.training.branch import Branch
    from mutune.training.guard import Guard
    from mutune.training.world import World


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    return enter("train", TrainConfig, work, (), sys.argv[1:] if argv is None else argv, OF_THE_TRANSFER)


def work(config: TrainConfig) -> int:
    """Check everything, then train to the end."""
    if config.transfer is None:
        raise Refusal("transfer= is missing; for example transfer=runs/transfer/proxy--small/transfer.yaml.")
    require_writers(config.writers)
    transfer = build(TransferFile, read_yaml(Path(config.transfer), "transfer file"))
    spec = transfer.spec(config.seed)
    transfer.check_seal()
    name = config.name or transfer.target.name
    directory, origin = Path(config.out) / "train" / name, None
    if config.branch_from:
        from mutune.training.branch import branch

        origin = branch(Path(config.branch_from), spec, directory / CHECKPOINTS)
        spec = origin.spec
    check_paths(spec)
    micro_sequences(spec, config.parallel)  # refuses what does not fit the stages
    _threads(config, spec)  # and more threads than there can be
    if (config.fit or config.dry_run) and rank():
        return OK  # the first process speaks, and measures, for all
    if config.fit:
        print(price_table(name, spec, _kind(config)), flush=True)
        print(_fit(config, spec))
        return OK
    if config.dry_run:
        return _rehearse(config, transfer, spec, directory, origin)
    if lack := _memory(config, spec):
        raise lack
    from mutune.training.distribution import is_loss_of_a_process, joined
    from mutune.training.sentences import lost

    with joined(config.device) as world, ExitStack() as held:
        try:
            note = claimed(config, transfer, spec, directory, world, held, origin)
            _train(config, spec, directory, note, transfer, world, origin)
        except RuntimeError as error:
            if world.size == 1 or not is_loss_of_a_process(error):
                raise
            raise ProcessLost(lost(directory, error)) from error
    return OK


def _rehearse(
    config: TrainConfig, transfer: TransferFile, spec: RunSpec, directory: Path, branch: "Branch | None"
) -> int:
    """The dry run: say what the run would do, and what that costs; returns the exit code."""
    but, done, replaced = rehearse(config, transfer, spec, directory, branch)
    told = [price_table(directory.name, spec, _kind(config)), *text_lines(readings(spec)), *_branching(branch)]
    told += _stands(directory, done, spec.num_steps)
    if replaced:
        told.append(f"replaces   {directory}/ has results of other inputs, which overwrite=true removes")
    if config.hardware:
        told.append(quote_table(spec, config.parallel, _machine(config, spec)))
    print(*told, sep="\n")
    return rehearsed(but, _lack(config, spec), "go on" if done else "start")


def _stands(directory: Path, done: int, total: int) -> list[str]:
    """How far the run of a dry run is, where there is one."""
    left = "only its figures and report would be made again" if done == total else "the same command goes on from there"
    return [f"stands     {directory.name} at step {done:,} of {total:,}; {left}"] if done else []


def _kind(config: TrainConfig) -> str | None:
    """Of the present device, where a price is of it and not of named hardware."""
    return None if config.hardware else kind_of(device_name(config.device))


def _branching(branch: "Branch | None") -> list[str]:
    """Where a branch leaves its trunk, and what that does to the rate."""
    if branch is None:
        return []
    if not branch.rates:
        return [f"branch     from step {branch.step:,} of a run that no longer has that checkpoint"]
    before, after, last = (branch.spec.hyperparameters.learning_rate * factor for factor in branch.rates)
    total = branch.spec.num_steps
    return [
        f"branch     from step {branch.step:,} of {branch.trunk}/, {total - branch.step:,} steps are left; the "
        f"base learning rate goes from {before:.4g} to {after:.4g} there, and to {last:.4g} at step {total:,} "
        f"({branch.spec.schedule.decay_words(total)})"
    ]


def _lack(config: TrainConfig, spec: RunSpec) -> Refusal | None:
    """Why the run does not fit on the named hardware, or here where none is; None where it does."""
    if config.hardware is None:
        return _memory(config, spec)
    lack = lacking(spec, config.parallel, _machine(config, spec))
    return Refusal(lack) if lack else None


def _fit(config: TrainConfig, spec: RunSpec) -> str:
    """The most sequences per forward pass that fit, on named hardware or here."""
    if config.hardware is None:
        from mutune.training.fitting import advice_here, fit_here, fit_table

        found = fit_here(spec, config.parallel, config.device)
        lacks = not all(fit.sequences for fit in found)
        return fit_table(found, advice_here(spec, config.parallel, config.device, found) if lacks else "")
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
    from mutune.training.preflight import require_memory

    cure = "transfer to a smaller target, as in target=small, or start more processes with torchrun"
    cure = cure if config.dry_run else f"dry_run=true prices it; {cure}"
    try:
        require_memory([spec], config.device, cure, config.parallel, *processes())
    except Refusal as refusal:
        return refusal
    return None


def _train(
    config: TrainConfig,
    spec: RunSpec,
    directory: Path,
    note: dict[str, Any],
    transfer: TransferFile,
    world: "World",
    branch: "Branch | None",
) -> None:
    import torch

    from mutune.training.checkpoint import note_going_back, set_aside
    from mutune.training.resume import begin, identity, remember_spent, restore, spent
    from mutune.training.run import Run, describe
    from mutune.training.sentences import aside, gone_back_already, opening, read_again

    threads, why = _threads(config, spec)
    torch.set_num_threads(threads)
    start, records = world.together(lambda: begin(directory, config.resume, spec.num_steps, world, branch))
    so_far = spent(directory, records) if world.is_first else (0.0, 0.0)
    run = Run(spec, world.device, world if is_launched() else None, config.parallel)
    meta = identity(spec, run.corpora, transfer.verdict, transfer.seal, branch)
    guard = _guard(config, spec, transfer)
    notes = restore(directory, start, run, meta, branch, guard)
    if world.is_first:
        describe(directory, run, note)
        notes += aside(directory, set_aside(directory / CHECKPOINTS, start))
        notes += gone_back_already(directory, config.resume, start)
        if config.resume is not None:
            note_going_back(directory / CHECKPOINTS, config.resume)
        if transfer.prediction is not None:
            write_json(directory / PREDICTION, {"prediction": plain(transfer.prediction)})  # for the figures on the way
        remember_spent(directory, *so_far)
        write_text(directory / METRICS, "".join(records))  # those after the checkpoint are about to be made again
        texts = text_lines(readings(spec, run.corpora))
        words = [opening(directory, run, start, why), *texts, *_branching(branch), *read_again(run), *notes]
        print(*words, sep="\n", file=sys.stderr)
    try:
        if start < spec.num_steps:
            run_to_end(config, run, directory, start, meta, guard, so_far, branch)
    except AuditError as error:
        raise WorkFailed(str(error)) from error
    if world.is_first:
        _close(config, directory, transfer)


def _threads(config: TrainConfig, spec: RunSpec) -> tuple[int, str]:
    """CPU threads of this process, and what set them."""
    chosen = (
        (config.threads, "threads="),
        (spec.loop.threads, "target.loop.threads"),
        (asked_threads(), OMP),
        (share(default_workers()), "cores" if processes()[1] == 1 else "its share of the cores"),
    )
    return next((count, why) for count, why in chosen if count is not None)


def _guard(config: TrainConfig, spec: RunSpec, transfer: TransferFile) -> "Guard":
    """What watches the run."""
    from mutune.training.guard import Guard

    return Guard(
        config.guard,
        clip_norm=spec.loop.clip_norm,
        beta2=spec.hyperparameters.beta2,
        band=band_at(transfer.prediction, spec.num_steps),
        band_steps=smoothing(spec.num_steps),
        dtypes={"products": spec.loop.settled().dtype or ""},
    )


def _close(config: TrainConfig, directory: Path, transfer: TransferFile) -> None:
    """Say how a finished run went, hold it against its prediction, and draw it."""
    from mutune.reporting.figures import draw_train
    from mutune.reporting.page import train_page

    last = json.loads((directory / METRICS).read_text().splitlines()[-1])
    figures = drawn(lambda: draw_train(directory))
    loss, bits = last["heldout_loss"], last["heldout_bits_per_byte"]
    names = ["metrics.jsonl", f"checkpoints/{last['step']}", *(f"figures/{figure.name}" for figure in figures)]
    print(f"finished   step {last['step']:,}, {last['tokens']:,} tokens")
    print(f"held-out   {loss:.4f} nats per token, {bits:.4f} bits per byte")
    names += _compare(config, transfer, directory, loss)
    next_step = f"open {directory / 'report.html'}, or analysis/transfer.ipynb, to look at it"
    names += [path.name for path in drawn(lambda: [train_page(directory, next_step)], "report")]
    print(f"written    {directory}/: {', '.join(names)}")
    print(f"next       {next_step}")


def _compare(config: TrainConfig, transfer: TransferFile, directory: Path, loss: float) -> list[str]:
    """Hold the loss against the prediction, here and in the certificate it came with; the names of files written."""
    from mutune.certificate.prediction import append_outcome, compare
    from mutune.training.result import PREDICTION

    if transfer.prediction is None:
        return []
    outcome = compare(transfer.prediction, loss, str(directory), config.seed)
    write_json(directory / PREDICTION, plain(outcome))
    print(f"predicted  {outcome}")
    append_outcome(Path(str(config.transfer)).with_name("certificate.json"), transfer.seal, outcome)
    return [PREDICTION]


if __name__ == "__main__":
    sys.exit(main())
