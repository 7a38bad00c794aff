"""Checkpoints: safetensors and JSON in a folder that appears whole or not at all."""

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from mutune.errors import Refusal
from mutune.files import fsync_directory, fsync_file
from mutune.parametrization.plan import Plan

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
    target, partial = root / str(step), root / f".{step}.partial"
    for stale in root.glob(".*.partial"):  # of a process that was killed
        shutil.rmtree(stale)
    partial.mkdir(parents=True)
    try:
        _write(partial, model, optimizer, {"step": step, "plan": plan.as_dict(), **meta})
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    stale = root / f".{step}.old.partial"
    if target.exists():  # the same step again, after a crash between rename and clean-up
        os.replace(target, stale)
    os.replace(partial, target)
    fsync_directory(root)
    shutil.rmtree(stale, ignore_errors=True)
    for old in sorted(list_steps(root))[:-keep]:
        shutil.rmtree(root / str(old))
    return target


def _write(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, meta: dict[str, Any]) -> None:
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach().cpu() for parameter, name in names.items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}.{key}": state[key].detach().cpu() for key in STATE_KEYS}
    try:
        save_file(tensors, directory / "state.safetensors")
    except SafetensorError as error:  # its own words for what the system said
        if "os error 28" in str(error) or "No space left" in str(error):
            raise OSError(errno.ENOSPC, "No space left on device", str(directory)) from error
        raise
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))
    for file in directory.iterdir():
        fsync_file(file)


def list_steps(root: Path) -> list[int]:
    """Steps that have a complete checkpoint under `root`."""
    names = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return [int(name) for name in names if name.isdecimal() and str(int(name)) == name]


def newest(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint, or None."""
    steps = list_steps(root)
    if not steps:
        return None
    path = root / str(max(steps))
    try:
        meta = json.loads((path / "meta.json").read_text())
        return Checkpoint(path, int(meta["step"]), meta)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise Refusal(
            f"checkpoint {path} cannot be read ({error}); delete that folder to use the one before it."
        ) from error


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
    """Load parameters and optimizer state by name, in place; all of them or none."""
    parameters = dict(model.named_parameters())
    try:
        tensors = load_file(checkpoint.path / "state.safetensors")
        values = {name: tensors[f"model.{name}"] for name in parameters}
        updated = len(tensors) > len(values)  # before the first update, Adam has no state
        states = {
            name: {key: tensors[f"optimizer.{name}.{key}"] for key in STATE_KEYS} for name in parameters if updated
        }
    except Exception as error:  # safetensors raises its own untyped error on a truncated file
        raise Refusal(
            f"checkpoint {checkpoint.path} is damaged ({error}); delete that folder to use the one before it."
        ) from error
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(values[name])
    for name, state in states.items():
        parameter = parameters[name]
        optimizer.state[parameter] = {key: tensor.to(parameter.device) for key, tensor in state.items()}


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict):
        return {prefix: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
