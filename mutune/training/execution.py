"""How a step is computed: in which number format, by which attention, compiled or not, by how many threads; and how
long it takes so.

None of it changes what is trained, but rounding does follow it: a study keeps to one way, and so does its ladder.
"""

import ctypes
import math
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from mutune.model.decoder import Decoder
from mutune.parametrization.multiplier import Multiplier
from mutune.training.config import LoopConfig
from mutune.training.loop import Loss
from mutune.training.price import Timing

WARM_UP, TIMED = 4, 4  # steps
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_LIMIT = 32 * 2**20  # bytes of a tensor up to which glibc keeps it by itself
SLOW = 2.0  # seconds of a step, from which on it is timed once
FIRST = 15.0  # of the first step, which sets everything up, from which on there is no second


class TracedMultiplier(Multiplier):
    """A `Multiplier` whose number is a tensor, so that code compiled for one model serves all of its shape."""

    def __init__(self, site: str, value: float, device: torch.device) -> None:
        super().__init__(site, value)
        self.factor: Tensor
        self.register_buffer("factor", torch.tensor(value, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x · value, of any shape."""
        return x * self.factor.to(x.dtype)


def loss_functions(model: Decoder, loop: LoopConfig, alone: bool = True) -> tuple[Loss, Loss]:
    """The model's `loss` as `loop` wants it computed, for training and for evaluation, which is not compiled.

    Weights and optimizer stay float32. On a CPU a model that is not sharded is compiled as a whole, for training only;
    else its parts are (`Decoder.compile_parts`): for a GPU, all blocks together would take long.

    Args:
        alone: whether it is not sharded; with `compile` every `Multiplier` then becomes a `TracedMultiplier`.
    """
    loop = loop.settled()
    device = next(model.parameters()).device
    whole = alone and device.type == "cpu"
    if loop.compile and alone:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Multiplier):
                    setattr(parent, name, TracedMultiplier(child.site, child.value, device))
    if loop.compile and not whole:
        model.compile_parts()

    def loss(ids_BT: Tensor, targets_BT: Tensor) -> Tensor:
        with number_format(loop, device):
            return model.loss(ids_BT, targets_BT)

    return (torch.compile(loss) if loop.compile and whole else loss), loss


def number_format(loop: LoopConfig, device: torch.device) -> torch.autocast:
    """The context in which products of matrices are computed as `loop.dtype` says."""
    return torch.autocast(device.type, torch.bfloat16, enabled=loop.dtype == "bfloat16")


def time_steps(
    loop: LoopConfig,
    steps: Callable[[LoopConfig], Iterator[Any]],
    device: torch.device,
    give_up: float = math.inf,
) -> Timing:
    """Time a way of computing.

    Args:
        steps: makes a step at every `next`.
        give_up: seconds of a step, from which on nobody wants to know exactly.
    """
    if device.type == "cuda":
        return _time_on_gpu(loop, steps(loop), device)
    threads = loop.threads or 1
    clock = time.process_time if threads == 1 else time.monotonic  # of one thread, whatever else the machine does
    with threaded(threads):
        begun, made = clock(), steps(loop)
        last = _clocked(made, clock)
        for _ in range(3 if loop.compile else 1 if last < FIRST else 0):
            last = _clocked(made, clock)
        compiling = clock() - begun
        if last > min(give_up, SLOW):
            return Timing(loop, last, compiling)
        return Timing(loop, fmean(_clocked(made, clock) for _ in range(TIMED)), compiling)


def _clocked(made: Iterator[Any], clock: Callable[[], float]) -> float:
    """Seconds of one step."""
    started = clock()
    next(made)
    return clock() - started


def _time_on_gpu(loop: LoopConfig, made: Iterator[Any], device: torch.device) -> Timing:
    torch.cuda.reset_peak_memory_stats(device)
    begun = time.monotonic()
    for _ in range(WARM_UP):
        next(made)
    torch.cuda.synchronize(device)
    started = time.monotonic()
    for _ in range(TIMED):
        next(made)
    torch.cuda.synchronize(device)
    seconds = (time.monotonic() - started) / TIMED
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        next(made)
        torch.cuda.synchronize(device)
    computing = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    memory = torch.cuda.max_memory_allocated(device)
    return Timing(loop, seconds, started - begun, min(1.0, computing / seconds), memory)


def keep_memory(largest: int) -> None:
    """Let glibc keep what is freed where tensors of `largest` bytes come and go: beyond its own limit it asks the
    kernel for each anew, page by page. Elsewhere nothing is done.
    """
    if largest > MMAP_LIMIT and platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def threaded(count: int) -> Iterator[None]:
    """With so many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ways(loop: LoopConfig, device: torch.device) -> list[LoopConfig]:
    """The ways of computing that `loop` leaves open, not compiled. Attention by hand is only for CPUs, whose fused
    kernel is slow in bfloat16, and without a bias for GPUs.
    """
    dtypes = [loop.dtype] if loop.dtype else ["float32", "bfloat16"]
    by_device = ["sdpa", "explicit"] if device.type == "cpu" else ["sdpa"] if loop.document_mask else ["sdpa", "causal"]
    attentions = [loop.attention] if loop.attention else by_device
    return [
        replace(loop, dtype=dtype, attention=attention, compile=False) for dtype in dtypes for attention in attentions
    ]
