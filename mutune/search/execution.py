"""How a study's runs are computed, and how many at once: chosen by a short measurement, and kept within the study."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from mutune.compose import build
from mutune.errors import Refusal
from mutune.files import read_yaml
from mutune.folders import CONFIG
from mutune.progress import clock
from mutune.search.workers import WorkError, Workers, default_workers
from mutune.training.config import LoopConfig, RunSpec
from mutune.training.device import device_name, free_memory, kind_of
from mutune.training.price import Timing, price

OPEN = ("dtype", "attention", "compile", "threads")  # keys of `loop` that are left to the measurement where null
APART = 1  # processes that measure; with 0 this one does
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
    where = device_name(device)
    spec, share = replace(spec, loop=kept(directory, spec.loop)), 1
    if workers is None and where == "cpu":
        workers = min(_workers(spec, None, where), at_once)
        share = max(1, default_workers() // workers)
    if share == 1 and spec.loop.threads is None:
        spec = replace(spec, loop=replace(spec.loop, threads=1))
    if workers and not _open(spec.loop):
        return ExecutionPlan(spec.loop, workers)
    best, measured = _measured(spec, where, steps, share)
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


def _measured(spec: RunSpec, device: str, steps: float, share: int) -> tuple[Timing, str]:
    """What `measure` finds in a worker, as the runs have it; on CPUs this process needs no torch."""
    try:
        with Workers(partial(_measure, spec, device, steps, share), APART) as pool:
            return next(found for _, found in pool.run(["the timing of its steps"]))
    except WorkError as error:
        raise error.__cause__ if isinstance(error.__cause__, Refusal) else error from None


def _measure(spec: RunSpec, device: str, steps: float, share: int, name: str) -> tuple[Timing, str]:
    from mutune.search.measure import measure

    return measure(spec, device, steps, share)


def _workers(spec: RunSpec, timing: Timing | None, device: str) -> int:
    """As many as have cores; on a GPU, whose steps are always timed, as keep it busy. In any case, what fits."""
    most: float
    if timing is not None and device.startswith("cuda"):
        most, each = round(1 / max(timing.busy, 1e-3)), timing.memory + GPU_CONTEXT
    else:
        most, each = math.inf, price(spec, device=kind_of(device)).bytes
    cores = default_workers() // (spec.loop.threads or 1)
    return max(1, int(min(cores, most, free_memory(device) // each)))
