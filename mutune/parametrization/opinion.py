"""A second opinion on a plan: what `mup.MuAdamW` would do to each tensor, where its rules apply."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import mup
import torch
from mup.infshape import InfDim, InfShape
from torch import nn

from mutune.parametrization.finding import Finding, same
from mutune.parametrization.infer import Family
from mutune.parametrization.names import canonical_name
from mutune.parametrization.plan import Plan
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
        return float(_group(parameter)["lr"])
    except NotImplementedError:  # more than two infinite dimensions
        return None


def _group(parameter: nn.Parameter) -> dict[str, Any]:
    """The group in which `mup.MuAdamW` puts a parameter, at rate 1 and decay 1; it leaves empty ones behind."""
    groups = mup.MuAdamW([{"params": [parameter], "weight_decay": 1.0}], lr=1.0).param_groups
    return next(group for group in groups if group["params"])


def _why_not(tensor: Tensor, role: str) -> str:
    axes, wide = input_axes(tensor), tensor.infinite_axes
    if role in CARRIERS and len(wide) <= 1:
        return ""
    if len(wide) == 1:
        return "one infinite dimension, which is the fan-in of a hidden matrix; mup takes it for an output"
    if len(wide) == 2 and axes is not None and wide[-1] in axes:
        return ""
    return "the last infinite dimension, from which mup takes its ratio, is not the fan-in"


#: Tables whose rates are those of `mup.MuAdamW` (Table 8's placement), and whether its decays are too.
AGREES = {"mup": ("lr", "weight_decay"), "btlm": ("lr",)}


def second_opinion(
    plan: Plan, base: nn.Module, delta: nn.Module, target: nn.Module, *, decays: bool = True
) -> list[Finding]:
    """Where the plan's rate and decay multipliers differ from those of `mup.MuAdamW`; empty where they agree.

    Its rules are those of tables `mup` and, without the decay, `btlm`, of matrices that are `nn.Linear` weights with
    (fan_out, fan_in), and of decays that follow the table: for any other table there is nothing to compare, and the
    list is empty too.

    Args:
        base, delta, target: the model at the base shape, at another width, and at the plan's, on the meta device; they
            differ in width alone. `target` is marked by `mup` and is good for nothing else afterwards.
        decays: whether the plan's decays are the table's (`parametrization.decay=table`).
    """
    quantities = AGREES.get(plan.table, ())
    found = []
    for name, theirs in _mup_multipliers(base, delta, target) if quantities else ():
        row = plan.parameters[name]
        for quantity, ours in (("lr", row.lr_mult), ("weight_decay", row.wd_mult)):
            compared = quantity in quantities and (quantity == "lr" or (decays and row.wd_mult > 0))
            if compared and not same(ours, theirs[quantity]):
                why = "the mup package gives another value for this shape, so one of the two has its fan-in wrong"
                found.append(Finding(name, f"multiplier of {quantity}", theirs[quantity], ours, why))
    return found


def _mup_multipliers(base: nn.Module, delta: nn.Module, target: nn.Module) -> Iterator[tuple[str, dict[str, Any]]]:
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False, do_assert=False)
    for name, parameter in target.named_parameters():
        yield canonical_name(name), _group(parameter)
