"""The training loop: a generator of records. Logging, pruning and checkpoints belong to whoever iterates."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mutune.model.decoder import Decoder
from mutune.parametrization.apply import set_rates

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
) -> Iterator[Record]:
    """Train from `start_step` to `num_steps`, yielding one record after each update.

    Args:
        batch: global step → token ids (B, T+1).
        rate: step → rate / peak rate.
        loss: computes the model's mean loss; None is `model.loss`.
        peak_lr: the base peak rate; only reported, as `lr`.
        clip_norm: bound on the global gradient norm.
        micro_sequences: sequences per forward pass; the rest is gradient accumulation.
        loss_bound: nats per token. A loss above it after `warmup_steps`, or a loss or gradient norm that is not
            finite, ends the run with `diverged: True` in its last record, and without an update.

    Yields:
        `step` (updates done), `tokens` (in this batch), `loss` (nats per token, before the update), `lr`,
        `grad_norm` (before clipping), `diverged`.
    """
    device = next(model.parameters()).device
    for step in range(start_step, num_steps):
        factor = rate(step)
        set_rates(optimizer, factor)
        ids_BT = torch.from_numpy(batch(step)).to(device)
        value = _backward(loss or model.loss, ids_BT, micro_sequences)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm, foreach=True).item()
        diverged = not (math.isfinite(value) and math.isfinite(grad_norm)) or (
            step >= warmup_steps and value > loss_bound
        )
        if not diverged:
            optimizer.step()
        optimizer.zero_grad()
        yield {
            "step": step + 1,
            "tokens": ids_BT[:, 1:].numel(),
            "loss": value,
            "lr": peak_lr * factor,
            "grad_norm": grad_norm,
            "diverged": diverged,
        }
        if diverged:
            return


def _backward(loss: Loss, ids_BT: torch.Tensor, micro_sequences: int) -> float:
    """Accumulate the gradient of the batch's mean loss; return that loss."""
    total = 0.0
    for part_BT in ids_BT.split(micro_sequences):
        part = loss(part_BT[:, :-1], part_BT[:, 1:]) * (len(part_BT) / len(ids_BT))
        part.backward()
        total += part.item()
    return total


@torch.no_grad()
def evaluate(model: Decoder, heldout: Heldout, loss: Loss | None = None) -> Record:
    """Held-out loss in nats per token and in bits per byte of the predicted tokens.

    Args:
        loss: computes the model's mean loss; None is `model.loss`.
    """
    device = next(model.parameters()).device
    total, loss = 0.0, loss or model.loss
    for start in range(0, len(heldout.windows), heldout.chunk):
        ids_BT = torch.from_numpy(heldout.windows[start : start + heldout.chunk]).to(device)
        total += loss(ids_BT[:, :-1], ids_BT[:, 1:]).item() * ids_BT[:, 1:].numel()
    targets = heldout.windows[:, 1:]
    num_bytes = int(heldout.token_bytes[targets].sum())
    return {"heldout_loss": total / targets.size, "heldout_bits_per_byte": total / num_bytes / math.log(2)}
