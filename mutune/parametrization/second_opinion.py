"""A second opinion on a plan's rates and decays: those that the `mup` package gives the same model."""

from collections.abc import Iterator
from typing import Any

import mup
from torch import nn

from mutune.parametrization.finding import Finding, same
from mutune.parametrization.names import canonical_name
from mutune.parametrization.plan import Plan

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
    """(name, group) of `mup.MuAdamW` at rate 1 and decay 1."""
    mup.set_base_shapes(target, base, delta=delta, rescale_params=False, do_assert=False)
    for name, parameter in target.named_parameters():
        groups = mup.MuAdamW([{"params": [parameter], "weight_decay": 1.0}], lr=1.0).param_groups
        yield canonical_name(name), next(group for group in groups if group["params"])  # it leaves empty ones behind
