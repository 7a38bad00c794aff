"""A slow, obvious decoder in numpy float64, written from the published equations and from nothing else.

    h   = wte[ids] · embeddings_scale                     (learned positions: (wte + wpe) · scale)
    h   = h + attn(ln_1(h));  h = h + mlp(ln_2(h))        for each block
    out = wte · ln_f(h) · output_scale
    attn: S = q kᵀ · scale + causal mask - slope·|j - i|;  P = softmax(S);  c_proj(P v)
    mlp:  c_proj(c_fc(x) · silu(c_fc2(x)))                or c_proj(gelu(c_fc(x)))

Parameters are float64 arrays by name, matrices as (fan_out, fan_in).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Parameters = Mapping[str, Array]


def logits(
    p: Parameters, ids: list[int], *, depth: int, heads: int, alibi: bool, swiglu: bool, sites: Mapping[str, float]
) -> Array:
    """Logits (T, V) of one sequence."""
    h = [
        p["wte.weight"][token] if alibi else p["wte.weight"][token] + p["wpe.weight"][t] for t, token in enumerate(ids)
    ]
    h = [x * sites["embedding"] for x in h]
    slopes = _slopes(heads) if alibi else [0.0] * heads
    for block in range(depth):
        name = f"h.{block}"
        normed = [_layer_norm(p, f"{name}.ln_1", x) for x in h]
        branch = _attention(p, f"{name}.attn", normed, slopes, sites["attention_logits"])
        h = [x + sites["residual.attn"] * y for x, y in zip(h, branch, strict=True)]
        branch = [_feed_forward(p, f"{name}.mlp", _layer_norm(p, f"{name}.ln_2", x), swiglu) for x in h]
        h = [x + sites["residual.mlp"] * y for x, y in zip(h, branch, strict=True)]
    return np.stack([p["wte.weight"] @ _layer_norm(p, "ln_f", x) * sites["output"] for x in h])


def loss(logits_TV: Array, targets: list[int]) -> float:
    """Mean of -log softmax(logits)[target] in nats."""
    return float(np.mean([-math.log(_softmax(row)[target]) for row, target in zip(logits_TV, targets, strict=True)]))


def _attention(p: Parameters, name: str, x: list[Array], slopes: list[float], scale: float) -> list[Array]:
    width = len(x[0])
    size = width // len(slopes)
    mixed = [_linear(p, f"{name}.c_attn", row) for row in x]
    out = [np.zeros(width) for _ in x]
    for head, slope in enumerate(slopes):
        part = slice(head * size, (head + 1) * size)
        q = [row[:width][part] for row in mixed]
        k = [row[width : 2 * width][part] for row in mixed]
        v = [row[2 * width :][part] for row in mixed]
        for i in range(len(x)):
            scores = np.array([q[i] @ k[j] * scale - slope * abs(j - i) for j in range(i + 1)])
            weights = _softmax(scores)
            out[i][part] = sum(weights[j] * v[j] for j in range(i + 1))
    return [_linear(p, f"{name}.c_proj", row) for row in out]


def _feed_forward(p: Parameters, name: str, x: Array, swiglu: bool) -> Array:
    value = _linear(p, f"{name}.c_fc", x)
    if swiglu:
        gate = _linear(p, f"{name}.c_fc2", x)
        return _linear(p, f"{name}.c_proj", value * gate / (1 + np.exp(-gate)))
    gelu = np.array([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in value])
    return _linear(p, f"{name}.c_proj", gelu)


def _linear(p: Parameters, name: str, x: Array) -> Array:
    return p[f"{name}.weight"] @ x + p[f"{name}.bias"]


def _layer_norm(p: Parameters, name: str, x: Array) -> Array:
    centred = x - x.mean()
    return centred / math.sqrt((centred**2).mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max())
    return e / e.sum()


def _slopes(n: int) -> list[float]:
    """r^(i+1) with r = 2^(-(2^-(log2(n) - 3))) for powers of two, else those of c < n and every other one of 2c."""
    if n & (n - 1) == 0:
        r = 2.0 ** -(2.0 ** -(math.log2(n) - 3))
        return [r ** (i + 1) for i in range(n)]
    c = 1
    while 2 * c < n:
        c *= 2
    return _slopes(c) + _slopes(2 * c)[0::2][: n - c]
