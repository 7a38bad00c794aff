"""A step of the target's run beside a plain PyTorch loop and Hugging Face's Trainer, with the same model and batches.

    python benchmarks/train.py                                           # on a CPU: benchmarks/train.md
    gpu="--device cuda --target btlm_3b --dtype bfloat16"
    python benchmarks/train.py $gpu --context 2048 8192 --sequences 32 8 --micro 4 1 --only mutune
    python benchmarks/train.py $gpu --context 2048 --sequences 8 --micro 4 --depth 8  # three such models fit a GPU

All turn by turn in one process; medians of rounds with the lowest and the highest. Trainer needs `accelerate`.
"""

import argparse
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from mutune.certificate.config import TransferFile
from mutune.compose import build
from mutune.files import read_yaml
from mutune.model.decoder import Decoder
from mutune.model.shape import tensor_specs
from mutune.parametrization.apply import initialise
from mutune.scaling.arithmetic import forward_flops_per_token, matmul_parameter_count
from mutune.training.config import ParallelConfig, RunSpec, StageConfig
from mutune.training.device import used_memory
from mutune.training.execution import keep_memory, number_format, threaded
from mutune.training.price import price
from mutune.training.run import Run, window_loader
from mutune.training.throughput import rates
from mutune.transfer import main as transfer_door
from tests.soak import record

ROUNDS, STEPS, WARM_UP = 4, 3, 2
#: The laptop's shapes: width, depth, vocabulary stays that of the target.
SHAPES = ((256, 4), (512, 4))
#: Runs so many steps, and returns seconds of each.
Steps = Callable[[int], list[float]]


class Clock:
    """Seconds, once the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def ours(run: Run, clock: Clock) -> Steps:
    """mutune's own loop."""
    made = run.steps()

    def steps(count: int) -> list[float]:
        found = []
        for _ in range(count):
            began = clock()
            next(made)
            found.append(clock() - began)
        return found

    return steps


def plain(run: Run, clock: Clock) -> Steps:
    """What one writes by hand: one AdamW group, clipping, nothing compiled."""
    model, device, at_once = copied(run), run.world.device, run._micro_sequences[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
    step = iter(range(10**9))

    def one() -> float:
        began = clock()
        ids_BT = torch.from_numpy(run.loader.batch(next(step))).to(device)
        for part_BT in ids_BT.split(at_once):
            with number_format(run.spec.loop, device):
                loss = model.loss(part_BT[:, :-1], part_BT[:, 1:]) * (len(part_BT) / len(ids_BT))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return clock() - began

    return lambda count: [one() for _ in range(count)]


class Labelled(nn.Module):
    """The decoder as Trainer wants it."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`loss` of windows (B, T + 1)."""
        return {"loss": self.model.loss(input_ids[:, :-1], labels[:, 1:])}


def trainer(run: Run, clock: Clock, folder: Path) -> Steps:
    """Hugging Face's Trainer with its defaults, but for what the runs must have in common."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    stage, spec = run.spec.stages[0], run.spec
    rows = [row for step in range(ROUNDS * (STEPS + WARM_UP)) for row in run.loader.batch(step)]
    data = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in rows]
    model = Labelled(copied(run))

    class Times(TrainerCallback):
        began, found = 0.0, list[float]()

        def on_step_begin(self, *given: Any, **more: Any) -> None:
            self.began = clock()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            self.found.append(clock() - self.began)

    def steps(count: int) -> list[float]:
        times = Times()
        times.found = []
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=count,
            per_device_train_batch_size=run._micro_sequences[0],
            gradient_accumulation_steps=stage.batch_sequences // run._micro_sequences[0],
            learning_rate=1e-4,
            weight_decay=0.1,
            max_grad_norm=1.0,
            bf16=spec.loop.dtype == "bfloat16",
            use_cpu=run.world.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[times]).train()
        return times.found

    return steps


def copied(run: Run) -> Decoder:
    """The run's model with its initial values, not compiled."""
    sites = {site: row.value for site, row in run.plan.multipliers.items()}
    attention, recompute = run.spec.loop.attention_on(run.world.device.type), run.model.h[0].recompute
    model = Decoder(run.spec.model, run.corpus.vocab_size, sites, attention, recompute)
    initialise(model, run.plan, run.spec.seed)
    return model.to(run.world.device)


def side_by_side(ways: dict[str, Steps]) -> dict[str, list[float]]:
    """Seconds of a step in each round, turn by turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, steps in ways.items():
            found[name].append(median(steps(WARM_UP + STEPS)[WARM_UP:]))
            print(f"{name}: {1e3 * found[name][-1]:.1f} ms a step", flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------- components
def components(run: Run, clock: Clock) -> Iterator[tuple[str, float, float]]:
    """(part, seconds of a step, FLOPs of a step) of the parts of a step, each forward and backward by itself."""
    spec, model, device = run.spec, run.model, run.world.device
    shape, stage = spec.model, spec.stages[0]
    tokens, block = stage.tokens_per_step, model.h[0]
    at_once, low = run._micro_sequences[0], torch.bfloat16 if spec.loop.dtype == "bfloat16" else torch.float32
    passes = stage.batch_sequences / at_once
    x_BTD = torch.randn(at_once, stage.context_length, shape.width, device=device, requires_grad=True)
    bias: Any = model._attention_bias(stage.context_length, device, low)
    ids_BT = torch.from_numpy(run.loader.batch(0))[:at_once].to(device)
    whole: Callable[..., Any] = torch.compile(dynamic=False) if device.type == "cuda" else lambda part: part
    attn, mlp, norm = whole(block.attn.forward), whole(block.mlp.forward), whole(block.ln_1.forward)

    def both(forward: Callable[[], Tensor]) -> None:
        with number_format(spec.loop, device):
            out = forward()
        out.backward(torch.ones_like(out))

    attention = 3 * (2 * 4 * shape.width**2 + 4 * shape.width * stage.context_length) * tokens
    ffn = 3 * 2 * (3 if shape.activation == "swiglu" else 2) * shape.width * shape.ffn * tokens
    head = 3 * 2 * run.corpus.vocab_size * shape.width * tokens
    yield (
        "attention",
        passes * shape.depth * timed(lambda: both(lambda: attn(x_BTD, bias)), clock),
        shape.depth * attention,
    )
    mlps = passes * shape.depth * timed(lambda: both(lambda: mlp(x_BTD)), clock)
    yield "feed-forward", mlps, shape.depth * ffn
    yield "LayerNorm", passes * (2 * shape.depth + 1) * timed(lambda: both(lambda: norm(x_BTD)), clock), 0.0
    blocks = passes * shape.depth * timed(lambda: both(lambda: block(x_BTD, bias)), clock)
    yield "blocks as they are", blocks, shape.depth * (attention + ffn)
    losses = passes * timed(lambda: both(lambda: _loss(model, x_BTD, ids_BT[:, 1:])), clock)
    yield "logits and loss", losses, float(head)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    yield "clipping", timed(lambda: nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True).item(), clock), 0.0
    yield "AdamW", timed(run.optimizer.step, clock), 0.0
    yield "batch", timed(lambda: torch.from_numpy(run.loader.batch(1)).to(device), clock), 0.0


def _loss(model: Decoder, x_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    with_hidden: Any = model._hidden
    try:
        model._hidden = lambda ids_BT: x_BTD  # type: ignore[method-assign]
        return model.loss(targets_BT, targets_BT)
    finally:
        model._hidden = with_hidden  # type: ignore[method-assign]


def timed(work: Callable[[], object], clock: Clock) -> float:
    """Median seconds."""
    found = []
    for _ in range(WARM_UP + STEPS):
        began = clock()
        work()
        found.append(clock() - began)
    return median(found[WARM_UP:])


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices, the best of some: what a share of the peak is a share of."""
    size, clock, best = (8192 if device.type == "cuda" else 1024), Clock(device), 0.0
    one = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(20):
        began = clock()
        one @ one
        best = max(best, 2 * size**3 / (clock() - began))
    return best


def spec_of(arguments: argparse.Namespace, width: int | None, depth: int | None, folder: Path) -> RunSpec:
    """The run that is timed."""
    words = ["study=published", f"target={arguments.target}", "target.schedule={kind: constant}", f"out={folder}"]
    words += [f"target.model.width={width}", f"target.model.depth={depth}", "target.name=timed"] if width else []
    words += ["overwrite=true"]
    with redirect_stdout(io.StringIO()):
        assert transfer_door(words) == 0
    (written,) = folder.glob("transfer/*/transfer.yaml")
    spec = build(TransferFile, read_yaml(written, "transfer file")).spec(0)
    model = replace(spec.model, depth=arguments.depth or spec.model.depth)
    return replace(spec, model=model, loop=replace(spec.loop, dtype=arguments.dtype, micro_sequences=None))


def turn(run: Run, context: int, sequences: int, at_once: int) -> None:
    """Let the run go on with such batches."""
    run.spec = replace(run.spec, stages=(StageConfig(context, sequences, num_steps=10_000),))
    run.parallel = replace(run.parallel, micro_sequences=at_once)
    run.loader = window_loader(run.spec, run.corpora)


def main() -> None:
    """Time it, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--target", default="small")
    parser.add_argument("--context", type=int, nargs="+", default=[512], help="one or more, each a part of the table")
    parser.add_argument("--sequences", type=int, nargs="+", default=[2], help="of a step, for each context")
    parser.add_argument("--micro", type=int, nargs="+", help="sequences per forward pass, for each context")
    parser.add_argument("--depth", type=int, help="blocks, where the target's are too many")
    parser.add_argument("--only", choices=["mutune"], help="neither the plain loop nor Trainer")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    low = getattr(torch, arguments.dtype)
    rows: list[dict[str, Any]] = []
    with threaded(1), tempfile.TemporaryDirectory() as folder:
        peak, sheet = peak_flops(device, low), rates(str(device), arguments.dtype).peak_flops
        for width, depth in SHAPES if device.type == "cpu" else ((None, None),):
            spec = spec_of(arguments, width, depth, Path(folder))
            run = Run(spec, device, parallel=ParallelConfig(activation_checkpointing=arguments.recompute))
            clock = Clock(device)
            keep_memory(2**31)
            for batch in zip(
                arguments.context, arguments.sequences, arguments.micro or arguments.sequences, strict=True
            ):
                turn(run, *batch)
                ways = {"mutune": ours(run, clock)}
                if not arguments.only:
                    ways |= {"plain loop": plain(run, clock), "HF Trainer": trainer(run, clock, Path(folder))}
                found, memory = side_by_side(ways), used_memory(device.type)[1]
                parts = list(components(run, clock))
                rows += table(run, found, parts, sheet or max(peak, peak_flops(device, low)))
                estimated = price(run.spec, run.parallel, device=device.type).bytes
                print(f"peak memory so far {memory:,} bytes, estimated {estimated:,}", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "a CPU"
    against = f"MFU of the data sheet's {sheet / 1e12:.0f}" if sheet else "MFU of that"
    blocks = f"_{arguments.depth}_blocks" if arguments.depth else ""
    record(
        "train" if device.type == "cpu" else f"train_{arguments.target}{blocks}",
        f"A step of {arguments.target}{blocks.replace('_', ' ')} on {where}, {arguments.dtype}; a product of matrices "
        f"reaches {peak / 1e12:.2f} TFLOP/s, {against}",
        rows,
        by=f"`python {' '.join(sys.argv)}`",
    )


def table(
    run: Run, found: dict[str, list[float]], parts: list[tuple[str, float, float]], peak: float
) -> list[dict[str, Any]]:
    """One row a contestant and one a part of mutune's step."""
    shape, stage, vocab = run.spec.model, run.spec.stages[0], run.corpus.vocab_size
    matrices = matmul_parameter_count(tensor_specs(shape, vocab))
    per_token = forward_flops_per_token(
        matrices, vocab_size=vocab, width=shape.width, depth=shape.depth, context_length=stage.context_length
    )
    flops, best = 3 * per_token * stage.tokens_per_step, median(found["mutune"])
    batch = f"{stage.batch_sequences} × {stage.context_length:,}, {run._micro_sequences[0]} at a time"
    rows = [
        {
            "width": shape.width,
            "batch": batch,
            "what": name,
            "ms (lowest to highest)": f"{1e3 * median(t):.1f} ({1e3 * min(t):.1f} to {1e3 * max(t):.1f})",
            "times mutune's": f"{median(t) / best:.2f}",
            "tokens/s": f"{stage.tokens_per_step / median(t):,.0f}",
            "MFU": f"{flops / median(t) / peak:.2f}",
        }
        for name, t in found.items()
    ]
    for name, seconds, part in parts:
        rows.append(
            {
                "width": shape.width,
                "batch": batch,
                "what": f"of it {name}",
                "ms (lowest to highest)": f"{1e3 * seconds:.1f}",
                "times mutune's": f"{seconds / best:.2f}",
                "tokens/s": "",
                "MFU": f"{part / seconds / peak:.2f}" if part else "",
            }
        )
    return rows


if __name__ == "__main__":
    main()
