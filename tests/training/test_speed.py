"""How fast a step is, beside other people's models of the same size. Ratios of one run, never a test of seconds."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.training.execution import threaded
from mutune.training.price import price
from mutune.training.run import Run
from tests.doors import ROOT
from tests.soak import record

DEPTH, CONTEXT, HEAD = 4, 128, 16
SEQUENCES = {64: 8, 128: 8, 256: 4}
ROUNDS, STEPS = 5, 8
SLOW = 0.4  # seconds of a step that is timed once a round
Step = Callable[[], float]  # makes one and returns its loss


def ours(width: int, **loop: Any) -> Step:
    config = compose(
        "sweep",
        SweepConfig,
        [
            *("+sweep=proxy", f"model.width={width}", f"run.batch_sequences={SEQUENCES[width]}"),
            *("run.num_steps=100000", "hyperparameters.learning_rate=0.01", "schedule.warmup_fraction=0"),
            *(f"loop.{key}={str(value).lower()}" for key, value in loop.items()),
        ],
    )
    steps = Run(config.spec(), torch.device("cpu")).steps()
    return lambda: float(next(steps)["loss"])


def theirs(kind: str, width: int, vocab_size: int, *, compiled: bool = False, low: bool = False) -> Step:
    """A step of a Hugging Face model as its users write it: the loss of `labels`, clipping, torch's AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    heads = width // HEAD
    model: Any
    if kind == "GPT-2":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=vocab_size, n_positions=CONTEXT, n_embd=width, n_layer=DEPTH, n_head=heads)
        )
    else:
        ffn = 8 * width // 3
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=ffn,
                num_hidden_layers=DEPTH,
                num_attention_heads=heads,
                max_position_embeddings=CONTEXT,
                tie_word_embeddings=True,
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model) if compiled else model
    starts = torch.randint(vocab_size, (64, SEQUENCES[width], 1), generator=torch.Generator().manual_seed(0))
    ids = (starts + torch.arange(CONTEXT)) % vocab_size  # something to learn
    count = iter(range(10**9))

    def step() -> float:
        batch = ids[next(count) % len(ids)]
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return step


def timed(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Milliseconds of CPU time per step of each round, all of them turn by turn."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    counts, first = {}, {}
    with threaded(1):
        for name, step in steps.items():
            first[name] = step()
            for _ in range(3):
                started = time.process_time()
                step()
            counts[name] = STEPS if time.process_time() - started < SLOW else 1
        for _ in range(ROUNDS):
            for name, step in steps.items():
                started = time.process_time()
                for _ in range(counts[name]):
                    step()
                found[name].append((time.process_time() - started) / counts[name] * 1e3)
        for name, step in steps.items():
            assert step() < first[name], f"{name} does not learn, so that its time is none of a training step"
    return found


def gemm_peak() -> float:
    """FLOP/s of a large product of matrices on one thread, the best of some."""
    with threaded(1):
        best = 0.0
        for size in (256, 512, 1024):
            matrix, times = torch.randn(size, size), max(1, (1024 // size) ** 3 // 4)
            for _ in range(20):
                started = time.process_time()
                for _ in range(times):
                    matrix @ matrix
                best = max(best, times * 2 * size**3 / (time.process_time() - started))
    return best


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_soak_a_step_beside_hugging_face() -> None:
    rows, peak = [], gemm_peak()
    for width in SEQUENCES:
        spec = compose("sweep", SweepConfig, ["+sweep=proxy", f"model.width={width}"]).spec()
        vocab = spec.tokenizer.num_ids
        torch._dynamo.reset()
        steps = {
            "mutune": ours(width),
            "mutune compiled": ours(width, compile=True, attention="explicit"),
            "mutune bf16": ours(width, dtype="bfloat16", attention="explicit"),
            **{kind: theirs(kind, width, vocab) for kind in ("GPT-2", "Llama")},
            **{f"{kind} compiled": theirs(kind, width, vocab, compiled=True) for kind in ("GPT-2", "Llama")},
            **{f"{kind} bf16": theirs(kind, width, vocab, low=True) for kind in ("GPT-2", "Llama")},
        }
        found = timed(steps)
        flops = price(spec).flops / spec.num_steps / spec.stages[0].batch_sequences * SEQUENCES[width]
        peak = max(peak, gemm_peak())
        best = min(median(times) for name, times in found.items() if name.startswith("mutune"))
        least = flops / peak * 1e3  # ms; a step that took less would say that the peak was not measured right
        for name, times in found.items():
            ms = median(times)
            assert ms > least or not name.startswith("mutune"), f"{name} at d={width} is faster than the peak"
            rows.append(
                {
                    "d": width,
                    "step": name,
                    "ms (lowest to highest round)": f"{ms:.1f} ({min(times):.1f} to {max(times):.1f})",
                    "times as long as mutune's best": f"{ms / best:.2f}",
                    "share of the GEMM peak": f"{flops / (ms / 1e3) / peak:.2f}" if name.startswith("mutune") else "",
                }
            )
    record(
        "step_speed",
        f"A training step ({DEPTH} layers, head {HEAD}, context {CONTEXT}, BPE-1024; 1,024 tokens, 512 at d=256), one "
        f"thread, CPU time, turn by turn; peak {peak / 1e9:.0f} GFLOP/s",
        rows,
    )


class Operations(TorchDispatchMode):
    """What a step does: (operation, FLOPs, bytes read and written) of each that is more than a view."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[str, float, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func.overloadpacket)
        if not func.is_view and name != "aten._unsafe_view":
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.done.append((name, _flops(func, args, kwargs or {}, out), sum(t.nbytes for t in tensors)))
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    name = str(func.overloadpacket)
    if "scaled_dot_product" in name:  # of CPUs, which torch's own counter does not know
        backward = "backward" in name
        *batch, tokens, size = (args[1] if backward else args[0]).shape
        return (10 if backward else 4) * math.prod(batch) * tokens**2 * size
    counter = flop_registry.get(func.overloadpacket)
    return float(counter(*args, **kwargs, out_val=out)) if counter else 0.0


def bandwidth() -> float:
    """Bytes per second of a sum of two tensors on one thread, at the size at which it is fastest."""
    with threaded(1):
        best = 0.0
        for size in (2**14, 2**16, 2**18, 2**20, 2**22):
            one, other, out = torch.ones(size), torch.ones(size), torch.ones(size)
            times = max(1, 2**24 // size)
            for _ in range(10):
                started = time.process_time()
                for _ in range(times):
                    torch.add(one, other, out=out)
                best = max(best, times * 12 * size / (time.process_time() - started))
    return best


@pytest.mark.soak
def test_soak_the_share_of_the_roofline() -> None:
    """An operation takes at least its FLOPs at the peak, and its bytes at the bandwidth: the longer of both counts."""
    rows, peak, moved = [], gemm_peak(), bandwidth()
    for width in SEQUENCES:
        step = ours(width, attention="sdpa", compile=False, dtype="float32")
        ms = median(timed({"mutune": step})["mutune"])
        peak, moved = max(peak, gemm_peak()), max(moved, bandwidth())
        with threaded(1), Operations() as operations:
            step()
        done = operations.done
        least = [max(flops / peak, size / moved) for _, flops, size in done]
        products = sum(t for t, (_, flops, _) in zip(least, done, strict=True) if flops)
        rows.append(
            {
                "d": width,
                "ms a step": f"{ms:.1f}",
                "at least, by the roofline": f"{1e3 * sum(least):.1f}",
                "of which products of matrices": f"{1e3 * products:.1f}",
                "share of the roofline": f"{1e3 * sum(least) / ms:.2f}",
                "share of the GEMM peak": f"{sum(flops for _, flops, _ in done) / peak / ms * 1e3:.2f}",
                "operations": len(done),
            }
        )
        assert sum(least) < ms / 1e3
    record(
        "roofline",
        f"A training step of mutune's decoder, eager fp32, one thread, CPU time ({DEPTH} layers, head {HEAD}, context "
        f"{CONTEXT}); peak {peak / 1e9:.0f} GFLOP/s, bandwidth {moved / 1e9:.0f} GB/s",
        rows,
    )


LARGE = """
import json, resource, sys, time, torch
from mutune.training import execution
if sys.argv[1] == "off":
    execution.MMAP_LIMIT = 2**62
from tests.training.test_speed import large
step = large()
step(); step()
started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    step()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([(time.process_time() - started) / 8 * 1e3, faults / 8]))
"""


def large() -> Step:
    """A step of 512 tokens with GPT-2's vocabulary, whose logits are 100 MB."""
    torch.set_num_threads(1)
    words = ["+sweep=proxy", "model.width=64", "tokenizer=gpt2", "run.num_steps=100000"]
    steps = Run(compose("sweep", SweepConfig, words).spec(), torch.device("cpu")).steps()
    return lambda: float(next(steps)["loss"])


@pytest.mark.soak
def test_soak_memory_that_is_kept() -> None:
    found: dict[str, list[list[float]]] = {"off": [], "on": []}
    for _ in range(3):
        for kept, times in found.items():
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", LARGE, kept],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=True,
            )
            times.append(json.loads(done.stdout))
    rows = [
        {
            "glibc's threshold": "raised" if kept == "on" else "as it is",
            "ms a step": f"{median(ms for ms, _ in times):.0f}",
            "lowest to highest": f"{min(ms for ms, _ in times):.0f} to {max(ms for ms, _ in times):.0f}",
            "page faults a step": f"{median(faults for _, faults in times):,.0f}",
        }
        for kept, times in found.items()
    ]
    (off, on) = (median(faults for _, faults in found[kept]) for kept in ("off", "on"))
    assert on < off / 10
    record("memory", "A step with GPT-2's 50,257 tokens (d=64, 512 tokens, one thread, CPU time), turn by turn", rows)
