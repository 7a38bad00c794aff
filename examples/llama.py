"""A Llama-form decoder (arXiv:2302.13971, 2307.09288) as a user would write it: the worked example of `parametrize`.

RMSNorm, rotary positions, grouped-query attention with a fixed number of key/value heads, SwiGLU. μP asks for five
multipliers in the forward pass and nothing else:

    import mutune
    from examples.llama import LlamaShape, build

    result = mutune.parametrize(
        build, base=LlamaShape(64), delta=LlamaShape(128), target=LlamaShape(512), head_size=16, table="mup",
        roles={"*.wo.weight": "residual_output", "*.w2.weight": "residual_output"},
    )
    model = result.build(seed=0)
    optimizer = result.optimizer(model)

Shape suffixes: B batch, T time, D width, H query heads, G key/value heads, K head size, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutune import Family, Multiplier


@dataclass(frozen=True)
class LlamaShape:
    """Sizes and switches; heads grow with width at a fixed head size, key/value heads do not grow."""

    width: int
    depth: int = 2
    head_size: int = 16
    kv_heads: int = 1
    vocab_size: int = 31
    tied: bool = False

    @property
    def ffn(self) -> int:
        """8/3 of the width, rounded up to a multiple of 8."""
        return -(-8 * self.width // 24) * 8


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.head_size = shape.head_size
        self.wq = nn.Linear(shape.width, shape.width, bias=False)
        self.wk = nn.Linear(shape.width, shape.kv_heads * shape.head_size, bias=False)
        self.wv = nn.Linear(shape.width, shape.kv_heads * shape.head_size, bias=False)
        self.wo = nn.Linear(shape.width, shape.width, bias=False)
        self.logits = Multiplier("attention_logits")

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        q_BHTK, k_BGTK, v_BGTK = (
            w(x_BTD).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for w in (self.wq, self.wk, self.wv)
        )
        q_BHTK, k_BGTK = rotate(q_BHTK), rotate(k_BGTK)
        groups = q_BHTK.shape[1] // k_BGTK.shape[1]
        k_BHTK, v_BHTK = (part.repeat_interleave(groups, dim=1) for part in (k_BGTK, v_BGTK))
        out_BHTK = F.scaled_dot_product_attention(self.logits(q_BHTK), k_BHTK, v_BHTK, is_causal=True, scale=1.0)
        return self.wo(out_BHTK.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """w2(silu(w1 x) · w3 x)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.ffn, bias=False)
        self.w3 = nn.Linear(shape.width, shape.ffn, bias=False)
        self.w2 = nn.Linear(shape.ffn, shape.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        return self.w2(F.silu(self.w1(x_BTD)) * self.w3(x_BTD))


class Block(nn.Module):
    """x + attn(norm x), then x + mlp(norm x)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.attn_norm, self.attn = nn.RMSNorm(shape.width), Attention(shape)
        self.mlp_norm, self.mlp = nn.RMSNorm(shape.width), FeedForward(shape)
        self.attn_branch, self.mlp_branch = Multiplier("residual.attn"), Multiplier("residual.mlp")

    def forward(self, x_BTD: Tensor) -> Tensor:
        """(B, T, D) → (B, T, D)."""
        x_BTD = x_BTD + self.attn_branch(self.attn(self.attn_norm(x_BTD)))
        return x_BTD + self.mlp_branch(self.mlp(self.mlp_norm(x_BTD)))


class Llama(nn.Module):
    """Token ids (B, T) → logits (B, T, V)."""

    def __init__(self, shape: LlamaShape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab_size, shape.width)
        self.scale_embedding = Multiplier("embedding")
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width)
        self.scale_output = Multiplier("output")
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        if shape.tied:
            self.head.weight = self.embed.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        x_BTD = self.scale_embedding(self.embed(ids_BT))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.scale_output(self.norm(x_BTD)))


def rotate(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary positions (arXiv:2104.09864) on (..., T, K), halves paired; no buffer, so `to_empty` has none to lose."""
    time, size = x.shape[-2:]
    rate_K2 = theta ** (-torch.arange(0, size, 2, device=x.device, dtype=torch.float32) / size)
    angle_TK2 = torch.arange(time, device=x.device, dtype=torch.float32)[:, None] * rate_K2
    cos, sin = angle_TK2.cos().to(x.dtype), angle_TK2.sin().to(x.dtype)
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos - two * sin, two * cos + one * sin), dim=-1)


def build(shape: LlamaShape) -> Llama:
    """The model at a shape."""
    return Llama(shape)


def at_depth(depth: int) -> LlamaShape:
    """A shape of `deep`."""
    return LlamaShape(64, depth=depth, vocab_size=1024, kv_heads=2)


#: The family over depth, for `python -m mutune.check family=examples.llama:deep shapes=examples.llama:at_depth
#: parametrization=completep 'widths=[]' 'depths=[2,4,8,16]'`.
deep = Family(build, base=at_depth(2), delta=replace(at_depth(2), width=128, kv_heads=4), head_size=16)

#: The family over whole numbers that `python -m mutune.check family=examples.llama:family` checks: 1,024 tokens, and
#: two query heads to each key/value head. With one key/value head at every width the check fails: what the attention
#: branch adds grows with the number of heads that share it (docs/log.md).
family = Family(
    lambda width: build(LlamaShape(width, vocab_size=1024, kv_heads=width // 32)),
    base=32,
    delta=64,
    head_size=16,
    roles={"*.wo.weight": "residual_output", "*.w2.weight": "residual_output"},
)
