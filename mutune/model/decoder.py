"""The BTLM decoder: ALiBi or learned positions, SwiGLU or GELU, LayerNorm, one table, tied or not.

Shape suffixes: B batch, T time, D width, H heads, K head size, F feed-forward width, V vocabulary.
Source of every line: the published model code as transcribed in its port (pre-LN blocks, biases on every linear but
the head, ALiBi added after scaling and before the softmax).
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutune.model.shape import ModelConfig
from mutune.parametrization.multiplier import Multiplier

LAYER_NORM_EPS = 1e-5


class Decoder(nn.Module):
    """A decoder-only language model with explicit forward multipliers.

    Args:
        shape: its shape.
        vocab_size: V, never padded.
        multipliers: site → value, as in a plan's `multipliers` table.
        attention: `sdpa`, torch's fused kernel, or `explicit`, which is written out.

    Parameters are left as torch creates them; `mutune.training.initialise` gives them the plan's values.
    """

    def __init__(
        self, shape: ModelConfig, vocab_size: int, multipliers: Mapping[str, float], attention: str = "sdpa"
    ) -> None:
        super().__init__()
        self.shape = shape
        self.embedding_multiplier = Multiplier("embedding", multipliers["embedding"])
        self.wte = nn.Embedding(vocab_size, shape.width)
        self.wpe = nn.Embedding(shape.max_positions, shape.width) if shape.positions == "learned" else None
        self.h = nn.ModuleList(Block(shape, multipliers, attention) for _ in range(shape.depth))
        self.ln_f = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.output_multiplier = Multiplier("output", multipliers["output"])
        self.lm_head = None if shape.tied else nn.Linear(shape.width, vocab_size, bias=False)
        self._bias_cache: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits (B, T, V) of the next token at each position.

        Raises:
            ValueError: a context longer than the learned position table.
        """
        time = ids_BT.shape[1]
        x_BTD = self.wte(ids_BT)
        if self.wpe is not None:
            if time > self.shape.max_positions:
                raise ValueError(f"context {time} exceeds model.max_positions={self.shape.max_positions}")
            x_BTD = x_BTD + self.wpe.weight[:time]
        x_BTD = self.embedding_multiplier(x_BTD)
        bias_HTT = self._attention_bias(time, x_BTD.device, x_BTD.dtype)
        for block in self.h:
            x_BTD = block(x_BTD, bias_HTT)
        output = self.wte if self.lm_head is None else self.lm_head
        return F.linear(self.output_multiplier(self.ln_f(x_BTD)), output.weight)

    def loss(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean cross-entropy in nats per token, in float32 or wider."""
        logits_BTV = self(ids_BT)
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        return F.cross_entropy(logits_BTV.flatten(0, 1).to(wide), targets_BT.flatten())

    def _attention_bias(self, time: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Causal mask plus ALiBi, (H, T, T) or (1, T, T); kept for the last context length only."""
        key = (time, device, dtype)
        if key not in self._bias_cache:
            self._bias_cache.clear()
            slopes_H = alibi_slopes(self.shape.heads) if self.shape.positions == "alibi" else [0.0]
            self._bias_cache[key] = causal_bias(slopes_H, time, device=device, dtype=dtype)
        return self._bias_cache[key]


class Block(nn.Module):
    """x + attn(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, shape: ModelConfig, multipliers: Mapping[str, float], attention: str) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(shape, multipliers["attention_logits"], attention)
        self.ln_2 = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.mlp = FeedForward(shape)
        self.attn_multiplier = Multiplier("residual.attn", multipliers["residual.attn"])
        self.mlp_multiplier = Multiplier("residual.mlp", multipliers["residual.mlp"])

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor) -> Tensor:
        """One residual block; (B, T, D) → (B, T, D)."""
        x_BTD = x_BTD + self.attn_multiplier(self.attn(self.ln_1(x_BTD), bias_HTT))
        return x_BTD + self.mlp_multiplier(self.mlp(self.ln_2(x_BTD)))


class Attention(nn.Module):
    """softmax((multiplier · q) kᵀ + bias) v, with one fused projection Q‖K‖V."""

    def __init__(self, shape: ModelConfig, logit_multiplier: float, attention: str) -> None:
        super().__init__()
        self.fused = attention == "sdpa"
        self.heads = shape.heads
        self.logit_multiplier = Multiplier("attention_logits", logit_multiplier)
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)

    def forward(self, x_BTD: Tensor, bias_HTT: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q_BHTK, k_BHTK, v_BHTK = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x_BTD).chunk(3, dim=-1)
        )
        q_BHTK = self.logit_multiplier(q_BHTK)
        if self.fused:
            bias_1HTT = bias_HTT[None]  # four dimensions: with three, torch's CPU kernel falls back to a slower path
            out_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, attn_mask=bias_1HTT, scale=1.0)
        else:
            out_BHTK = (q_BHTK @ k_BHTK.transpose(-2, -1) + bias_HTT).softmax(-1) @ v_BHTK
        return self.c_proj(out_BHTK.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU: c_proj(c_fc(x) · silu(c_fc2(x))), c_fc2 being the gate; or c_proj(gelu(c_fc(x)))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.width, shape.ffn)
        self.c_fc2 = nn.Linear(shape.width, shape.ffn) if shape.activation == "swiglu" else None
        self.c_proj = nn.Linear(shape.ffn, shape.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        value_BTF = self.c_fc(x_BTD)
        if self.c_fc2 is None:
            return self.c_proj(F.gelu(value_BTF))
        return self.c_proj(value_BTF * F.silu(self.c_fc2(x_BTD)))


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi's slopes (arXiv:2108.12409), not learned: 2^(-8(i+1)/H) for a power of two, else interleaved."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    return slopes if power == heads else slopes + alibi_slopes(2 * power)[0::2][: heads - power]


def causal_bias(slopes_H: list[float], time: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H, T, T) with -slope[h]·(i - j) for j <= i and -inf above the diagonal; i is the query."""
    wide = torch.promote_types(dtype, torch.float32)  # bfloat16 counts exactly to 256 only, then hides the wrong tokens
    position = torch.arange(time, device=device)
    distance_TT = position[:, None] - position[None, :]
    bias_HTT = -torch.tensor(slopes_H, device=device, dtype=wide)[:, None, None] * distance_TT
    return bias_HTT.masked_fill(distance_TT < 0, -math.inf).to(dtype)
