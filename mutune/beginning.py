"""What a target's run checks before it writes anything, and its dry run too: text, folder, checkpoint, processes."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.certificate.config import TransferFile
from mutune.config import TrainConfig
from mutune.door import CACHED
from mutune.errors import Refusal, require
from mutune.files import read_yaml, require_writable
from mutune.folders import CONFIG, check_claim, check_free, claim, locked
from mutune.training.config import RunSpec
from mutune.training.launched import processes
from mutune.training.result import CHECKPOINTS

SHOWN = 12  # letters of a hash

if TYPE_CHECKING:
    from mutune.data.corpora import Corpora
    from mutune.training.branch import Branch
    from mutune.training.world import World


def check_paths(spec: RunSpec) -> None:
    """Refuse texts that are not there, before anything is priced."""
    texts = [("target.data", spec.data)]
    texts += [
        (f"target.stages[{i}].data[{j}]", part.corpus)
        for i, stage in enumerate(spec.stages)
        for j, part in enumerate(stage.data or ())
    ]
    for key, data in texts:
        require(
            data.path is None or Path(data.path).expanduser().exists(),
            f"{key}.path={data.path} of the transfer file does not exist here; for example a file or folder that does, "
            "in a transfer with another target.name.",
        )


def _check_data(transfer: TransferFile, spec: RunSpec) -> "Corpora":
    """What the run reads; where its main corpus is the study's, it must not have changed."""
    from mutune.training.preflight import check_corpora
    from mutune.training.run import corpora_of

    corpora = corpora_of(spec)
    check_corpora(spec, corpora, "target.stages[{}]")
    if (spec.data, spec.tokenizer) == (transfer.data, transfer.tokenizer):
        transfer.check_text(corpora.main.content_hash)
    return corpora


def _inputs(transfer: TransferFile, spec: RunSpec, data_hash: str, branch: "Branch | None") -> dict[str, Any]:
    """What two starts of one run must agree in."""
    inputs = {"run": spec.as_dict(), "data_hash": data_hash, "verdict": transfer.verdict}
    return inputs | ({"branch": branch.identity} if branch else {})


def _check_folder(config: TrainConfig, directory: Path, inputs: dict[str, Any], branch: "Branch | None") -> bool:
    """Refuse a folder that this run can neither begin nor go on in; returns whether what is there is to be replaced."""
    root = directory / CHECKPOINTS
    require(not root.exists() or root.is_dir(), f"{root} is a file; move it away, or choose another name=NAME.")
    if root.exists() or config.resume is not None:
        from mutune.training.checkpoint import choose, kept_every

        choose(root, config.resume)
        kept_every(root, None)  # refuses what is damaged
    require_writable(Path(config.out))
    require_writable(directory.parent)
    if branch is None and not config.overwrite:
        _check_is_no_branch(directory)
    replaced = check_claim(directory, inputs, "name", config.overwrite)
    lost = (
        f"the run in {directory}, which overwrite=true replaces; leave out overwrite=true, or choose another name=NAME"
    )
    require(not replaced or config.resume is None, f"resume={config.resume} is a checkpoint of {lost}.")
    require(
        not replaced or branch is None or branch.checkpoint is not None,
        f"branch_from={config.branch_from} is gone, and known only to {lost}.",
    )
    return replaced


def _check_is_no_branch(directory: Path) -> None:
    """Refuse to go on with a run that left another one without being told so."""
    try:
        stored = read_yaml(directory / CONFIG, "config").get("inputs")
    except Refusal:  # which `check_claim` is about
        return
    require(
        not isinstance(stored, dict) or "branch" not in stored,
        f"{directory} is of a run that began with branch_from=, which has to be given again; for example "
        "branch_from=runs/train/NAME/checkpoints/STEP as it was, or choose another name=NAME.",
    )


def claimed(
    config: TrainConfig,
    transfer: TransferFile,
    spec: RunSpec,
    directory: Path,
    world: "World",
    held: ExitStack,
    branch: "Branch | None",
) -> dict[str, Any]:
    """Check everything, then make the folder this run's and hold it; returns what its description begins with.

    Every process calls it; the first does what only one can do.
    """
    from mutune.training.distribution import require_even

    def checked() -> "Corpora":
        require_even([stage.batch_sequences for stage in spec.stages], world.size, config.parallel)
        return _check_data(transfer, spec)

    corpora = world.together(checked)
    hashes = f"{corpora.content_hash[:SHOWN]} in tokens of {corpora.main.tokenizer.content_hash[:SHOWN]}"
    world.agree("text", hashes, "every host has to see the same files, for example in a folder that they share")
    inputs = _inputs(transfer, spec, corpora.content_hash, branch)

    def mine() -> None:
        if world.is_first:
            _check_folder(config, directory, inputs, branch)
            held.enter_context(locked(directory, "name"))
            claim(directory, inputs, "name", config.overwrite)

    world.together(mine)
    return {"inputs": inputs}


def rehearse(
    config: TrainConfig, transfer: TransferFile, spec: RunSpec, directory: Path, branch: "Branch | None"
) -> tuple[str, int, bool]:
    """Refuse, without writing anything, what the run would refuse at its start.

    Returns what was written all the same, the steps that the run has done, and whether results of others would go.

    Text is looked at only where there is a run that must have read the same.
    """
    if config.hardware is None:  # else it is asked about the GPUs that are named
        from mutune.training.distribution import require_even

        require_even([stage.batch_sequences for stage in spec.stages], processes()[0], config.parallel)
    if not directory.exists() and branch is None:
        _check_folder(config, directory, {}, None)
        return "", 0, False
    from mutune.training.resume import begins_at, identity, state_at

    corpora = _check_data(transfer, spec)
    replaced = _check_folder(config, directory, _inputs(transfer, spec, corpora.content_hash, branch), branch)
    check_free(directory, "name")
    if replaced:
        directory = directory / "anew"  # where nothing is
    start, _ = begins_at(directory, config.resume, spec.num_steps, branch)
    if start:
        meta = identity(spec, corpora, transfer.verdict, transfer.seal, branch)
        state_at(directory, start, spec, spec.plan(corpora.main.vocab_size), meta, branch)
    return CACHED, start if (directory / CHECKPOINTS / str(start)).is_dir() else 0, replaced
