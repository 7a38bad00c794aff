"""ALiBi (arXiv:2108.12409): slopes, and what they add to attention's logits: a tensor, columns of queries and keys that
make it in the product, or FlexAttention's rule.

Shape suffixes: B batch, T time, H heads, K head size, C columns.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mutune.scaling.memory import COLUMNS, DIGIT

if TYPE_CHECKING:  # it loads torch's compiler
    from torch.nn.attention.flex_attention import BlockMask

#: FlexAttention's score modification: (score, batch, head, query, key) → score.
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


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


KERNEL_SIZE = 8  # head sizes of the fused kernels are multiples of it
FASTEST = (
    "CUDNN_ATTENTION",
    "FLASH_ATTENTION",
    "EFFICIENT_ATTENTION",
    "MATH",
)  # in this order (benchmarks/gpu.md)


@dataclass(frozen=True, eq=False)
class AlibiColumns:
    """The same bias, but for what a query's logits have in common, which softmax drops: slope[h]·j, j being the key.

    It is a product, so that queries and keys that are longer by some columns make it, and a kernel that knows nothing
    of biases or masks but the causal one will do. In bfloat16, numbers are split such that their products are exact:
    slopes in three, positions in digits.

    Attributes:
        queries_HC: slopes.
        keys_TC: positions.
    """

    queries_HC: Tensor
    keys_TC: Tensor

    @staticmethod
    def make(slopes_H: list[float] | None, time: int, device: torch.device, dtype: torch.dtype) -> "AlibiColumns":
        """For sequences of `time` tokens; no column at all for a model without ALiBi."""
        if slopes_H is None:
            return AlibiColumns(*(torch.empty(1, 0, device=device, dtype=dtype) for _ in "qk"))
        position_T, rest_H = torch.arange(time, device=device), torch.tensor(slopes_H, dtype=torch.float64)
        if dtype is torch.bfloat16:
            units = [DIGIT**power for power in range(4) if power == 0 or DIGIT**power < time]
            digits_T = [position_T // unit % DIGIT * unit for unit in units]
        else:
            digits_T = [position_T]
        parts_H: list[Tensor] = []
        for _ in range(COLUMNS if dtype is torch.bfloat16 else 1):
            parts_H.append(rest_H.to(dtype))
            rest_H = rest_H - parts_H[-1].double()
        queries_HC = torch.stack([part for _ in digits_T for part in parts_H], dim=1).to(device)
        keys_TC = torch.stack([digit.to(dtype) for digit in digits_T for _ in parts_H], dim=1)
        return AlibiColumns(queries_HC, keys_TC)


def causal(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, bias: AlibiColumns) -> Tensor:
    """softmax(q kᵀ + bias) v by torch's causal kernels, which read no bias."""
    size, columns = q_BHTK.shape[-1], bias.queries_HC.shape[1]
    if columns:
        rest = -(size + columns) % KERNEL_SIZE
        q_BHTK = _longer(q_BHTK, F.pad(bias.queries_HC, (0, rest))[None])
        k_BHTK = _longer(k_BHTK, F.pad(bias.keys_TC, (0, rest))[:, None])
        v_BHTK = _longer(v_BHTK, v_BHTK.new_zeros(1, 1, columns + rest))
    with _fastest(q_BHTK.device):
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=1.0)[..., :size]


def _longer(x_BHTK: Tensor, columns_THC: Tensor) -> Tensor:
    """With columns that are broadcast over the batch, in memory as its heads lie, token by token."""
    x_BTHK = x_BHTK.transpose(1, 2)
    return torch.cat([x_BTHK, columns_THC.expand(*x_BTHK.shape[:3], -1)], dim=-1).transpose(1, 2)


def _fastest(device: torch.device) -> AbstractContextManager[None]:
    """In which torch prefers the kernel that is fastest on GPUs."""
    if device.type != "cuda":
        return nullcontext()
    preferring: Callable[..., AbstractContextManager[None]] = sdpa_kernel
    return preferring([getattr(SDPBackend, name) for name in FASTEST], set_priority=True)


@dataclass(frozen=True, eq=False)
class AlibiScores:
    """The same bias as `causal_bias`, by rule: FlexAttention computes it where it needs it, and skips what is masked.

    Attributes:
        slopes_H: float32; None for a model without ALiBi.
        mask: causal, and where documents are told apart within them.
    """

    slopes_H: Tensor | None
    mask: "BlockMask"

    @staticmethod
    def make(
        slopes_H: list[float] | None, time: int, device: torch.device, document_BT: Tensor | None = None
    ) -> "AlibiScores":
        """For sequences of `time` tokens, or for these, whose tokens see their own document alone."""
        from torch.nn.attention.flex_attention import create_block_mask

        visible = _is_past if document_BT is None else _is_past_within(document_BT)
        sequences = None if document_BT is None else len(document_BT)
        mask = create_block_mask(visible, B=sequences, H=None, Q_LEN=time, KV_LEN=time, device=str(device))
        return AlibiScores(None if slopes_H is None else torch.tensor(slopes_H, device=device), mask)

    @property
    def score(self) -> Score | None:
        """FlexAttention's score modification."""
        slopes_H = self.slopes_H
        if slopes_H is None:
            return None

        def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return score - slopes_H[head] * (query - key)

        return biased


def flex(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, bias: AlibiScores) -> Tensor:
    """softmax(q kᵀ + bias) v by FlexAttention, compiled on GPUs; torch has no backward pass of it on CPUs."""
    from torch.nn.attention.flex_attention import flex_attention

    by_itself = q_BHTK.is_cuda and not torch.compiler.is_compiling()  # else the block that it is in is compiled
    kernel: Any = _compiled() if by_itself else flex_attention
    out_BHTK: Tensor = kernel(q_BHTK, k_BHTK, v_BHTK, score_mod=bias.score, block_mask=bias.mask, scale=1.0)
    return out_BHTK


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Any] = torch.compile(flex_attention)
    return compiled


def _is_past(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _is_past_within(document_BT: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_BT[batch, query] == document_BT[batch, key])

    return visible
