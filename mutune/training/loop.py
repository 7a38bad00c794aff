"""The training loop: a generator of records. Logging, pruning and checkpoints belong to whoever iterates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mutune.model.decoder import Decoder
from mutune.parametrization.apply import set_rates
from mutune.training.guard import rank_fields
from mutune.training.world import World, alone, reduce_last, whole

Record = dict[str, Any]
#: (ids (B, T), targets (B, T)) → mean loss in nats per token.
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Heldout:
    """A fixed set of held-out windows, (N, T+1) token ids, and the number of bytes each token id stands for."""

    windows: np.ndarray
    token_bytes: np.ndarray
    chunk: int = 16


def train(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    batch: Callable[[int], np.ndarray],
    rate: Callable[[int], float],
    *,
    loss: Loss | None = None,
    start_step: int,
    num_steps: int,
    peak_lr: float,
    clip_norm: float,
    micro_sequences: int,
    loss_bound: float,
    warmup_steps: int,
    world: World | None = None,
) -> Iterator[Record]:
    """Train from `start_step` to `num_steps`, yielding one record after each update.

    Args:
        batch: global step → token ids (B, T+1), this process's rows of the global batch.
        rate: step → rate / peak rate.
        loss: computes the model's mean loss; None is `model.loss`.
        peak_lr: the base peak rate; only reported, as `lr`.
        clip_norm: bound on the global gradient norm.
        micro_sequences: sequences per forward pass; the rest is gradient accumulation.
        loss_bound: nats per token. A loss above it after `warmup_steps`, or a loss or gradient norm that is not
            finite, ends the run with `diverged: True` in its last record, and without an update.
        world: the processes that train together; None is this one.

    Yields:
        `step` (updates done), `tokens` (in the global batch), `loss` (nats per token, before the update), `lr`,
        `grad_norm` (before clipping), `diverged`; with several processes what `rank_fields` says of their losses.
    """
    device = next(model.parameters()).device
    world = world or alone(device)
    for step in range(start_step, num_steps):
        factor = rate(step)
        set_rates(optimizer, factor)
        ids_BT = torch.from_numpy(batch(step)).to(device)
        losses = world.gather(_backward(model, loss or model.loss, ids_BT, micro_sequences))
        value = sum(losses) / world.size
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True)).item()
        diverged = not (math.isfinite(value) and math.isfinite(grad_norm)) or (
            step >= warmup_steps and value > loss_bound
        )
        if not diverged:
            optimizer.step()
        optimizer.zero_grad()
        yield {
            "step": step + 1,
            "tokens": ids_BT[:, 1:].numel() * world.size,
            "loss": value,
            "lr": peak_lr * factor,
            "grad_norm": grad_norm,
            "diverged": diverged,
            **(rank_fields(losses) if world.size > 1 else {}),
        }
        if diverged:
            return


def _backward(model: nn.Module, loss: Loss, ids_BT: torch.Tensor, micro_sequences: int) -> float:
    """Accumulate the gradient of the batch's mean loss; return that loss."""
    total, parts = torch.zeros((), dtype=torch.float64, device=ids_BT.device), ids_BT.split(micro_sequences)
    for number, part_BT in enumerate(parts, 1):
        reduce_last(model, number == len(parts))
        part = loss(part_BT[:, :-1], part_BT[:, 1:]) * (len(part_BT) / len(ids_BT))
        part.backward()
        total += part.detach()
    return total.item()  # the only wait for the device


@torch.no_grad()
def evaluate(model: Decoder, heldout: Heldout, loss: Loss | None = None, world: World | None = None) -> Record:
    """Held-out loss in nats per token and in bits per byte of the predicted tokens.

    Args:
        loss: computes the model's mean loss; None is `model.loss`.
        world: the processes that share the windows, each of which calls this; None is this one.
    """
    device = next(model.parameters()).device
    total, loss = 0.0, loss or model.loss
    world = world or alone(device)
    for start in range(0, len(heldout.windows), heldout.chunk * world.size):
        mine = start + heldout.chunk * world.rank
        ids_BT = torch.from_numpy(heldout.windows[mine : mine + heldout.chunk])
        counted = ids_BT[:, 1:].numel()
        if not counted:  # past the end, where the others still need this process's part of the model
            ids_BT = torch.from_numpy(heldout.windows[:1])
        ids_BT = ids_BT.to(device)
        total += loss(ids_BT[:, :-1], ids_BT[:, 1:]).item() * counted
    total = world.total(total)
    targets = heldout.windows[:, 1:]
    num_bytes = int(heldout.token_bytes[targets].sum())
    return {"heldout_loss": total / targets.size, "heldout_bits_per_byte": total / num_bytes / math.log(2)}
