"""What one of several processes does in a test: `torchrun -m tests.training.processes FOLDER`. Not a test itself.

Every process trains one small run in several ways; the first writes what came out to `FOLDER/<processes>.json`.
"""

import hashlib
import json
import resource
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.model import decoder
from mutune.model.shape import BaseConfig, ModelConfig
from mutune.parametrization.finding import AuditError
from mutune.training import checkpoint
from mutune.training.config import LoopConfig, ParallelConfig, RunSpec, StageConfig
from mutune.training.distribution import joined
from mutune.training.loop import Record
from mutune.training.resume import restore
from mutune.training.run import Run
from mutune.training.saving import Saver
from mutune.training.world import World, whole
from tests.training.guarded import guard_of
from tests.training.test_rollback import trained as trained_under_guard

STEPS, SAVED = 30, 15
SPEC = replace(
    SweepConfig().spec(),
    model=ModelConfig(width=48, depth=2, num_heads=3, ffn_width=127),  # 127: no number of processes divides it
    base=BaseConfig(width=16, depth=2),
    stages=(
        StageConfig(context_length=32, batch_sequences=8, num_steps=20),
        StageConfig(context_length=64, batch_sequences=4, num_steps=10),
    ),
    loop=LoopConfig(heldout_windows=9, audit_every=10),
)
LOW = replace(SPEC, loop=replace(SPEC.loop, dtype="bfloat16"))
#: Ways to spread a run; none of them may change what it computes.
WAYS: dict[str, ParallelConfig] = {
    "kept": ParallelConfig(reshard=False),
    "full": ParallelConfig(activation_checkpointing="full"),
    "selective": ParallelConfig(activation_checkpointing="selective"),
}


def digest(model: nn.Module) -> str:
    """Of every parameter, whole."""
    found = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        found.update(name.encode() + whole(parameter.detach()).contiguous().numpy().tobytes())
    return found.hexdigest()


def losses(run: Run, start: int = 0, until: int = STEPS) -> list[float]:
    """Training losses of the steps after `start`."""
    records: list[Record] = []
    for record in run.records(start):
        records.append(record)
        if record["step"] == until:
            break
    return [record["loss"] for record in records]


def trained(world: World, folder: Path, spec: RunSpec = SPEC) -> dict[str, Any]:
    """A whole run that saves on its way, and the run that goes on from what it saved."""
    run = Run(spec, world.device, world)
    saver = Saver(folder / f"of_{world.size}", world, run.plan, lambda steps: steps, background=world.size == 2)
    found: dict[str, Any] = {"initial": digest(run.model), "losses": [], "heldout": []}
    for record in run.records():
        found["losses"].append(record["loss"])
        found["heldout"] += [record["heldout_loss"]] if "heldout_loss" in record else []
        saver.poll()
        if record["step"] == SAVED:
            saver.save(SAVED, run.model, run.optimizer, {})
    saver.finish()
    return {**found, "final": digest(run.model)}


def continued(world: World, root: Path, spec: RunSpec = SPEC) -> dict[str, Any]:
    """From the checkpoint of step `SAVED` under `root`, whoever wrote it."""
    run = Run(replace(spec, seed=spec.seed), world.device, world)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.zero_()  # so that nothing is there by itself
    checkpoint.restore(checkpoint.read(root / str(SAVED)), run.model, run.optimizer)
    return {"losses": losses(run, SAVED), "final": digest(run.model)}


def on_a_full_disk(world: World, root: Path, background: bool) -> dict[str, Any]:
    """What a save says, and leaves, where the second process can write no more than a kilobyte."""
    run = Run(SPEC, world.device, world)
    losses(run, until=1)
    saver = Saver(root, world, run.plan, lambda steps: steps, background=background)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = ""
    if world.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        saver.save(1, run.model, run.optimizer, {})
        saver.finish()
    except OSError as error:
        said = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    world.wait()
    return {"said": said, "left": sorted(path.name for path in root.iterdir())}


def in_parts(world: World) -> list[float]:
    """Losses with what runs on GPUs have: compiled blocks (without a code generator), no bias, a loss in chunks."""
    vars(decoder)["logits_at_once"] = lambda device: 20 * SPEC.tokenizer.num_ids
    torch.compile = partial(torch.compile, backend="aot_eager")
    spec = replace(SPEC, loop=replace(SPEC.loop, compile=True, attention="causal"))
    return losses(Run(spec, world.device, world), until=5)


def of_other_texts(world: World) -> str:
    """What each process says where the second has another text."""
    try:
        world.agree("text", "abc" if world.is_first else "def", "share the files")
    except Refusal as refusal:
        return str(refusal)
    return "nothing"


def unreadable(world: World, folder: Path) -> str:
    """What each process says where the second does not see the folder of checkpoints."""
    run = Run(SPEC, world.device, world)
    if world.is_first:
        (folder / "seen").mkdir()
        (folder / "seen/checkpoints").symlink_to(folder / "of_2")
    world.wait()
    try:
        restore(folder / ("seen" if world.is_first else "hidden"), SAVED, run, {}, None, guard_of(SPEC))
    except Refusal as refusal:
        return str(refusal)
    return "nothing"


def audited(world: World) -> str:
    """What the first process says where the second has an optimizer of its own."""
    run = Run(SPEC, world.device, world)
    if world.rank == 1:
        run.optimizer.param_groups[0]["eps"] *= 10
    try:
        losses(run, until=1)
    except AuditError as error:
        return str(error)
    return "nothing"


def main(folder: Path) -> None:
    """Do it all, and write what came out."""
    torch.set_num_threads(1)
    with joined("cpu") as world:
        found = {"run": trained(world, folder), "same": continued(world, folder / f"of_{world.size}")}
        if world.size < 4:
            found["from_4"] = continued(world, folder / "of_4")
        if world.size == 2:
            told = trained_under_guard(folder / "rolled_back", "rollback", damage=True, world=world)
            found["rolled_back"] = {"skips": [[skip.from_step, skip.num_skipped] for skip in told.skips]}
            found["texts"] = {"said": of_other_texts(world)}
            found["unreadable"] = {"said": world.share(unreadable(world, folder))}
            found["audited"] = {"said": audited(world)}
            for background in (False, True):
                found[f"full_{background}"] = on_a_full_disk(world, folder / "of_2", background)
            for name, way in WAYS.items():
                found[name] = {"losses": losses(Run(SPEC, world.device, world, way), until=5)}
            found["parts"] = {"losses": in_parts(world)}
        if world.size == 4:
            two = ParallelConfig(replicas=2)
            found["replicas"] = {"losses": losses(Run(SPEC, world.device, world, two), until=5)}
            short = replace(SPEC, loop=replace(SPEC.loop, micro_sequences=1))
            found["accumulated"] = {"losses": losses(Run(short, world.device, world, two), until=5)}
        if world.size == 1:
            found["bfloat16"] = {"losses": losses(Run(LOW, world.device, world), until=5)}
        if world.is_first:
            (folder / f"{world.size}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
