"""What a forward pass, a backward pass and an update really hold, measured in a process of their own.

A process that runs out of memory there ends, and nothing else does.
"""

import ctypes
import math
import multiprocessing
import platform
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mutune.training.config import ParallelConfig, RunSpec, StageConfig
from mutune.training.device import used_memory
from mutune.training.price import ALONE

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

STEPS = 2  # the first makes Adam's moments, the second has everything
REHEARSAL = 16  # tokens, and sizes of a model whose steps load what a process needs once
GIVEN_BACK = 2**18  # bytes of a tensor from which on it is given back, where no heap keeps it
FIRST_TO_GO = "1000"  # of Linux's oom_score_adj


def measure_step(
    spec: RunSpec,
    stage: int,
    sequences: int,
    device: str,
    parallel: ParallelConfig = ALONE,
    *,
    heap: bool = True,
) -> int | None:
    """Peak bytes of training steps of `spec` in its `stage`, with so many sequences per forward pass.

    On a CPU it is what the process grows by (its peak resident size less that before there was a model), on a GPU what
    torch reserves. None where it runs out of memory.

    Args:
        heap: whether a CPU's memory comes from a heap that keeps what is freed, as a run's does (`keep_memory`); else
            large tensors are given back at once, and what is measured is what is alive.
    """
    found: int | None = apart(_peak, spec, stage, sequences, device, parallel, heap)
    return found


def apart(work: Callable[..., T], *arguments: Any) -> T | None:
    """What `work` returns in a process of its own; None where that runs out of memory, or is killed.

    Raises:
        Exception: whatever else `work` raises.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        returned, said = ours.recv()
    except EOFError:  # it was killed, as the kernel does where memory ends
        returned, said = True, None
    process.join()
    if not returned:
        raise said
    result: T | None = said
    return result


def _work(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    with suppress(OSError):  # where memory ends, it is this process that goes
        Path("/proc/self/oom_score_adj").write_text(FIRST_TO_GO)
    try:
        pipe.send((True, work(*arguments)))
    except MemoryError:
        pipe.send((True, None))
    except Exception as error:
        is_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # torch's two
        pipe.send((True, None) if is_memory else (False, error))


def _peak(spec: RunSpec, stage: int, sequences: int, name: str, parallel: ParallelConfig, heap: bool) -> int:
    import torch

    device = torch.device(name)
    torch.set_num_threads(spec.loop.threads or 1)
    part = spec.stages[stage]
    if device.type == "cpu":
        _set_heap(heap, 4 * spec.tokenizer.num_ids * sequences * part.context_length)
    small = replace(spec.model, width=REHEARSAL, depth=1, num_heads=1, head_size=REHEARSAL, ffn_width=REHEARSAL)
    _train(replace(spec, model=small), REHEARSAL, StageConfig(REHEARSAL, 2, STEPS), 1, device, parallel)  # loads all
    before, _ = used_memory(device.type)
    _train(spec, spec.tokenizer.num_ids, part, sequences, device, parallel)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return used_memory(device.type)[1] - before


def _set_heap(heap: bool, logits_bytes: int) -> None:
    from mutune.training.execution import M_MMAP_THRESHOLD, keep_memory

    if heap:
        keep_memory(logits_bytes)
    elif platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, GIVEN_BACK)


def _train(
    spec: RunSpec,
    vocab_size: int,
    stage: StageConfig,
    sequences: int,
    device: "torch.device",
    parallel: ParallelConfig,
) -> None:
    """A few steps as a run makes them, on random tokens."""
    import torch

    from mutune.model.decoder import Decoder
    from mutune.parametrization.apply import make_optimizer
    from mutune.training.execution import loss_functions
    from mutune.training.loop import train
    from mutune.training.recompute import recomputed

    attention = spec.loop.attention_on(device.type)
    loop = replace(spec.loop.settled(), compile=spec.loop.compiled_on(device.type))
    plan = spec.plan(vocab_size)
    sites = {site: row.value for site, row in plan.multipliers.items()}
    recompute = recomputed(parallel.activation_checkpointing)
    model = Decoder(spec.model, vocab_size, sites, attention, recompute).to(device)
    loss, _ = loss_functions(model, loop)
    optimizer = make_optimizer(model, plan, betas=(spec.hyperparameters.beta1, spec.hyperparameters.beta2))
    batch = min(stage.batch_sequences, 2 * sequences)  # two forward passes, where a step has more than one
    ids = torch.randint(vocab_size, (batch, stage.context_length + 1)).numpy()
    made = train(
        model,
        optimizer,
        lambda _: ids,
        lambda _: 0.0,  # a rate of 0: untrained weights that moved would make numbers that are slow to compute
        loss=loss,
        start_step=0,
        num_steps=STEPS,
        peak_lr=spec.hyperparameters.learning_rate,
        clip_norm=spec.loop.clip_norm,
        micro_sequences=sequences,
        loss_bound=math.inf,
        warmup_steps=STEPS,
    )
    deque(made, maxlen=0)
