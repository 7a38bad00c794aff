"""What weights and Adam's moments say of the updates since the last probe, without a copy of either.

Shape suffixes: H heads, N tensors, C columns. Sharded tensors (FSDP2) are reduced over their shards.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mutune.model.decoder import Attention
from mutune.parametrization.names import canonical_name, trainable
from mutune.parametrization.plan import Plan
from mutune.training.world import is_sharded, whole

Fields = dict[str, float | str]
SAMPLED = 1024  # elements of each tensor (of its shard) that are held against where they were at the last probe
SILENT = 1e-4  # of the squared gradient of the layer's median head: below, a head is frozen
MANY = 1000  # elements whose RMS update is steady enough to stand for the steps between two probes
#: Columns of the statistics of a tensor, each a sum over its elements.
COLUMNS = ("weights", "updates", "moments", "below_eps", "size", "moves", "sampled")


@dataclass(frozen=True)
class Snapshot:
    """What the next probe is compared with; everything lies on the model's device.

    Attributes:
        steps, rates, updates: by tensor: Adam's step, the rate, the RMS of an update over the rate.
        samples: by tensor: some elements, float32.
        heads: by attention layer: Σ exp_avg_sq of each head's queries, keys and values, (3, H).
    """

    steps: dict[str, float]
    rates: dict[str, float]
    updates: dict[str, float]
    samples: dict[str, Tensor]
    heads: dict[str, Tensor]


def weights_and_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, last: Snapshot | None
) -> tuple[Fields, Snapshot]:
    """Fields of the weights and of Adam's moments, and the snapshot that the next probe is compared with."""
    every = trainable(model)
    samples = {name: _sample(local(tensor)) for name, tensor in every.items()}
    tensors = {name: tensor for name, tensor in every.items() if optimizer.state.get(tensor)}
    groups = {tensor: group for group in optimizer.param_groups for tensor in group["params"]}
    mine = {name: groups[tensor] for name, tensor in tensors.items()}
    states = {name: optimizer.state[tensor] for name, tensor in tensors.items()}
    steps = _numbers([state["step"] for state in states.values()])
    step_of = dict(zip(states, steps, strict=True))
    rows = {
        name: _row(local(tensor), states[name], mine[name], step_of[name], samples[name], _before(last, name))
        for name, tensor in tensors.items()
    }
    sums = _summed(rows, tensors)
    updates = {name: math.sqrt(row["updates"] / max(row["size"], 1.0)) for name, row in sums.items()}
    rates = {name: float(group["lr"]) for name, group in mine.items()}
    heads = {name: _head_moments(optimizer, module) for name, module in attentions(model).items()}
    now = Snapshot(step_of, rates, updates, samples, {name: h for name, h in heads.items() if h is not None})
    fields: Fields = dict(_by_role(sums, rates, plan))
    if sums:
        fields["second_moment"] = sum(row["moments"] for row in sums.values())
    if last is not None:
        fields |= dict(_moved(sums, now, last, mine))
        frozen = [*_stale(now, last), *_silent_heads(now, last, optimizer)]
        fields |= {"frozen": ", ".join(frozen)} if frozen else {}
    return fields, now


def _row(
    weight: Tensor,
    state: Mapping[str, Any],
    group: Mapping[str, Any],
    step: float,
    sample: Tensor,
    before: Tensor | None,
) -> Tensor:
    """The sums of one tensor, or of its shard, in the order of `COLUMNS`."""
    first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
    beta1, beta2 = group["betas"]
    root = (second / (1 - beta2**step)).sqrt()
    update = first / (1 - beta1**step) / (root + group["eps"])
    moves = torch.zeros_like(sample) if before is None else sample - before
    sums = (
        _square_sum(weight),
        _square_sum(update),
        second.sum(dtype=torch.float32),
        (root < group["eps"]).sum(),
        root.new_tensor(weight.numel()),
        _square_sum(moves),
        root.new_tensor(0 if before is None else sample.numel()),
    )
    return torch.stack([value.float() for value in sums])


def _square_sum(values: Tensor) -> Tensor:
    return values.float().square().sum()


def _sample(weight: Tensor) -> Tensor:
    flat = weight.flatten()
    return flat[:: max(1, flat.numel() // SAMPLED) | 1][:SAMPLED].float().clone()


def _before(last: Snapshot | None, name: str) -> Tensor | None:
    return None if last is None else last.samples.get(name)


def _by_role(
    sums: Mapping[str, Mapping[str, float]], rates: Mapping[str, float], plan: Plan
) -> Iterator[tuple[str, float]]:
    """Update ratios, and shares of elements below ε, by role."""
    roles: dict[str, list[str]] = defaultdict(list)
    for name in sums:
        roles[plan.parameters[name].role].append(name)
    for role, names in roles.items():
        updates = sum(rates[name] ** 2 * sums[name]["updates"] for name in names)
        weights = sum(sums[name]["weights"] for name in names)
        if weights > 0:
            yield f"update_ratio.{role}", math.sqrt(updates / weights)
        if not role.endswith("embedding"):
            yield f"eps_share.{role}", sum(sums[n]["below_eps"] for n in names) / sum(sums[n]["size"] for n in names)


def _moved(
    sums: Mapping[str, Mapping[str, float]], now: Snapshot, last: Snapshot, groups: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[str, float | str]]:
    """The RMS move of a tensor's sample over `steps · rate · (RMS update + λ · RMS weight)`, where it is largest."""
    found: dict[str, float] = {}
    for name, row in sums.items():
        steps = now.steps[name] - last.steps.get(name, 0.0)
        if row["sampled"] and steps > 0:
            decay = float(groups[name]["weight_decay"]) * math.sqrt(row["weights"] / row["size"])
            update = _largest_update(groups[name]["betas"])
            if row["size"] >= MANY and name in last.updates:
                update = min(update, max(now.updates[name], last.updates[name]))
            most = steps * max(now.rates[name], last.rates.get(name, 0.0)) * (update + decay)
            found[name] = math.sqrt(row["moves"] / row["sampled"]) / max(most, 1e-30)
    if found:
        name = max(found, key=lambda name: found[name])
        yield "moved", found[name]
        yield "moved_tensor", name


def _largest_update(betas: tuple[float, float]) -> float:
    """Adam's |m| ≤ c·√v, whatever the gradients were (Cauchy-Schwarz on the two averages)."""
    beta1, beta2 = betas
    if beta1**2 >= beta2:
        return math.inf
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))


def _stale(now: Snapshot, last: Snapshot) -> list[str]:
    """Tensors that were not updated while others were."""
    if max(now.steps.values(), default=0.0) == max(last.steps.values(), default=0.0):
        return []
    return [name for name, step in now.steps.items() if step == last.steps.get(name)]


def _head_moments(optimizer: torch.optim.Optimizer, attention: Attention) -> Tensor | None:
    """Σ exp_avg_sq of each head's rows of Q‖K‖V, (3, H)."""
    state = optimizer.state.get(attention.c_attn.weight)
    if not state:
        return None
    rows = whole(state["exp_avg_sq"].sum(dim=1))
    return rows.double().view(3, attention.heads, -1).sum(-1)


def _silent_heads(now: Snapshot, last: Snapshot, optimizer: torch.optim.Optimizer) -> list[str]:
    """Heads without a gradient: v_t - β2^n·v_(t-n) is a sum of their squared gradients since the last probe."""
    beta2, found = optimizer.param_groups[0]["betas"][1], []
    for layer, sums in now.heads.items():
        name = f"{layer}.c_attn.weight"
        steps = now.steps[name] - last.steps.get(name, 0.0)
        if steps <= 0:
            continue
        kept = beta2**steps
        before = last.heads.get(layer, torch.zeros_like(sums))
        fresh_H = (sums - kept * before).sum(0).tolist()
        usual = max(upper_median(fresh_H), (1 - kept) * upper_median(before.sum(0).tolist()))  # a layer may be silent
        found += [f"{layer} head {head}" for head, fresh in enumerate(fresh_H) if fresh < SILENT * usual]
    return found


def upper_median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def attentions(model: nn.Module) -> dict[str, Attention]:
    """Canonical name → attention layer."""
    return {canonical_name(name): module for name, module in model.named_modules() if isinstance(module, Attention)}


# ------------------------------------------------------------------------------------------------------------- sharding
def local(tensor: Any) -> Tensor:
    """A tensor, or this process's shard of it."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _summed(rows: Mapping[str, Tensor], tensors: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Name → column → sum over all shards; one reduction for all tensors that are sharded alike."""
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        key = (tensor.device_mesh, tuple(map(str, tensor.placements))) if is_sharded(tensor) else None
        alike[key].append(name)
    found: dict[str, dict[str, float]] = {}
    for key, names in alike.items():
        table_NC = torch.stack([rows[name] for name in names])
        if key is not None:
            mesh, placements = key[0], tensors[names[0]].placements
            for dimension, placement in enumerate(placements):
                if placement.is_shard():
                    torch.distributed.all_reduce(table_NC, group=mesh.get_group(dimension))
        for name, row in zip(names, table_NC.tolist(), strict=True):
            found[name] = dict(zip(COLUMNS, row, strict=True))
    return {name: found[name] for name in tensors}


def _numbers(values: list[Any]) -> list[float]:
    return (
        torch.stack([torch.as_tensor(local(value), dtype=torch.float32) for value in values]).tolist() if values else []
    )
