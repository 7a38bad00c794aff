"""What a GPU makes of BTLM's sizes: products of matrices, attention, a block, the loss, each by itself.

    python benchmarks/gpu.py                                             # benchmarks/gpu.md

Medians of events, in bfloat16, of 8,192 tokens. A whole step is `benchmarks/train.py --device cuda`.
"""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mutune.model.alibi import AlibiColumns, AlibiScores, alibi_slopes, causal, causal_bias, flex
from mutune.model.decoder import Decoder
from mutune.model.losses import chunked
from mutune.model.shape import ModelConfig
from mutune.training.recompute import recomputed
from mutune.training.throughput import rates
from tests.soak import record

TOKENS, VOCAB, WARM_UP, TIMED = 8192, 50257, 3, 8
BTLM = ModelConfig(width=2560, depth=4, num_heads=32, ffn_width=6826)  # four of its blocks
SITES = {"embedding": 1.0, "attention_logits": 1 / 80, "residual.attn": 1.0, "residual.mlp": 1.0, "output": 0.1}
#: (what, seconds, FLOPs).
Row = tuple[str, float, float]


def timed(work: Callable[[], object]) -> float:
    """Median seconds on the GPU."""
    found = []
    for _ in range(WARM_UP + TIMED):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return median(found[WARM_UP:])


def random(*shape: int) -> Tensor:
    """Normal numbers that want a gradient."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)


def products() -> Iterator[Row]:
    """Sizes as they are, and what they are padded to."""
    for rows, inner, columns in (
        (8192, 8192, 8192),
        (TOKENS, 2560, 6826),
        (TOKENS, 2560, 6848),
        (TOKENS, 6826, 2560),
        (TOKENS, 6848, 2560),
        (TOKENS, 2560, VOCAB),
        (TOKENS, 2560, 50304),
    ):
        a, b = random(rows, inner).detach(), random(columns, inner).detach()
        seconds = timed(lambda a=a, b=b: F.linear(a, b))  # type: ignore[misc]
        yield f"product {rows:,} × {inner:,} × {columns:,}", seconds, 2.0 * rows * inner * columns


def attentions() -> Iterator[Row]:
    """Forward and backward; FLOPs of the causal half."""
    slopes_H = alibi_slopes(BTLM.heads)
    for time in (2048, 8192):
        shape, device = (TOKENS // time, BTLM.heads, time, 80), torch.device("cuda")
        flops = 3.5 * 4 * BTLM.heads * 80 * time * TOKENS / 2
        columns, scores = (
            AlibiColumns.make(slopes_H, time, device, torch.bfloat16),
            AlibiScores.make(slopes_H, time, device),
        )
        q, k, v, back = (random(*shape) for _ in range(4))
        ways: dict[str, Callable[[], Tensor]] = {
            "causal, ALiBi in columns": lambda: causal(q, k, v, columns),  # noqa: B023
            "FlexAttention": lambda: flex(q, k, v, scores),  # noqa: B023
        }
        if time == 2048:  # beyond, the bias takes gigabytes
            bias = causal_bias(slopes_H, time, device=device, dtype=torch.bfloat16)[None]
            ways["fused with a bias"] = lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # noqa: B023
        for name, forward in ways.items():
            seconds = timed(lambda f=forward, g=back: torch.autograd.grad(f(), (q, k, v), g))  # type: ignore[misc]  # noqa: B023
            yield f"attention, context {time:,}: {name}", seconds, flops


def blocks() -> Iterator[Row]:
    """One of four, forward and backward, attention counted in full."""
    for time, attention, recompute in (
        (2048, "causal", "none"),
        (2048, "flex", "none"),
        (2048, "causal", "selective"),
        (2048, "causal", "full"),
        (8192, "causal", "none"),
        (8192, "flex", "none"),
    ):
        with torch.device("cuda"):
            model = Decoder(BTLM, VOCAB, SITES, attention, recomputed(recompute))
        model.compile_parts()
        x_BTD = torch.randn(TOKENS // time, time, BTLM.width, device="cuda", requires_grad=True)
        bias = model._attention_bias(time, x_BTD.device, torch.bfloat16)

        def step(model: Decoder = model, x_BTD: Tensor = x_BTD, bias: Any = bias) -> None:
            hidden_BTD = x_BTD
            with torch.autocast("cuda", torch.bfloat16):
                for block in model.h:
                    hidden_BTD = block(hidden_BTD, bias)
            hidden_BTD.backward(torch.ones_like(hidden_BTD))

        flops = 3.0 * (2 * (4 * BTLM.width**2 + 3 * BTLM.width * BTLM.ffn) + 4 * BTLM.width * time) * TOKENS
        yield f"block, context {time:,}: {attention}, recomputed {recompute}", timed(step) / BTLM.depth, flops


def losses() -> Iterator[Row]:
    """Logits and loss with their gradients, by size of the chunk."""
    with torch.device("cuda"):
        model = Decoder(BTLM, VOCAB, SITES, "causal")
    x_ND = torch.randn(TOKENS, BTLM.width, device="cuda", requires_grad=True)
    targets_N, compiled = torch.randint(VOCAB, (TOKENS,), device="cuda"), torch.compile(model._loss_sum, dynamic=False)
    for name, function in (("compiled", compiled), ("not compiled", model._loss_sum)):
        for chunk in (1024, 4096, 8192):

            def step(function: Any = function, chunk: int = chunk) -> None:
                with torch.autocast("cuda", torch.bfloat16):
                    loss = chunked(function, x_ND, model.wte.weight, targets_N, chunk)
                loss.backward()

            yield f"loss in chunks of {chunk:,}, {name}", timed(step), 3.0 * 2 * TOKENS * BTLM.width * VOCAB


def main() -> None:
    """Time it, and write the table."""
    peak = rates("cuda", "bfloat16").peak_flops
    rows = [
        {
            "what": what,
            "ms": f"{1e3 * seconds:.2f}",
            "TFLOP/s": f"{flops / seconds / 1e12:.0f}",
            "of the data sheet": f"{flops / seconds / peak:.2f}" if peak else "",
        }
        for part in (products, attentions, blocks, losses)
        for what, seconds, flops in part()
    ]
    record(
        "gpu",
        f"BTLM's sizes on {torch.cuda.get_device_name()}, bfloat16, {TOKENS:,} tokens",
        rows,
        by="`python benchmarks/gpu.py`",
    )


if __name__ == "__main__":
    main()
