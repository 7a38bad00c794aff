"""A run that leaves another one at one of its checkpoints: a decay from a trunk, a longer horizon, a longer context."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mutune.compose import build
from mutune.data.segments import Skip, Stage, shared_steps
from mutune.errors import Refusal, require
from mutune.folders import differences
from mutune.training.checkpoint import Checkpoint, before_it, list_steps, newest, read, skips_of
from mutune.training.config import RunSpec, StageConfig, stage_ends
from mutune.training.schedule import multiplier

#: What a branch may have of its own. `extends` and `left_out` follow from the trunk.
OWN = ("stages", "schedule", "loop", "extends", "left_out")


@dataclass(frozen=True)
class Branch:
    """Where a run leaves its trunk.

    Attributes:
        spec: the run, which knows what the trunk has read.
        identity: what two starts of the branch must agree in: the step, and a hash of the trunk's checkpoint.
        checkpoint: the trunk's, whose state the run begins with; None where it is gone and the run has its own.
        rates: the trunk's last rate, the branch's first and its last, over the peak; empty where the trunk is gone.
    """

    spec: RunSpec
    identity: dict[str, Any]
    checkpoint: Checkpoint | None = None
    rates: tuple[float, ...] = ()

    @property
    def step(self) -> int:
        """Updates that the trunk has done."""
        return int(self.identity["step"])

    @property
    def trunk(self) -> Path:
        """The trunk's folder."""
        assert self.checkpoint is not None, "a run that begins has its trunk"
        return self.checkpoint.path.parents[1]


def _another(path: Path, before: int) -> Path:
    """The newest checkpoint beside one that does not serve, of a step before the run's end; where there is none, what
    one would be called.
    """
    steps = [step for step in list_steps(path.parent) if step < before]
    return path.parent / str(max(steps)) if steps else Path("runs/train/NAME/checkpoints/STEP")


def branch(path: Path, spec: RunSpec, own: Path) -> Branch:
    """The branch that trains `spec` from the checkpoint in the folder `path` on.

    Args:
        own: the folder of the branch's checkpoints, which know the trunk where it has dropped its own.

    Raises:
        Refusal: it is no checkpoint, of another model, text, table, values or seed, or its first steps are not the
            run's.
    """
    if kept := _begun(path, own):
        before, left = build(RunSpec, kept.meta["run"]), kept.meta["branch"]["step"]
        require(
            path.name == str(left),
            f"branch_from={path} is not to be read, and the run in {own.parent} began at step {left:,} of its trunk; "
            f"for example branch_from={path.with_name(str(left))}.",
        )
        return Branch(replace(spec, extends=before.extends, left_out=before.left_out), kept.meta["branch"])
    require(
        (path / "meta.json").is_file(),
        f"branch_from={path} is no checkpoint; for example branch_from={_another(path, spec.num_steps)}.",
    )
    require(
        path.resolve().name.isdecimal(),
        f"branch_from={path} does not have the number of its step as its name, so that the records beside it need not "
        f"be those that led to it; for example branch_from={_another(path, spec.num_steps)}.",
    )
    found = read(path.resolve(), _one_before)
    of_none = f"branch_from={path}: its meta.json does not say of which run it is; {_one_before(path)}."
    require("run" in found.meta, of_none)
    trunk = build(RunSpec, found.meta["run"])
    ours, theirs = (_without(each.as_dict()) for each in (spec, trunk))
    changed = differences(theirs, ours)
    require(
        not changed,
        f"branch_from={path} is of another run ({'; '.join(changed)}); a branch may have other stages, another "
        "schedule and another loop, for example target.schedule.kind=wsd target.schedule.decay_steps=100.",
    )
    shared = shared_steps(_stages(trunk), _stages(spec))
    require(
        shared >= found.step,
        f"branch_from={path} has done {found.step:,} steps, of which the stages of this run have the first {shared:,} "
        "in common with it; begin target.stages with the same ones, for example a longer last stage or one more.",
    )
    require(
        found.step < spec.num_steps,
        f"branch_from={path} has done {found.step:,} steps, and this run has {spec.num_steps:,}; for example "
        f"branch_from={_another(path, spec.num_steps)}, or a longer last stage of target.stages.",
    )
    told = hashlib.sha256((path / "meta.json").read_bytes()).hexdigest()[:16]
    old, new = (multiplier(s.schedule, s.num_steps, stage_ends(s.stages)) for s in (trunk, spec))
    return Branch(
        replace(spec, extends=(*(trunk.extends or ()), trunk.stages), left_out=_left_out(trunk, found)),
        {"step": found.step, "checkpoint": told},
        found,
        (old(found.step - 1), new(found.step), new(spec.num_steps - 1)),
    )


def _begun(path: Path, own: Path) -> Checkpoint | None:
    """The branch's newest checkpoint, where it has to do without that of the trunk."""
    kept = newest(own)
    if kept is None or "branch" not in kept.meta:
        return None
    try:
        read(path.resolve())
    except Refusal:
        return kept
    return None


def _one_before(path: Path) -> str:
    """What to do about a trunk's checkpoint that is no use."""
    before = before_it(path)
    return "there is none before it" if before is None else f"branch_from={path.parent / str(before)} is one before it"


def _left_out(trunk: RunSpec, found: Checkpoint) -> tuple[tuple[Skip, ...], ...] | None:
    """What rollbacks had left out of the runs that a branch goes on from; None where it was nothing."""
    every = *(trunk.left_out or [()] * len(trunk.extends or ())), skips_of(found)
    return every if any(every) else None


def _without(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in spec.items() if key not in OWN}


def _stages(spec: RunSpec) -> list[Stage]:
    """As the loader has them, but for the names of corpora."""

    def reads(stage: StageConfig) -> tuple[tuple[str, int], ...]:
        return ((str(stage.data), 1),)

    return [Stage(s.context_length, s.num_steps, s.batch_sequences, reads(s)) for s in spec.stages]
