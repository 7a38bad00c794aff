"""Ten faults that arrive in the middle of a small real run, and who must name each, by what name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mutune.data.segments import MAIN
from mutune.training import loop
from mutune.training.guard import rank_fields
from mutune.training.loop import Record
from mutune.training.moments import attentions
from mutune.training.run import Run

RANKS = 2


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        inject: does it to a live run.
        by: `guard` or `auditor`.
        name: the alarm's name, or what the auditor compared.
        where: part of what the alarm is about.
        rules: of `guard.RULES`; without them the fault must go unnamed.
        audited: whether the auditor looks too; where it does not, the guard alone must name it.
        fields: adds to each record what the loop of such a run would.
    """

    inject: Callable[[Run, pytest.MonkeyPatch], None]
    by: str
    name: str
    where: str = ""
    rules: tuple[str, ...] = ()
    audited: bool = True
    fields: Callable[[Run, Record], dict[str, Any]] = lambda run, record: {}


def spike_batch(run: Run, patch: pytest.MonkeyPatch) -> None:
    """The batch of the fourth step is random tokens."""
    compute, calls = run.model.loss, [0]

    def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        calls[0] += 1
        if calls[0] in range(3 * RANKS + 1, 4 * RANKS + 1):
            drawn = np.random.default_rng(calls[0]).integers(run.corpus.vocab_size, size=targets_BT.shape)
            targets_BT = torch.from_numpy(drawn)
        return compute(ids_BT, targets_BT)

    patch.setattr(run.model, "loss", loss)


def rate_times_8(run: Run, patch: pytest.MonkeyPatch) -> None:
    for group in run.optimizer.param_groups:
        group["peak_lr"] *= 8


@torch.no_grad()
def layer_made_anew(run: Run, patch: pytest.MonkeyPatch) -> None:
    """A block's matrices drawn again, as the plan draws them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in run.model.named_parameters():
        row = run.plan.parameters[name]
        if name.startswith("h.1.mlp") and row.init_std:
            parameter.normal_(0.0, row.init_std, generator=generator)


def nan_in_one_rank(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Ranks are simulated: each has its part of the batch, and one computes NaN from the third step on."""
    compute, calls = run.model.loss, [0]

    def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        calls[0] += 1
        value = compute(ids_BT, targets_BT)
        broken = calls[0] > 2 * RANKS and calls[0] % RANKS == 0
        run.rank_losses = [*getattr(run, "rank_losses", []), value.item() * (float("nan") if broken else 1.0)]  # type: ignore[attr-defined]
        return value * (float("nan") if broken else 1.0)

    patch.setattr(run.model, "loss", loss)


def ranks_of(run: Run, record: Record) -> dict[str, Any]:
    """What the loop of a distributed run would add."""
    return rank_fields(run.rank_losses[-RANKS:])  # type: ignore[attr-defined]


def frozen_head(run: Run, patch: pytest.MonkeyPatch) -> None:
    """No gradient reaches the second head of the first block."""
    attention = attentions(run.model)["h.0.attn"]

    def without(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient.view(3, attention.heads, -1, *gradient.shape[1:])[:, 1] = 0.0
        return gradient

    attention.c_attn.weight.register_hook(without)
    attention.c_attn.bias.register_hook(without)


def swapped_file(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Another tokenizer's ids: the same text, each id another one."""
    other = np.random.default_rng(0).permutation(run.corpus.vocab_size).astype(np.uint16)
    run.loader.corpora[MAIN] = other[run.loader.corpora[MAIN]]


def absolute_rates(run: Run, patch: pytest.MonkeyPatch) -> None:
    """A scheduler that gives every group one rate."""

    def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * factor

    patch.setattr(loop, "set_rates", set_rates)


def clipping_off(run: Run, patch: pytest.MonkeyPatch) -> None:
    """The norm is measured, and the gradient left as it is."""

    def measured(parameters: Any, max_norm: float, **keywords: Any) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    patch.setattr(torch.nn.utils, "clip_grad_norm_", measured)


def eps_times_a_million(run: Run, patch: pytest.MonkeyPatch) -> None:
    for group in run.optimizer.param_groups:
        group["eps"] *= 1e6


def computed_in_bfloat16(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Autocast, switched on by somebody else."""
    compute = run.model.loss

    def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compute(ids_BT, targets_BT)

    patch.setattr(run.model, "loss", loss)


def kept_in_bfloat16(run: Run, patch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer converted, as a checkpoint loaded into a bfloat16 model would leave them."""
    run.model.bfloat16()
    for state in run.optimizer.state.values():
        state |= {key: state[key].bfloat16() for key in ("exp_avg", "exp_avg_sq")}


FAULTS = {
    "spike batch": Fault(spike_batch, "guard", "loss_spike", rules=("loss",)),
    "rate × 8": Fault(rate_times_8, "auditor", "peak_lr"),
    "rate × 8, unaudited": Fault(rate_times_8, "guard", "update_ratio", "hidden", ("update_ratio",), audited=False),
    "re-initialised layer": Fault(layer_made_anew, "guard", "rewritten", "h.1.mlp", rules=("rewritten",)),
    "NaN in one rank": Fault(nan_in_one_rank, "guard", "not_finite", "rank 1", ("not_finite",), fields=ranks_of),
    "frozen head": Fault(frozen_head, "guard", "frozen", "h.0.attn head 1", rules=("frozen",)),
    "swapped data file": Fault(swapped_file, "guard", "data_changed", rules=("data",)),
    "swapped data, by its loss": Fault(swapped_file, "guard", "loss_level", rules=("loss",)),
    "scheduler that sets absolute rates": Fault(absolute_rates, "auditor", "learning rate"),
    "clipping off": Fault(clipping_off, "guard", "gradient_seen", rules=("gradient_seen",)),
    "eps × 1e6": Fault(eps_times_a_million, "auditor", "Adam's eps"),
    "silent dtype: products": Fault(computed_in_bfloat16, "guard", "dtype", rules=("dtype",)),
    "silent dtype: weights": Fault(kept_in_bfloat16, "guard", "dtype", rules=("dtype",)),
}
