"""A second opinion on learning rates: those of the `mup` package, tensor by tensor, where its rules apply."""

from dataclasses import dataclass
from typing import TypeVar

import mup
import torch
from mup.infshape import InfDim, InfShape
from torch import nn

from mutune.parametrization.infer import Family
from mutune.parametrization.roles import CARRIERS, input_axes
from mutune.parametrization.rules import MUP
from mutune.parametrization.survey import Tensor

Shape = TypeVar("Shape")


@dataclass(frozen=True)
class Disagreement:
    """A tensor whose learning-rate multiplier differs between table `mup` and `mup.MuAdamW`.

    Attributes:
        tensor: its name.
        ours, theirs: the multipliers; `theirs` is None where mup refuses the tensor.
        why_not: why mup's rules do not apply; empty where they do, and one of the two is wrong.
    """

    tensor: str
    ours: float
    theirs: float | None
    why_not: str


def mup_opinion(family: Family[Shape], shape: Shape) -> list[Disagreement]:
    """Where `mup.MuAdamW` would use another rate at `shape` than table `mup` does; empty is agreement.

    mup divides the rate of a tensor with two infinite dimensions by the ratio of the last of them, and leaves every
    other rate alone (`mup/optim.py`). That is no rule for a matrix with one infinite dimension, its fan-in (keys of a
    fixed width, routers), nor for a tensor whose fan-in is not its last dimension (experts (E, in, out), Hugging Face's
    Conv1D): such disagreements carry their reason.
    """
    tensors, rows = family.tensors(shape), family.rows(shape, MUP)
    found = []
    for name, tensor in tensors.items():
        theirs = _rate(tensor, family.like(name).shape)
        if rows[name].lr_mult != theirs:
            found.append(Disagreement(name, rows[name].lr_mult, theirs, _why_not(tensor, rows[name].role)))
    return found


def _rate(tensor: Tensor, base: tuple[int, ...]) -> float | None:
    """What `mup.MuAdamW` makes of a base rate of 1; None where it raises."""
    parameter = nn.Parameter(torch.empty(tensor.shape, device="meta"))
    dims = zip(base, tensor.shape, tensor.infinite, strict=True)
    infshape = InfShape(InfDim(wide if grows else None, dim) for wide, dim, grows in dims)
    parameter.infshape = infshape  # type: ignore[attr-defined]
    try:
        optimizer = mup.MuAdamW([{"params": [parameter]}], lr=1.0)
    except NotImplementedError:  # more than two infinite dimensions
        return None
    return next(float(group["lr"]) for group in optimizer.param_groups if group["params"])


def _why_not(tensor: Tensor, role: str) -> str:
    axes, wide = input_axes(tensor), tensor.infinite_axes
    if role in CARRIERS and len(wide) <= 1:
        return ""
    if len(wide) == 1:
        return "one infinite dimension, which is the fan-in of a hidden matrix; mup takes it for an output"
    if len(wide) == 2 and axes is not None and wide[-1] in axes:
        return ""
    return "the last infinite dimension, from which mup takes its ratio, is not the fan-in"
