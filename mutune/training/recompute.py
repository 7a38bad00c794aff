"""Activation checkpointing: what a block's backward pass computes again instead of keeping it."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts


def recomputed(kind: str) -> Mapping[str, Any] | None:
    """What `Decoder` takes: for `none` None, for `full` nothing that is kept, for `selective` what costs most to redo:
    products of matrices and attention. What is computed again is then norms, activations and sums.
    """
    if kind == "none":
        return None
    return {} if kind == "full" else {"context_fn": partial(create_selective_checkpoint_contexts, _kept())}


def _kept() -> list[Any]:
    aten = torch.ops.aten
    kept = [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    ]
    return [*kept, torch._higher_order_ops.flex_attention]
