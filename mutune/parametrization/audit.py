"""The auditor: the live tensors and optimizer groups held against the plan, before a run costs anything.

It reads what is there, never what a configuration says: every distinct trainable tensor, every group's rate, decay and
ε now in force, the initial values, the multipliers as they act in the forward pass, and the rates that a scheduler is
about to set. It changes nothing.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mutune.parametrization.finding import AuditError, Finding, common_ratio, same
from mutune.parametrization.forward_pass import acting_multipliers, live_multipliers, reshard
from mutune.parametrization.initial_values import initial_values
from mutune.parametrization.lookahead import Peak, rates_ahead
from mutune.parametrization.names import canonical_name
from mutune.parametrization.plan import Plan, TensorPlan

Group = Mapping[str, Any]


def audit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    scheduler: Any = None,
    *,
    at_init: bool = False,
    factor: float | None = None,
    betas: tuple[float, float] | None = None,
    forward: Callable[[], Any] | None = None,
) -> None:
    """Stop a run that is not the one its plan describes; takes what `findings` takes.

    Raises:
        AuditError: with every finding, one sentence for each kind of tensor.
    """
    found = findings(model, optimizer, plan, scheduler, at_init=at_init, factor=factor, betas=betas, forward=forward)
    if found:
        raise AuditError(found)


def findings(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    scheduler: Any = None,
    *,
    at_init: bool = False,
    factor: float | None = None,
    betas: tuple[float, float] | None = None,
    forward: Callable[[], Any] | None = None,
) -> list[Finding]:
    """Every mismatch between a live run and its plan; an empty list where there is none.

    The model may be wrapped (DDP, FSDP2, `torch.compile`, an average of models): names are compared without what
    wrappers add. With sharded tensors every process must call it, at the same step. FSDP1's flat parameters and
    optimizers that hold master copies of the tensors have other tensors than the model, and are reported as such.

    Args:
        scheduler: a torch scheduler of this optimizer; a copy of it is run ahead on a stand-in.
        at_init: whether the tensors still have their initial values, which are then compared too.
        factor: rate / peak rate now in force; without it, any factor that all groups share will do.
        betas: Adam's β1 and β2; without them, any pair that all groups share will do.
        forward: runs the model once and returns what it returns, for example `lambda: model(ids)`. It is called once
            in the model's own mode, and in evaluation mode once per `Multiplier` module, or once per block where one
            serves all blocks, without gradients; a short input will do.
    """
    reshard(model)
    tensors = live_tensors(model)
    groups = _groups(optimizer)
    planned = {name: groups[tensor] for name, tensor in tensors.items() if name in plan.parameters and tensor in groups}
    in_force = {name: found[0] for name, found in planned.items()}
    rates = list(_rates(in_force, plan, factor))
    off = {finding.tensor for finding in rates}
    rates += [finding for finding in _peaks(in_force, plan) if finding.tensor not in off]
    ahead: list[Finding] = []
    if scheduler is not None:
        ahead += rates_ahead(scheduler, optimizer, _peaks_by_group(in_force, plan, optimizer), simulate=not rates)
    found = [
        *_tensors(tensors, plan),
        *_membership(tensors, optimizer, plan),
        *_family(optimizer, plan, betas),
        *ahead,  # before what it may have done to the rates already
        *rates,
        *_decay_and_eps(in_force, plan),
        *live_multipliers(model, plan),
    ]
    if at_init:
        found += initial_values(tensors, plan)
    if forward is not None:
        found += acting_multipliers(model, plan, forward)
    return found


def live_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name → parameter, each distinct tensor once, frozen ones too, in the model's order."""
    found: dict[str, nn.Parameter] = {}
    for raw, parameter in model.named_parameters():
        name = canonical_name(raw)
        found[raw if name in found else name] = parameter
    return found


# ------------------------------------------------------------------------------------------------------------- tensors
def _tensors(tensors: Mapping[str, nn.Parameter], plan: Plan) -> Iterator[Finding]:
    """The distinct trainable tensors are exactly the plan's rows."""
    for name, tensor in tensors.items():
        row, shape = plan.parameters.get(name), "x".join(map(str, tensor.shape))
        if row is None:
            if tensor.requires_grad:
                yield Finding(name, "trainable tensor", "absent", shape, _why_extra(tensor, plan))
        elif row.shape != shape:
            yield Finding(name, "shape", row.shape, shape, "the plan was made for a model of another shape")
        elif not tensor.requires_grad:
            yield Finding(name, "requires_grad", "True", "False", "it is frozen, and the plan trains it")
    for name, row in plan.parameters.items():
        if name not in tensors:
            yield Finding(
                name, "trainable tensor", row.shape, "absent", "the model lacks it, or shares it with another tensor"
            )


def _why_extra(tensor: nn.Parameter, plan: Plan) -> str:
    tied = plan.multipliers["output"].tensor if "output" in plan.multipliers else ""
    ends = [site.tensor for site in plan.multipliers.values()].count(tied)
    sizes = sorted(tensor.shape)
    if ends > 1 and tied in plan.parameters and sizes == sorted(map(int, plan.parameters[tied].shape.split("x"))):
        return f"tying lost: the plan has it as one tensor with {tied}, and here it is a copy"
    return "the plan does not rule it, so the optimizer's defaults would"


def _groups(optimizer: torch.optim.Optimizer) -> dict[torch.Tensor, list[dict[str, Any]]]:
    """Tensor → the groups that hold it (tensors hash by identity)."""
    found: dict[torch.Tensor, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            found.setdefault(tensor, []).append(group)
    return found


def _membership(tensors: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, plan: Plan) -> Iterator[Finding]:
    """Every planned tensor is in exactly one group, and the groups hold nothing else that trains."""
    groups = _groups(optimizer)
    mine = {name: tensor for name, tensor in tensors.items() if name in plan.parameters and tensor.requires_grad}
    counts = {name: len(groups.get(tensor, [])) for name, tensor in mine.items()}
    strangers = len(groups.keys() - set(tensors.values()))
    if mine and not any(counts.values()):
        yield Finding(
            "optimizer",
            "number of the model's tensors in it",
            str(len(mine)),
            "0",
            "it holds another model's tensors: it was built before the model was copied, converted or wrapped",
        )
        return
    for name, count in counts.items():
        if count != 1:
            why = "it is never updated" if count == 0 else "each step updates it more than once"
            yield Finding(name, "number of optimizer groups", "1", str(count), why)
    if strangers:
        yield Finding(
            "optimizer", "number of tensors that the model does not have", "0", str(strangers), "it was built elsewhere"
        )


# ------------------------------------------------------------------------------------------------- the optimizer's kind
def _family(optimizer: torch.optim.Optimizer, plan: Plan, betas: tuple[float, float] | None) -> Iterator[Finding]:
    """Adam with decoupled decay, and one sensible pair of betas."""
    adam = (torch.optim.Adam, torch.optim.AdamW)
    if not isinstance(optimizer, adam):
        name = type(optimizer).__name__
        why = f"table {plan.table} scales rates for Adam's updates, and other families scale otherwise"
        yield Finding("optimizer", "family", "AdamW", name, why)
        return
    decays = any(row.weight_decay for row in plan.parameters.values())
    for group in optimizer.param_groups:
        decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
        if decays and not decoupled:
            why = "Adam adds λ·w to the gradient, where it does not scale like the decay of AdamW"
            yield Finding("optimizer", "weight decay", "decoupled", "coupled", why)
            break
    if any(group.get("maximize") for group in optimizer.param_groups):
        why = "each step goes up the gradient; a score to be maximised is minimised with its sign changed"
        yield Finding("optimizer", "maximize", "False", "True", why)
    wanted = betas or _pair(optimizer.param_groups[0])
    for group in optimizer.param_groups:
        pair = _pair(group)
        if not all(0.0 <= beta < 1.0 for beta in pair):
            yield Finding("optimizer", "betas", "in [0, 1)", _pair_shown(pair), "the moments would not decay")
            break
        if not all(map(same, pair, wanted)):
            why = "the groups were not made with the run's hyperparameters, or a scheduler changes the momentum"
            yield Finding("optimizer", "betas", _pair_shown(wanted), _pair_shown(pair), why)
            break


def _pair(group: Group) -> tuple[float, float]:
    first, second = group["betas"]
    return float(first), float(second)


def _pair_shown(pair: tuple[float, float]) -> str:
    return f"({pair[0]:g}, {pair[1]:g})"


# ------------------------------------------------------------------------------------------------ rates, decay, epsilon
def _rates(in_force: Mapping[str, Group], plan: Plan, factor: float | None) -> Iterator[Finding]:
    """Every rate is the plan's peak times one factor."""
    rates = {name: float(group["lr"]) for name, group in in_force.items()}
    ratios = {name: rate / plan.parameters[name].peak_lr for name, rate in rates.items()}
    shared = common_ratio(ratios.values())
    if factor is not None and not same(shared, factor) and all(same(ratio, shared) for ratio in ratios.values()):
        name, row = next((name, plan.parameters[name]) for name in ratios)
        why = "every rate is off by this factor, so the schedule is at another step or has another peak"
        yield Finding(name, "learning rate", row.peak_lr * factor, rates[name], why)
        return
    wanted = shared if factor is None else factor
    one_rate = all(same(rate, next(iter(rates.values()))) for rate in rates.values())
    for name, ratio in ratios.items():
        row = plan.parameters[name]
        if not same(ratio, wanted):
            why = _why_rate(row, ratio, wanted, one_rate)
            yield Finding(name, "learning rate", row.peak_lr * wanted, rates[name], why)


def _why_rate(row: TensorPlan, ratio: float, wanted: float, one_rate: bool) -> str:
    if one_rate:
        return "every group has the same rate: the table was never applied, or something set one rate for all"
    if ratio <= 0 or wanted <= 0 or row.lr_mult == 1:
        return "the rate was set after the groups were made, or by another plan"
    times = 1 + math.log(ratio / wanted) / math.log(row.lr_mult)  # how often the table's multiplier is in it
    known = {
        0.0: f"the table's multiplier {row.lr_mult:.4g} was not applied",
        0.5: f"only the square root of the table's multiplier {row.lr_mult:.4g} was applied",
        2.0: f"the table's multiplier {row.lr_mult:.4g} was applied twice",
    }
    default = "the rate was set after the groups were made, or by another plan"
    return next((why for number, why in known.items() if abs(times - number) < 1e-3), default)


def _peaks(in_force: Mapping[str, Group], plan: Plan) -> Iterator[Finding]:
    """What a schedule starts from: `peak_lr` is the plan's, `initial_lr` has its ratios."""
    for name, group in in_force.items():
        peak = plan.parameters[name].peak_lr
        if "peak_lr" in group and not same(float(group["peak_lr"]), peak):
            why = "the schedule multiplies this number, and it is of another plan or checkpoint"
            yield Finding(name, "peak_lr", peak, float(group["peak_lr"]), why)
    starts = {name: float(group["initial_lr"]) for name, group in in_force.items() if "initial_lr" in group}
    shared = common_ratio(start / plan.parameters[name].peak_lr for name, start in starts.items())
    for name, start in starts.items():
        peak = plan.parameters[name].peak_lr
        if not same(start / peak, shared):
            why = "a scheduler multiplies this number, and its ratio to the other groups is not the plan's"
            yield Finding(name, "initial_lr", peak * shared, start, why)


def _decay_and_eps(in_force: Mapping[str, Group], plan: Plan) -> Iterator[Finding]:
    for name, group in in_force.items():
        row = plan.parameters[name]
        decay, eps = float(group.get("weight_decay", 0.0)), float(group.get("eps", math.nan))
        if not same(decay, row.weight_decay):
            yield Finding(name, "weight decay", row.weight_decay, decay, _why_decay(row))
        if "eps" in group and not same(eps, row.adam_eps):
            why = "this is torch's default" if eps == 1e-8 else "ε does not follow the gradient's scale as planned"
            yield Finding(name, "Adam's eps", row.adam_eps, eps, why)


def _why_decay(row: TensorPlan) -> str:
    if row.weight_decay == 0.0:
        return f"the plan does not decay this {row.role}"
    return "the decay was set after the groups were made, or by another plan"


def _peaks_by_group(in_force: Mapping[str, Group], plan: Plan, optimizer: torch.optim.Optimizer) -> list[Peak | None]:
    """For each group its first planned tensor and that tensor's peak rate."""
    peaks: dict[int, Peak] = {}
    for name, group in in_force.items():
        peaks.setdefault(id(group), (name, plan.parameters[name].peak_lr))
    return [peaks.get(id(group)) for group in optimizer.param_groups]
