"""The `mup` package as an independent implementation: its optimizer, its shared readout, its base shapes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mup
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.plan import Plan
from tests.training.tiny import VOCAB


class SharedReadoutDecoder(Decoder):
    """The tied decoder with its embedding unmultiplied and `mup.MuSharedReadout` as its output."""

    def __init__(self, shape: ModelConfig, vocab_size: int, multipliers: dict[str, float]) -> None:
        super().__init__(shape, vocab_size, {**multipliers, "embedding": 1.0, "output": 1.0})
        self.readout = mup.MuSharedReadout(self.wte.weight, bias=False, output_mult=multipliers["output"])

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V)."""
        x_BTD = self.wte(ids_BT)
        bias_HTT = self._attention_bias(ids_BT.shape[1], x_BTD.device, x_BTD.dtype)
        for block in self.h:
            x_BTD = block(x_BTD, bias_HTT)
        logits_BTV: Tensor = self.readout(self.ln_f(x_BTD))
        return logits_BTV

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy of those logits."""
        return cross_entropy(self(ids_BT).flatten(0, 1), targets_BT.flatten())


def set_base_shapes(model: Decoder, base: ModelConfig) -> None:
    """Give every parameter mup's infshape, relative to `base`."""
    sites = dict.fromkeys(("embedding", "attention_logits", "residual.attn", "residual.mlp", "output"), 1.0)
    delta = replace(base, width=2 * base.width, ffn_width=2 * base.ffn)
    with torch.device("meta"):
        shapes: list[nn.Module] = [type(model)(shape, VOCAB, sites) for shape in (base, delta)]
    mup.set_base_shapes(model, shapes[0], rescale_params=False, delta=shapes[1])


def mup_optimizer(
    model: Decoder, base: ModelConfig, values: Callable[[str], dict[str, float]]
) -> torch.optim.Optimizer:
    """`mup.MuAdamW` over one group per parameter.

    Args:
        values: parameter name → `lr`, `weight_decay` and `eps`, before mup's own width rule (which knows no ε).
    """
    set_base_shapes(model, base)
    groups: list[dict[str, Any]] = [
        {"params": [parameter], **values(name)} for name, parameter in model.named_parameters()
    ]
    optimizer: torch.optim.Optimizer = mup.MuAdamW(groups, betas=(0.9, 0.95), fused=True)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def unscaled(plan: Plan, learning_rate: float, weight_decay: float) -> Callable[[str], dict[str, float]]:
    """The base's rate and decay (none on biases and gains) and the plan's ε, as `values` of `mup_optimizer`."""

    def values(name: str) -> dict[str, float]:
        row = plan.parameters[name]
        decay = 0.0 if row.role in ("gain", "bias") else weight_decay
        return {"lr": learning_rate, "weight_decay": decay, "eps": row.adam_eps}

    return values
