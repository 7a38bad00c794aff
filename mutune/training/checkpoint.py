"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all.

One process writes one file. Several write a file each, by torch's distributed checkpoint; either is read by any number
of processes. No file holds code.
"""

import errno
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mutune.data.segments import Skip
from mutune.errors import Refusal, first_line, require
from mutune.files import fsync_directory, fsync_file, remove, write_json
from mutune.parametrization.forward_pass import reshard
from mutune.parametrization.plan import Plan
from mutune.training.guard import require_state
from mutune.training.world import is_sharded

GONE_BACK, KEPT_EVERY = "gone_back.json", "kept_every.json"
MOST_NAMED = 8
T = TypeVar("T")
STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Checkpoint:
    """A saved state: its folder, the step it was taken at, and the data that came with it."""

    path: Path
    step: int
    meta: dict[str, Any]


def save(
    root: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    meta: dict[str, Any],
    keep: int,
) -> Path:
    """Write `root/<step>/` atomically and drop all but the `keep` newest; a failure leaves nothing of it behind.

    Args:
        meta: JSON-able facts that must agree at load (hashes) or inform (versions).
    """
    partial = begin(root, step)
    try:
        write_whole(partial, state_of(model, optimizer))
        describe(partial, step, plan, meta)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return publish(root, step, lambda kept: kept[-keep:])


def begin(root: Path, step: int) -> Path:
    """The empty folder that a checkpoint is written to; what a killed process left of others goes."""
    for stale in root.glob(".*.partial"):
        remove(stale)
    partial = _partial(root, step)
    partial.mkdir(parents=True)
    return partial


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Parameters and Adam's state by name, as they are: sharded ones stay so."""
    reshard(model)  # after an evaluation, FSDP2 still has what it gathered in their places
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": state[key].detach() for key in STATE_KEYS}
    return tensors


def write_whole(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors that this process has all of."""
    try:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, directory / "state.safetensors")
    except SafetensorError as error:  # its own words for what the system said
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(directory)) from error
        raise


def describe(partial: Path, step: int, plan: Plan, meta: dict[str, Any]) -> None:
    """Write what the checkpoint is of beside its tensors, and see that all of it is on the disk.

    Args:
        meta: JSON-able facts that must agree at load (hashes) or inform (versions).
    """
    files = {file.name: file.stat().st_size for file in sorted(partial.iterdir())}
    facts = {"step": step, "plan": plan.as_dict(), **meta, "files": files}
    (partial / "meta.json").write_text(json.dumps(facts, indent=1))
    for file in partial.iterdir():
        fsync_file(file)


def publish(root: Path, step: int, kept: Callable[[list[int]], list[int]]) -> Path:
    """Give the folder that was written and described its name, and drop older checkpoints.

    Args:
        kept: of the steps that have a checkpoint, in order, those that stay.
    """
    target, partial = root / str(step), _partial(root, step)
    stale = root / f".{step}.old.partial"
    if target.exists():  # the same step again, after a crash between rename and clean-up
        os.replace(target, stale)
    os.replace(partial, target)
    fsync_directory(root)
    remove(stale)
    steps = sorted(list_steps(root))
    for old in sorted(set(steps) - set(kept(steps)) - {step}):
        leaving = root / f".{old}.old.partial"  # by another name first: a kill leaves no half of it under its own
        os.replace(root / str(old), leaving)
        remove(leaving)
    return target


def _partial(root: Path, step: int) -> Path:
    return root / f".{step}.partial"


def list_steps(root: Path) -> list[int]:
    """Steps that have a complete checkpoint under `root`."""
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    steps = list_steps(root)
    return read(root / str(max(steps))) if steps else None


def choose(root: Path, step: int | None) -> int:
    """The step to go on from: that one, or None the newest; 0 where there is none.

    A step that was gone back to once is not gone back to again (`gone_back`): the same command goes on.

    Raises:
        Refusal: there is no checkpoint of that step.
    """
    steps = sorted(list_steps(root))
    if step is None or step == gone_back(root):
        return steps[-1] if steps else 0
    works = f"there are {', '.join(map(str, steps[-MOST_NAMED:]))}" if steps else "leave it out to begin anew"
    require(step in steps, f"resume={step} has no checkpoint under {root}; {works}.")
    return step


def skips_of(found: Checkpoint) -> tuple[Skip, ...]:
    """The batches that rollbacks had left out of a run by then.

    Raises:
        Refusal: what the guard knew is damaged.
    """
    try:
        require_state(found.meta.get("guard", {}))
    except Refusal as error:
        raise Refusal(
            f"{found.path}/meta.json is damaged where it says what the guard knew ({error}); restore it, or go on from "
            "an earlier checkpoint with resume=STEP."
        ) from error
    return tuple(Skip(*pair) for pair in found.meta.get("guard", {}).get("skips", ()))


def set_aside(root: Path, step: int) -> list[int]:
    """Rename the checkpoints that are newer than `step`, so that it is the newest; returns which.

    The rotation leaves them alone: only who went back knows whether that was right. One that was set aside at the same
    step before goes, so that there are no more of them than steps.
    """
    newer = sorted(saved for saved in list_steps(root) if saved > step)
    for saved in newer:
        aside = _aside(root, saved)
        remove(aside)
        os.replace(root / str(saved), aside)
    return newer


def aside_bytes(root: Path, steps: Sequence[int]) -> int:
    """What the checkpoints of these steps that were set aside take on the disk."""
    files = (file for step in steps for file in _aside(root, step).iterdir())
    return sum(file.stat().st_size for file in files if file.is_file())


def _aside(root: Path, step: int) -> Path:
    return root / f"{step}.aside"


def note_going_back(root: Path, step: int) -> None:
    """Remember that `resume=step` was done."""
    write_json(root / GONE_BACK, {"resume": step})


def gone_back(root: Path) -> int | None:
    """The step that was last gone back to by `resume=`."""
    return _noted(root / GONE_BACK, lambda data: int(data["resume"]))


def kept_every(root: Path, steps: int | None) -> list[int]:
    """Every how many steps checkpoints were ever asked to stay, this time included: a later start that does not ask
    leaves them.
    """
    path = root / KEPT_EVERY
    known = _noted(path, lambda data: [*map(_counting, data["steps"])]) or []
    if steps is None or steps in known:
        return known
    root.mkdir(parents=True, exist_ok=True)
    write_json(path, {"steps": sorted([*known, steps])})
    return sorted([*known, steps])


def _noted(path: Path, read_as: Callable[[Any], T]) -> T | None:
    """What a small file beside the checkpoints says; None where there is none.

    Raises:
        Refusal: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        return read_as(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise Refusal(f"{path} is damaged ({first_line(error)}); restore it, or remove it.") from error


def _counting(number: Any) -> int:
    """A number of steps."""
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"{number} is no number of steps")
    return number


def read(path: Path, cure: Callable[[Path], str] | None = None) -> Checkpoint:
    """What the checkpoint in that folder says of itself, and that its files are all there and whole.

    Args:
        cure: path → what to do about it where it is no use; None is about a run's own.

    Raises:
        Refusal: it is no use.
    """
    cure = cure or _cure
    try:
        found = _described(path)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise Refusal(f"checkpoint {path} cannot be read ({first_line(error)}); {cure(path)}.") from error
    for name, size in found.meta["files"].items():
        file = path / name
        have = file.stat().st_size if file.is_file() else None
        lack = "is missing" if have is None else f"has {have:,} of its {size:,} bytes"
        require(have == size, f"checkpoint {path} is damaged ({name} {lack}); {cure(path)}.")
    named = int(path.name) if path.name.isdecimal() else found.step
    require(
        found.step == named,
        f"checkpoint {path} is that of step {found.step:,} by its own meta.json; give it back its name, or: "
        f"{cure(path)}.",
    )
    return found


def _described(path: Path) -> Checkpoint:
    """By its meta.json. Raises all sorts of errors where that is damaged."""
    meta = json.loads((path / "meta.json").read_text())
    for key in ("plan", "files", "guard", "versions"):
        meta.get(key, {}).keys()  # raises where it is no mapping
    meta |= {"files": {name: int(size) for name, size in meta.get("files", {}).items()}}
    return Checkpoint(path, int(meta["step"]), meta)


def _cure(path: Path) -> str:
    """What to do about a run's own checkpoint that is no use."""
    if (before := before_it(path)) is not None:
        return f"resume={before} goes on from the one before it"
    return "there is none before it, so begin anew with another name=NAME or overwrite=true"


def before_it(path: Path) -> int | None:
    """The step of the checkpoint before this one in its folder."""
    steps = [step for step in list_steps(path.parent) if path.name.isdecimal() and step < int(path.name)]
    return max(steps, default=None)


def check_meta(checkpoint: Checkpoint, plan: Plan, meta: dict[str, Any]) -> None:
    """Refuse a checkpoint of another shape, plan, data or tokenizer; names the first difference."""
    stored, wanted = _flat(checkpoint.meta), _flat(json.loads(json.dumps({"plan": plan.as_dict(), **meta})))
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise Refusal(
                f"checkpoint {checkpoint.path} was written by another run: {key} is {stored.get(key)} there and "
                f"{value} now; use another name=... or overwrite=true."
            )
    extra = [key for key in stored if key.startswith("plan.") and key not in wanted]
    if extra:
        raise Refusal(
            f"checkpoint {checkpoint.path} was written by another run: it has {extra[0]}, which the model now lacks; "
            f"use another name=... or overwrite=true."
        )


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load parameters and optimizer state by name, in place; of a model that is not sharded all or none.

    With a sharded model every process calls this, and reads its own part, whoever wrote it.
    """
    reshard(model)
    parameters = dict(model.named_parameters())
    if any(map(is_sharded, parameters.values())) or not (checkpoint.path / "state.safetensors").is_file():
        _restore_shards(checkpoint, model, optimizer)
        return
    try:
        tensors = load_file(checkpoint.path / "state.safetensors")
        values = {name: tensors[f"model.{name}"] for name in parameters}
        updated = len(tensors) > len(values)  # before the first update, Adam has no state
        states = {
            name: {key: tensors[f"optimizer.{name}.{key}"] for key in STATE_KEYS} for name in parameters if updated
        }
    except Exception as error:  # safetensors raises its own untyped error on a truncated file
        raise _damaged(checkpoint, error) from error
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(values[name])
    for name, state in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}


def _restore_shards(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Through torch's distributed checkpoint, which reads one file as well as many."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
            "step": torch.zeros((), device=parameter.device),
        }
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that one process loads by itself
            load(
                state_of(model, optimizer),
                storage_reader=HuggingFaceStorageReader(str(checkpoint.path)),
                no_dist=not torch.distributed.is_initialized(),
            )
    except (CheckpointException, Exception) as error:  # the first is no Exception
        raise _damaged(checkpoint, error) from error


def _damaged(checkpoint: Checkpoint, error: BaseException) -> Refusal:
    said = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return Refusal(f"checkpoint {checkpoint.path} is damaged ({said}); {_cure(checkpoint.path)}.")


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
