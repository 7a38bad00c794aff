"""A plan applied to a live model: initial values and ordinary optimizer groups, both keyed by canonical name.

Wrapped or not (DDP, FSDP2, `torch.compile`, an average, a parametrization), the model has the same names here.
"""

import hashlib
from collections import defaultdict

import torch
from torch import nn

from mutune.errors import require
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import trainable
from mutune.parametrization.plan import Plan, TensorPlan
from mutune.parametrization.rules import NORMAL, ONES, TRUNCATED_NORMAL


@torch.no_grad()
def initialise(model: nn.Module, plan: Plan, seed: int) -> None:
    """Give every parameter its initial value, drawn on the CPU from a generator seeded by (seed, name).

    The values depend on nothing else: not on the order of the parameters, the device, or the number of processes. A
    sharded parameter (DTensor) gets its part of the same whole; every process must call this. Buffers are left alone,
    so `to_empty` leaves them for the caller to fill.

    Raises:
        Refusal: other tensors than the plan's, of another shape, or on the meta device.
    """
    for name, parameter in planned(model, plan).items():
        require(not parameter.is_meta, f"{name} is on the meta device; call model.to_empty(device='cpu') first.")
        shape = "x".join(map(str, parameter.shape))
        require(
            shape == plan.parameters[name].shape,
            f"{name} is {shape}, and the plan is for {plan.parameters[name].shape}; build the model at the shape that "
            f"was planned.",
        )
        _write(parameter, initial_tensor(plan.parameters[name], parameter.shape, seed))


def planned(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Canonical name → trainable parameter, in the plan's order, whatever a wrapper made of the model's.

    Raises:
        Refusal: the model's tensors are not exactly those of the plan.
    """
    check_model(model)
    parameters = trainable(model)
    extra = [name for name in parameters if name not in plan.parameters]
    require(
        not extra,
        f"the model has {_listed(extra)}, which the plan does not; if it was tied when the plan was made, tie it again "
        f"(to_empty and load_state_dict(assign=True) untie), else plan the model as it is.",
    )
    lost = [name for name in plan.parameters if name not in parameters]
    require(
        not lost,
        f"the plan has {_listed(lost)}, which the model does not have or does not train; plan the model as it is.",
    )
    return {name: parameters[name] for name in plan.parameters}


def check_model(model: nn.Module) -> None:
    """Refuse what is no module, such as its parameters."""
    require(isinstance(model, nn.Module), f"the model given is a {type(model).__name__}; give the nn.Module itself.")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            value = value.to(parameter.device, parameter.dtype)
            value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def initial_tensor(row: TensorPlan, shape: torch.Size, seed: int) -> torch.Tensor:
    """The initial value of one tensor, float32, on the CPU."""
    value = torch.empty(shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(_seed_of(seed, row.name))
    if row.init == NORMAL:
        return value.normal_(0.0, row.init_std, generator=generator)
    if row.init == TRUNCATED_NORMAL:
        cut = 2.0 * row.init_std
        return nn.init.trunc_normal_(value, 0.0, row.init_std, -cut, cut, generator=generator)
    return value.fill_(1.0 if row.init == ONES else 0.0)


def set_multipliers(model: nn.Module, plan: Plan) -> None:
    """Give every `Multiplier` of the model the plan's value for its site.

    Raises:
        Refusal: a site that the plan does not have.
    """
    for name, module in model.named_modules():
        if isinstance(module, Multiplier):
            require(
                module.site in plan.multipliers,
                f"{name} multiplies at site {module.site}, which the plan does not have; it has "
                f"{list(plan.multipliers)}.",
            )
            module.value = plan.multipliers[module.site].value


def optimizer_groups(model: nn.Module, plan: Plan) -> list[dict[str, object]]:
    """Ordinary `torch.optim.AdamW` groups: one per distinct (peak rate, decay, ε), with `peak_lr` beside `lr`.

    Raises:
        Refusal: other tensors than the plan's.
    """
    members: dict[tuple[float, float, float], list[tuple[str, nn.Parameter]]] = defaultdict(list)
    for name, parameter in planned(model, plan).items():
        row = plan.parameters[name]
        members[(row.peak_lr, row.weight_decay, row.adam_eps)].append((name, parameter))
    return [
        {"params": named, "lr": lr, "peak_lr": lr, "weight_decay": decay, "eps": eps}
        for (lr, decay, eps), named in members.items()
    ]


def make_optimizer(model: nn.Module, plan: Plan, *, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Fused AdamW over the plan's groups."""
    return torch.optim.AdamW(optimizer_groups(model, plan), betas=betas, fused=True)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every group's peak rate by one factor: the only way that mutune changes rates.

    Raises:
        Refusal: an optimizer that no plan made.
    """
    for group in optimizer.param_groups:
        require(
            "peak_lr" in group,
            "the optimizer has a group without peak_lr, so it was not made by a plan; make it with "
            "parametrize(...).optimizer(model).",
        )
        group["lr"] = group["peak_lr"] * factor


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch takes a non-negative int64
