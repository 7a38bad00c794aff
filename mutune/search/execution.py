"""How a study's runs are computed, and how many at once: chosen by a short measurement, and kept within the study."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mutune.compose import build
from mutune.errors import Refusal
from mutune.files import read_yaml
from mutune.folders import CONFIG
from mutune.progress import clock
from mutune.search.workers import default_workers
from mutune.training.config import LoopConfig, RunSpec
from mutune.training.execution import SLOW, TIMED, WARM_UP, Timing, time_steps, ways
from mutune.training.memory import free_memory
from mutune.training.price import price
from mutune.training.run import Run, resolve_device

OPEN = ("dtype", "attention", "compile", "threads")  # keys of `loop` that are left to the measurement where null
GAIN = 1.25  # how many times as fast a way has to be as the plain one, whose rounding it does not share
COMPILE_WORTH = 1200.0  # worker-seconds of a study, from which on compiling is tried
COMPILE_GAIN = 2.0  # how many times its cost compiling has to save
#: Values at which a run does not diverge while it is timed; how long a step takes does not hang on them.
CALM = {"learning_rate": 1e-6, "init_std": 0.02, "embedding_multiplier": 1.0, "output_multiplier": 1.0}
TOKENS = 1024  # of a step that is measured on a CPU
GPU_CONTEXT = 0.6 * 2**30  # bytes that a process takes on a GPU besides its tensors


@dataclass(frozen=True)
class ExecutionPlan:
    """How a study runs.

    Attributes:
        loop: with nothing left open. workers: processes at once.
        seconds: of a step, per worker; None where it was not measured. measured: how, in words.
    """

    loop: LoopConfig
    workers: int
    seconds: float | None = None
    measured: str = ""

    def line(self, steps: float) -> str:
        """The plan in words. steps: of the whole study."""
        compiled = "compiled" if self.loop.compile else "not compiled"
        workers = f"{self.workers} worker{'s' if self.workers > 1 else ''}"
        threads = f"{self.loop.threads} threads" if (self.loop.threads or 1) > 1 else "one thread"
        how = f"{workers} of {threads}, {self.loop.dtype}, {self.loop.attention} attention, {compiled}"
        if self.seconds is None:
            return f"plan       {how}"
        each, busy = self.seconds, self.seconds * steps
        return (
            f"plan       {how}: {1e3 * each:,.3g} ms a step, about {clock(busy / self.workers)} on free cores, "
            f"{busy / 3600:.3g} worker-hours ({self.measured})"
        )


def plan_execution(
    spec: RunSpec, directory: Path, device: str, steps: float, workers: int | None, at_once: int
) -> ExecutionPlan:
    """How the runs of a study are computed: as it is kept in `directory`, else as `spec.loop` says, and where that
    leaves something open, as a few steps of each way show.

    Args:
        steps: of the whole study, at the shape of `spec`.
        workers: at once; None for as many as pay, of more threads where cores would idle.
        at_once: runs there can be at once.
    """
    where = resolve_device(device)
    spec, share = replace(spec, loop=kept(directory, spec.loop)), 1
    if workers is None and where.type == "cpu":
        workers = min(_workers(spec, None, where), at_once)
        share = max(1, default_workers() // workers)
    if share == 1 and spec.loop.threads is None:
        spec = replace(spec, loop=replace(spec.loop, threads=1))
    if workers and not _open(spec.loop):
        return ExecutionPlan(spec.loop, workers)
    best, measured = _measure(spec, where, steps, share)
    return ExecutionPlan(best.loop, workers or min(_workers(spec, best, where), at_once), best.seconds, measured)


def kept(directory: Path, loop: LoopConfig) -> LoopConfig:
    """`loop` with what it leaves open as the study in `directory` has it, where there is one."""
    try:
        stored = build(LoopConfig, read_yaml(directory / CONFIG, "study's config")["inputs"]["config"]["loop"])
    except (Refusal, KeyError, TypeError):
        return loop
    return replace(loop, **{key: getattr(stored, key) for key in _open(loop)})


def agreed(directory: Path, asked: LoopConfig, plan: ExecutionPlan) -> LoopConfig:
    """The study's way of computing, whose folder is held: that of another process where it was the first."""
    loop = kept(directory, asked)
    return plan.loop if _open(loop) else loop


def _open(loop: LoopConfig) -> list[str]:
    return [key for key in OPEN if getattr(loop, key) is None]


def _measure(spec: RunSpec, device: torch.device, steps: float, share: int) -> tuple[Timing, str]:
    """The way of computing that pays, per whole step, and how the others compared. share: of the cores, a run's."""
    stage = spec.stages[0]
    few = max(1, TOKENS // stage.context_length) if device.type == "cpu" else stage.batch_sequences
    enough = max(stage.num_steps, WARM_UP + TIMED + 1)
    small = replace(stage, batch_sequences=min(stage.batch_sequences, few), num_steps=enough)
    scale = stage.batch_sequences / small.batch_sequences

    calm = replace(spec, stages=(small,), hyperparameters=replace(spec.hyperparameters, **CALM))

    def steps_of(loop: LoopConfig) -> Iterator[Any]:
        while True:  # a run that diverges all the same begins anew
            yield from Run(replace(calm, loop=loop), device).steps()

    def timed(loop: LoopConfig, give_up: float = math.inf) -> Timing:
        timing = time_steps(loop, steps_of, device, give_up / scale)
        return replace(timing, seconds=timing.seconds * scale)

    plain_way, *others = ways(replace(spec.loop, threads=spec.loop.threads or 1), device)
    plain = timed(plain_way)
    slow = plain.seconds > SLOW * scale and not spec.loop.compile
    found = [plain, *(timed(way, give_up=2 * plain.seconds) for way in ([] if slow else others))]
    fastest = min(found, key=lambda timing: timing.seconds)
    best = fastest if plain.seconds > GAIN * fastest.seconds else plain
    if spec.loop.threads is None:
        shared = timed(replace(best.loop, threads=share))
        found.append(shared)
        best = shared if best.seconds > GAIN * shared.seconds else best
    long = spec.loop.compile is None and not slow and best.seconds * steps > COMPILE_WORTH
    if spec.loop.compile or long:
        attention = spec.loop.attention or ("explicit" if device.type == "cpu" else "sdpa")  # which compiling fuses
        compiled = timed(replace(best.loop, attention=attention, compile=True))
        found.append(compiled)
        if spec.loop.compile or (best.seconds - compiled.seconds) * steps > COMPILE_GAIN * compiled.compiling:
            best = compiled
    slower = [f"{_name(t.loop)} {1e3 * t.seconds:,.3g} ms" for t in found if t is not best]
    slower += ["so long a step was timed in no other way"] if slow else []
    return best, f"measured; {', '.join(slower)}" if slower else "measured"


def _name(loop: LoopConfig) -> str:
    more = [*(["compiled"] if loop.compile else []), *([f"{loop.threads} threads"] if (loop.threads or 1) > 1 else [])]
    return " ".join([str(loop.dtype), str(loop.attention), *more])


def _workers(spec: RunSpec, timing: Timing | None, device: torch.device) -> int:
    """As many as have cores; on a GPU, whose steps are always timed, as keep it busy. In any case, what fits."""
    most: float
    if timing is not None and device.type == "cuda":
        most, each = round(1 / max(timing.busy, 1e-3)), timing.memory + GPU_CONTEXT
    else:
        most, each = math.inf, price(spec).bytes
    cores = default_workers() // (spec.loop.threads or 1)
    return max(1, int(min(cores, most, free_memory(device) // each)))
