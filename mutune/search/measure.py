"""Which way of computing pays for a study, as a few steps of each show."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mutune.training.config import LoopConfig, RunSpec
from mutune.training.device import resolve_device
from mutune.training.execution import SLOW, TIMED, WARM_UP, time_steps, ways
from mutune.training.price import Timing
from mutune.training.run import Run

GAIN = 1.25  # how many times as fast a way has to be as the plain one, whose rounding it does not share
COMPILE_WORTH = 1200.0  # worker-seconds of a study, from which on compiling is tried
COMPILE_GAIN = 2.0  # how many times its cost compiling has to save
#: Values at which a run does not diverge while it is timed; how long a step takes does not hang on them.
CALM = {"learning_rate": 1e-6, "init_std": 0.02, "embedding_multiplier": 1.0, "output_multiplier": 1.0}
TOKENS = 1024  # of a step that is measured on a CPU


def measure(spec: RunSpec, device: str, steps: float, share: int) -> tuple[Timing, str]:
    """The way of computing that pays, per whole step, and how the others compared.

    Args:
        steps: of the whole study, at the shape of `spec`.
        share: of the cores, a run's.
    """
    where = resolve_device(device)
    stage = spec.stages[0]
    few = max(1, TOKENS // stage.context_length) if where.type == "cpu" else stage.batch_sequences
    enough = max(stage.num_steps, WARM_UP + TIMED + 1)
    small = replace(stage, batch_sequences=min(stage.batch_sequences, few), num_steps=enough)
    scale = stage.batch_sequences / small.batch_sequences

    calm = replace(spec, stages=(small,), hyperparameters=replace(spec.hyperparameters, **CALM))

    def steps_of(loop: LoopConfig) -> Iterator[Any]:
        while True:  # a run that diverges all the same begins anew
            yield from Run(replace(calm, loop=loop), where).steps()

    def timed(loop: LoopConfig, give_up: float = math.inf) -> Timing:
        timing = time_steps(loop, steps_of, where, give_up / scale)
        return replace(timing, seconds=timing.seconds * scale)

    plain_way, *others = ways(replace(spec.loop, threads=spec.loop.threads or 1), where)
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
        by_rule = "explicit" if where.type == "cpu" else best.loop.attention  # the first is what compiling fuses
        attention = spec.loop.attention or by_rule
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
