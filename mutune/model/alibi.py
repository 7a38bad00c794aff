"""ALiBi (arXiv:2108.12409): slopes, and what they add to attention's logits, as a tensor or as FlexAttention's rule.

Shape suffixes: B batch, T time, H heads, K head size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # it loads torch's compiler
    from torch.nn.attention.flex_attention import BlockMask


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


@dataclass(frozen=True, eq=False)
class AlibiScores:
    """The same bias as `causal_bias`, by rule: FlexAttention computes it where it needs it, and skips what is masked.

    Attributes:
        slopes_H: float32; zeros for a model without ALiBi.
        mask: causal, and where documents are told apart within them.
    """

    slopes_H: Tensor
    mask: "BlockMask"

    @staticmethod
    def make(
        slopes_H: list[float], time: int, device: torch.device, document_BT: Tensor | None = None
    ) -> "AlibiScores":
        """For sequences of `time` tokens, or for these, whose tokens see their own document alone."""
        from torch.nn.attention.flex_attention import create_block_mask

        visible = _is_past if document_BT is None else _is_past_within(document_BT)
        sequences = None if document_BT is None else len(document_BT)
        mask = create_block_mask(visible, B=sequences, H=None, Q_LEN=time, KV_LEN=time, device=str(device))
        return AlibiScores(torch.tensor(slopes_H, device=device), mask)

    def score(self, score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """FlexAttention's score modification."""
        return score - self.slopes_H[head % len(self.slopes_H)] * (query - key)


def flex(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, bias: AlibiScores) -> Tensor:
    """softmax(q kᵀ + bias) v by FlexAttention, compiled on GPUs; torch has no backward pass of it on CPUs."""
    out_BHTK: Tensor = _kernel(q_BHTK.device.type)(
        q_BHTK, k_BHTK, v_BHTK, score_mod=bias.score, block_mask=bias.mask, scale=1.0
    )
    return out_BHTK


@cache
def _kernel(device: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cuda":
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return compiled
    return flex_attention


def _is_past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _is_past_within(document_BT: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[batch, query] == document_BT[batch, key])

    return visible
