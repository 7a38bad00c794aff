"""Where a target's run goes on: the checkpoint, the records up to it, and whether they are of this run."""

import json
from pathlib import Path
from typing import Any

from mutune.data.corpora import Corpora
from mutune.data.windows import Skip
from mutune.errors import Refusal, require
from mutune.files import write_text
from mutune.folders import differences
from mutune.parametrization.plan import Plan
from mutune.training import checkpoint
from mutune.training.branch import Branch
from mutune.training.checkpoint import Checkpoint
from mutune.training.config import RunSpec
from mutune.training.guard import Guard
from mutune.training.result import CHECKPOINTS, LEFT_OUT, METRICS
from mutune.training.run import Run
from mutune.training.world import World
from mutune.versions import versions

SPENT = "spent.json"
INFORMATION = {"versions"}  # what a checkpoint tells, and a run need not agree in
#: And what a branch has of its own: `branch` compared the run.
OF_A_BRANCH = {"run", "certificate", "branch"}


def identity(spec: RunSpec, corpora: Corpora, verdict: str, seal: str, branch: Branch | None) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must agree in, besides the plan; and what it tells."""
    return {
        "run": spec.as_dict(),
        "data_hash": corpora.content_hash,
        "tokenizer_hash": corpora.main.tokenizer.content_hash,
        "certificate": {"verdict": verdict, "seal": seal},
        "versions": versions(),
        **({"branch": branch.identity} if branch else {}),
    }


def begin(
    directory: Path, resume: int | None, num_steps: int, world: World, branch: Branch | None
) -> tuple[int, list[str]]:
    """The step to go on from, and the lines of the records up to it, as the first process finds them.

    Args:
        resume: the step of the checkpoint that is wanted; None takes the newest.
        branch: where the run begins if it has no checkpoint of its own.
    """
    start, records, refusal = 0, list[str](), None
    if world.is_first:
        try:
            start, records = begins_at(directory, resume, num_steps, branch)
        except (Refusal, OSError) as error:
            refusal = error
    start, refusal = world.share((start, refusal))
    if refusal:
        raise refusal
    return start, records


def begins_at(directory: Path, resume: int | None, num_steps: int, branch: Branch | None) -> tuple[int, list[str]]:
    """As `begin`, by one process.

    Raises:
        Refusal: no checkpoint is of that step, it is damaged, or a record before it is missing.
    """
    start, path = checkpoint.choose(directory / CHECKPOINTS, resume), directory / METRICS
    if start:
        checkpoint.read(directory / CHECKPOINTS / str(start))
    elif branch:
        start, path = branch.step, branch.trunk / METRICS
    return start, _records_until(path, start, finished=start == num_steps)


def state_at(
    directory: Path, start: int, spec: RunSpec, plan: Plan, meta: dict[str, Any], branch: Branch | None
) -> Checkpoint:
    """The checkpoint of step `start`, which is this run's, or that of the trunk that it leaves there.

    Raises:
        Refusal: it is damaged, or of another run.
    """
    own = directory / CHECKPOINTS / str(start)
    origin = branch.checkpoint if branch and not own.is_dir() else None
    begins, kept = origin is not None, origin or checkpoint.read(own)
    mixed = begins and any(stage.data for stage in spec.stages)  # whose texts need not be those of the trunk
    compared = meta.keys() - INFORMATION - (OF_A_BRANCH if begins else set()) - ({"data_hash"} if mixed else set())
    checkpoint.skips_of(kept)  # refuses what is damaged
    checkpoint.check_meta(kept, plan, {key: value for key, value in meta.items() if key in compared})
    return kept


def restore(
    directory: Path, start: int, run: Run, meta: dict[str, Any], branch: Branch | None, guard: Guard
) -> list[str]:
    """Load the state of step `start`, where there is one; returns what is to be said of it. Every process calls it.

    Raises:
        Refusal: it is damaged, or of another run, for some process.
    """
    if not start:
        return []
    together, notes = run.world.together, list[str]()
    kept = together(lambda: state_at(directory, start, run.spec, run.plan, meta, branch))
    together(lambda: checkpoint.restore(kept, run.model, run.optimizer))
    if "guard" in kept.meta and (unknown := guard.load_state_dict(kept.meta["guard"])):
        notes.append(f"note       the checkpoint does not say what the guard knew of {', '.join(unknown)}")
    if branch and kept is branch.checkpoint:
        guard.begin_anew()  # other stages, and maybe other texts, are usual from here on
        guard.skips = tuple(skip for skip in guard.skips if _is_of_the_trunk(skip, run, start))
    written_by = kept.meta.get("versions", versions())
    changed = "; ".join(differences(written_by, versions()))
    return [*notes, f"note       the checkpoint was written by other code ({changed})"] if changed else notes


def _is_of_the_trunk(skip: Skip, run: Run, start: int) -> bool:
    """Whether it lies in what the trunk read, and not in a stage that begins with the branch at step `start`."""
    return skip.from_step < run.spec.num_steps and run.loader.stage_start(skip.from_step) < start


def _records_until(path: Path, step: int, finished: bool) -> list[str]:
    """The lines of the records of steps 1 to `step`, where a checkpoint was taken.

    Raises:
        Refusal: one of them is missing or damaged, or the last has no held-out loss though the run is finished.
    """
    lines = path.read_text(errors="replace").splitlines()[:step] if path.is_file() else []
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
    return [f"{line}\n" for line in lines]


def spent(directory: Path, records: list[str]) -> tuple[float, float]:
    """Seconds and cost of the run so far, with the steps that it is about to make again.

    Args:
        records: the lines up to the step that it goes on from; of a branch that begins, its trunk's.
    """
    lines = list(records)
    for name in (METRICS, LEFT_OUT, SPENT):
        if (directory / name).is_file():
            lines += (directory / name).read_text(errors="replace").splitlines()
    found = [_spent(line) for line in lines]
    seconds, cost = (max(each, default=0.0) for each in zip(*found, strict=True)) if found else (0.0, 0.0)
    return seconds, cost


def remember_spent(directory: Path, seconds: float, cost: float) -> None:
    """Keep beside the records what they are about to forget, as those go that are made again."""
    write_text(directory / SPENT, json.dumps({"seconds": seconds, "cost": cost}) + "\n")


def _spent(line: str) -> tuple[float, float]:
    """What a record says; nothing where it was cut by a kill."""
    try:
        record = json.loads(line)
        return float(record["seconds"]), float(record.get("cost", 0.0))
    except (ValueError, TypeError, KeyError, AttributeError):
        return 0.0, 0.0
