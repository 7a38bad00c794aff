"""The BTLM decoder: ALiBi or learned positions, SwiGLU or GELU, LayerNorm, one table, tied or not.

Shape suffixes: B batch, T time, D width, H heads, K head size, F feed-forward width, V vocabulary.
Source of every line: the published model code as transcribed in its port (pre-LN blocks, biases on every linear but
the head, ALiBi added after scaling and before the softmax).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mutune.model.alibi import AlibiColumns, AlibiScores, alibi_slopes, causal, causal_bias, flex
from mutune.model.losses import chunk_size, chunked
from mutune.model.shape import ModelConfig
from mutune.parametrization.multiplier import Multiplier
from mutune.scaling.memory import logits_at_once

LAYER_NORM_EPS = 1e-5
SHAPES = 64  # of batches, in training and in evaluation, that blocks are compiled for at most
ALIGNED = 64  # what sizes of a GPU's products of matrices should be multiples of
LOW = ("sdpa", "causal")  # attentions whose bias is in the number format of their products
#: What attention adds to its logits: (H, T, T) or (1, T, T), with documents (B, H, T, T); or what makes it.
Bias = Tensor | AlibiColumns | AlibiScores


class Decoder(nn.Module):
    """A decoder-only language model with explicit forward multipliers.

    Args:
        shape: its shape.
        vocab_size: V, never padded.
        multipliers: site → value, as in a plan's `multipliers` table.
        attention: `sdpa`, torch's fused kernel; `explicit`, which is written out; or, without a bias of T²,
            `causal`, torch's causal kernels, which cannot tell documents apart, and on GPUs `flex`, FlexAttention.
        document_end: the token that ends a document, where attention is to stay within documents; None lets it see all
            that comes before, also of other documents.
        recompute: None, or how `torch.utils.checkpoint` does each block's forward pass again for its backward pass: the
            arguments that it takes by name.

    Parameters are left as torch creates them; `mutune.training.initialise` gives them the plan's values.
    """

    def __init__(
        self,
        shape: ModelConfig,
        vocab_size: int,
        multipliers: Mapping[str, float],
        attention: str = "sdpa",
        recompute: Mapping[str, Any] | None = None,
        document_end: int | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.document_end = shape, document_end
        self.embedding_multiplier = Multiplier("embedding", multipliers["embedding"])
        self.wte = nn.Embedding(vocab_size, shape.width)
        self.wpe = nn.Embedding(shape.max_positions, shape.width) if shape.positions == "learned" else None
        self.h = nn.ModuleList(Block(shape, multipliers, attention, recompute) for _ in range(shape.depth))
        self.ln_f = LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.output_multiplier = Multiplier("output", multipliers["output"])
        self.lm_head = None if shape.tied else nn.Linear(shape.width, vocab_size, bias=False)
        self._attention = attention
        self._bias_cache: dict[tuple[int, torch.device, torch.dtype], Bias] = {}
        self._sum_of_losses = self._loss_sum

    def compile_parts(self) -> None:
        """Compile the blocks, whose code is one for all of them, and the loss, each by themselves.

        For each shape of a batch anew: code for any shape is slower. Stages have more shapes than Dynamo takes alone
        before it gives up.
        """
        from torch._dynamo import config

        config.cache_size_limit = max(config.cache_size_limit, SHAPES)  # torch 2.6's name, which later ones know too
        for block in self.h:
            block.forward = torch.compile(block.forward, dynamic=False)  # not hooks, which are FSDP's
        self._sum_of_losses = torch.compile(self._loss_sum, dynamic=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token at each position.

        Raises:
            ValueError: a context longer than the learned position table.
        """
        return F.linear(self._hidden(ids_BT), self._output_weight)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, in float32 or wider.

        Where there would be more logits than exist at once (`logits_at_once`), they are made in chunks.
        """
        x_ND, targets_N = self._hidden(ids_BT).flatten(0, 1), targets_BT.flatten()
        chunk = chunk_size(len(targets_N), logits_at_once(x_ND.device.type) // len(self._output_weight))
        if len(targets_N) == chunk:
            return self._sum_of_losses(x_ND, self._output_weight, targets_N) / chunk
        return chunked(self._sum_of_losses, x_ND, self._output_weight, targets_N, chunk) / len(targets_N)

    def _loss_sum(self, x_ND: Tensor, table_VD: Tensor, targets_N: Tensor) -> Tensor:
        logits_NV = F.linear(x_ND, table_VD)
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        return F.cross_entropy(logits_NV.to(wide), targets_N, reduction="sum")

    @property
    def _output_weight(self) -> Tensor:
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def _hidden(self, ids_BT: Tensor) -> Tensor:
        """What the output table multiplies, (B, T, D)."""
        time = ids_BT.shape[1]
        x_BTD = self.wte(ids_BT)
        if self.wpe is not None:
            if time > self.shape.max_positions:
                raise ValueError(f"context {time} exceeds model.max_positions={self.shape.max_positions}")
            x_BTD = x_BTD + self.wpe.weight[:time]
        x_BTD = self.embedding_multiplier(x_BTD)
        low = self._attention in LOW and torch.is_autocast_enabled(x_BTD.device.type)  # else each block would cast it
        dtype = torch.get_autocast_dtype(x_BTD.device.type) if low else x_BTD.dtype
        if self.document_end is None:
            bias = self._attention_bias(time, x_BTD.device, dtype)
        else:
            ends_BT = ids_BT == self.document_end
            bias = self._bias_within(ends_BT.cumsum(1) - ends_BT.long(), dtype)  # the end belongs to what it ends
        for block in self.h:
            x_BTD = block(x_BTD, bias)
        hidden_BTD: Tensor = self.output_multiplier(self.ln_f(x_BTD))
        return hidden_BTD

    def _bias_within(self, document_BT: Tensor, dtype: torch.dtype) -> Bias:
        """The same, and what hides tokens of other documents."""
        time, device = document_BT.shape[1], document_BT.device
        if self._attention == "flex":
            return AlibiScores.make(self._slopes_H, time, device, document_BT)
        bias_HTT = self._attention_bias(time, device, dtype)
        assert isinstance(bias_HTT, Tensor), self._attention
        other_BTT = document_BT[:, :, None] != document_BT[:, None, :]
        return bias_HTT[None].masked_fill(other_BTT[:, None], -math.inf)

    @property
    def _slopes_H(self) -> list[float] | None:
        return alibi_slopes(self.shape.heads) if self.shape.positions == "alibi" else None

    def _attention_bias(self, time: int, device: torch.device, dtype: torch.dtype) -> Bias:
        """Causal mask plus ALiBi; kept for the last context length only."""
        key = (time, device, dtype)
        if key not in self._bias_cache:
            self._bias_cache.clear()
            if self._attention == "flex":
                self._bias_cache[key] = AlibiScores.make(self._slopes_H, time, device)
            elif self._attention == "causal":
                self._bias_cache[key] = AlibiColumns.make(self._slopes_H, time, device, dtype)
            else:
                self._bias_cache[key] = causal_bias(self._slopes_H or [0.0], time, device=device, dtype=dtype)
        return self._bias_cache[key]


class Block(nn.Module):
    """x + attn(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(
        self,
        shape: ModelConfig,
        multipliers: Mapping[str, float],
        attention: str,
        recompute: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.ln_1 = LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(shape, multipliers["attention_logits"], attention)
        self.ln_2 = LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(shape)
        self.attn_multiplier = Multiplier("residual.attn", multipliers["residual.attn"])
        self.mlp_multiplier = Multiplier("residual.mlp", multipliers["residual.mlp"])

    def forward(self, x_BTD: Tensor, bias: Bias) -> Tensor:
        """One residual block; (B, T, D) → (B, T, D)."""
        if self.recompute is None or not torch.is_grad_enabled():
            return self._residual(x_BTD, bias)
        again: Tensor = checkpoint(self._residual, x_BTD, bias, use_reentrant=False, **self.recompute)
        return again

    def _residual(self, x_BTD: Tensor, bias: Bias) -> Tensor:
        x_BTD = x_BTD + self.attn_multiplier(self.attn(self.ln_1(x_BTD), bias))
        return x_BTD + self.mlp_multiplier(self.mlp(self.ln_2(x_BTD)))


class Attention(nn.Module):
    """softmax((multiplier · q) kᵀ + bias) v, with one fused projection Q‖K‖V."""

    def __init__(self, shape: ModelConfig, logit_multiplier: float, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.heads = shape.heads
        self.logit_multiplier = Multiplier("attention_logits", logit_multiplier)
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BTD: Tensor, bias: Bias) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x_BTD).chunk(3, dim=-1)
        )
        q_BHTK = self.logit_multiplier(q_BHTK)
        if isinstance(bias, AlibiColumns):
            out_BHTK = causal(q_BHTK, k_BHTK, v_BHTK, bias)
        elif isinstance(bias, AlibiScores):
            out_BHTK = flex(q_BHTK, k_BHTK, v_BHTK, bias)
        elif self.attention == "sdpa":
            bias = bias[None] if bias.dim() == 3 else bias  # with three, torch's CPU kernel falls back to a slower path
            out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=bias, scale=1.0)
        else:
            out_BHTK = (q_BHTK @ k_BHTK.transpose(-2, -1) + bias).softmax(-1) @ v_BHTK
        return self.c_proj(out_BHTK.transpose(1, 2).flatten(-2))


class LayerNorm(nn.LayerNorm):
    """Computed in its input's number format, also where FSDP2 gathers its gain and bias in another."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        gain_D, bias_D = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, gain_D, bias_D, self.eps)


class FeedForward(nn.Module):
    """SwiGLU: c_proj(c_fc(x) · silu(c_fc2(x))), c_fc2 being the gate; or c_proj(gelu(c_fc(x)))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.width, shape.ffn)
        self.c_fc2 = nn.Linear(shape.width, shape.ffn) if shape.activation == "swiglu" else None
        self.c_proj = nn.Linear(shape.ffn, shape.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        if x_BTD.is_cuda and torch.compiler.is_compiling():
            return self.padded(x_BTD)
        value_BTF = self.c_fc(x_BTD)
        if self.c_fc2 is None:
            return self.c_proj(F.gelu(value_BTF))
        return self.c_proj(value_BTF * F.silu(self.c_fc2(x_BTD)))

    def padded(self, x_BTD: Tensor) -> Tensor:
        """The same with F made a multiple of `ALIGNED` by weights that are 0: a GPU's products of matrices of other
        sizes take several times as long (benchmarks/gpu.md). Around hooks, which compiled code has none of.
        """
        rest = -self.c_fc.out_features % ALIGNED
        value_BTF = _linear(x_BTD, self.c_fc, rows=rest)
        if self.c_fc2 is None:
            return _linear(F.gelu(value_BTF), self.c_proj, columns=rest)
        return _linear(value_BTF * F.silu(_linear(x_BTD, self.c_fc2, rows=rest)), self.c_proj, columns=rest)


def _linear(x: Tensor, layer: nn.Linear, rows: int = 0, columns: int = 0) -> Tensor:
    """The layer with so many more outputs and inputs of weight 0."""
    return F.linear(x, F.pad(layer.weight, (0, columns, 0, rows)), F.pad(layer.bias, (0, rows)))
