"""Which rungs a ladder has: the study's run with one axis varied at a time. No torch."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from mutune.certificate.config import AXIS_KEYS, BudgetConfig, LadderConfig
from mutune.certificate.drift import MAX_DOUBLINGS, SCATTER, SLOPE
from mutune.certificate.points import AXES, doublings
from mutune.errors import Refusal, require
from mutune.training.config import RunSpec, total_tokens

OPTIMUM = 0.15  # sd of a rung's optimum that is expected of its first runs, octaves
LEAST_GAIN = 0.03  # share of the target's variance that a rung has to take away
FIRST_SHARE = 0.9  # of the budget, for the first runs of all rungs; the rest goes where it tells most


def place(spec: RunSpec) -> dict[str, float]:
    """Where a run stands on every axis of a ladder."""
    batch = max(stage.tokens_per_step for stage in spec.stages)
    return {"width": spec.model.width, "depth": spec.model.depth, "tokens": total_tokens(spec.stages), "batch": batch}


def places(specs: Sequence[RunSpec]) -> pd.DataFrame:
    """Where runs stand: one row each, the columns of `AXES`."""
    return pd.DataFrame([place(spec) for spec in specs])[list(AXES)]


def rung_specs(
    proxy: RunSpec, target: RunSpec, ladder: LadderConfig, limits: BudgetConfig, share: Callable[[RunSpec], float]
) -> list[RunSpec]:
    """The runs that a ladder's rungs are, the proxy first.

    Args:
        share: what a rung's first runs cost, as a share of the budget.

    Raises:
        Refusal: a listed rung that the study's run cannot be, or a ladder of the proxy alone.
    """
    listed = {axis: ladder.rungs(axis) for axis in ladder.chosen_axes}
    rungs = [proxy, *(at(proxy, axis, value) for axis, values in listed.items() for value in sorted(values or []))]
    free = [axis for axis, values in listed.items() if values is None]
    steps = {axis: _towards(proxy, target, axis) for axis in free}
    if len(rungs) == 1 and not any(steps.values()) and free:
        rungs += _twice(
            proxy, free[0]
        )  # the target is no further than the proxy: one rung shows that the optimum stays
    found = list({tuple(place(spec).values()): spec for spec in _chosen(rungs, steps, target, share)}.values())
    if len(found) == 1:
        raise _too_few(proxy, ladder, limits, steps, share)
    return found


def at(proxy: RunSpec, axis: str, value: float) -> RunSpec:
    """The proxy's run at another width or depth, or with `value` times its tokens or batch; ratios are kept.

    Raises:
        Refusal: there is no such run.
    """
    key = f"ladder.{AXIS_KEYS[axis]}={value:g}"
    stage = proxy.stages[0]
    if axis == "width":
        head, width = proxy.model.size_per_head, int(value)
        require(
            width % head == 0,
            f"{key}: the study's head size of {head} does not divide {width}; for example "
            f"ladder.widths=[{2 * proxy.model.width},{4 * proxy.model.width}].",
        )
        return replace(proxy, model=proxy.model.at_width(width))
    if axis == "depth":
        return replace(proxy, model=replace(proxy.model, depth=int(value)))
    if axis == "tokens":
        steps = round(stage.num_steps * value)
        require(
            steps > 1, f"{key} leaves {steps} of the study's {stage.num_steps} steps; for example ladder.tokens=[2]."
        )
        return _of_steps(proxy, steps)
    batch, left = stage.batch_sequences * value, stage.num_steps / value
    require(
        batch == int(batch) >= 1 and left == int(left) > 1,
        f"{key}: the study's {stage.batch_sequences} sequences and {stage.num_steps} steps give no whole batch and "
        f"number of steps; for example ladder.batches=[{_whole_multiple(stage.num_steps)}].",
    )
    wide = replace(proxy, stages=(replace(stage, batch_sequences=int(batch)),))
    return _of_steps(wide, int(left))


def _of_steps(spec: RunSpec, num_steps: int) -> RunSpec:
    """The same run with another number of steps; a warm-up or a decay in steps keeps its share."""
    schedule, before = spec.schedule, spec.num_steps
    if schedule.warmup_steps is not None:
        schedule = replace(schedule, warmup_steps=round(schedule.warmup_steps * num_steps / before))
    if schedule.decay_steps is not None:
        schedule = replace(schedule, decay_steps=max(1, round(schedule.decay_steps * num_steps / before)))
    return replace(spec, schedule=schedule, stages=(replace(spec.stages[0], num_steps=num_steps),))


def _whole_multiple(num_steps: int) -> int:
    return next((factor for factor in range(2, num_steps // 2 + 1) if num_steps % factor == 0), 1)


def _towards(proxy: RunSpec, target: RunSpec, axis: str) -> list[list[RunSpec]]:
    """The rungs that may be chosen on an axis, nearest first in each direction: doublings to the target.

    Half of the tokens is cheap, and so is one more direction.
    """
    ratio = math.log2(place(target)[axis] / place(proxy)[axis])
    sign = 1 if ratio > 0 else -1
    count = max(1, round(abs(ratio))) if abs(ratio) > 0.1 else 0
    directions = [[2.0 ** (sign * k) for k in range(1, count + 1)]]
    if axis == "tokens" and ratio > 0 and count:
        directions.append([0.5])
    own = {"width": proxy.model.width, "depth": proxy.model.depth}.get(axis, 1)
    found = [_possible(proxy, axis, [own * factor for factor in factors]) for factors in directions]
    return [specs for specs in found if specs]


def _possible(proxy: RunSpec, axis: str, values: list[float]) -> list[RunSpec]:
    """The runs at these values, up to the first that there is none of."""
    specs = []
    for value in values:
        if axis in ("width", "depth") and value != int(value):
            break
        try:
            specs.append(at(proxy, axis, value))
        except Refusal:
            break
    return specs


def _twice(proxy: RunSpec, axis: str) -> list[RunSpec]:
    own = {"width": proxy.model.width, "depth": proxy.model.depth}.get(axis, 1)
    return _possible(proxy, axis, [2 * own])


def _chosen(
    rungs: list[RunSpec], steps: dict[str, list[list[RunSpec]]], target: RunSpec, share: Callable[[RunSpec], float]
) -> list[RunSpec]:
    """`rungs`; then of every axis what comes within reach of the target, where that can be paid for; then, one after
    another, the next step of an axis that narrows the target's optimum most for its cost.
    """
    left = FIRST_SHARE - sum(share(spec) for spec in rungs)
    goal, queues = place(target), []
    for axis, directions in steps.items():
        needed = _within_reach(axis, directions[0], rungs[0], goal) if directions else []
        if sum(map(share, needed)) > left:
            needed = []
        rungs, left = [*rungs, *needed], left - sum(map(share, needed))
        queues += [queue[len(needed) :] if queue is directions[0] else list(queue) for queue in directions]
    while queues := [queue for queue in queues if queue]:
        now = _variance(rungs, goal)
        gains = [1 - _variance([*rungs, queue[0]], goal) / now for queue in queues]
        worth = [
            gain / share(queue[0]) if share(queue[0]) <= left and gain >= LEAST_GAIN else 0.0
            for gain, queue in zip(gains, queues, strict=True)
        ]
        best = int(np.argmax(worth))
        if worth[best] == 0:
            break
        left -= share(queues[best][0])
        rungs = [*rungs, queues[best].pop(0)]
    return rungs


def _within_reach(axis: str, queue: list[RunSpec], nearest: RunSpec, goal: dict[str, float]) -> list[RunSpec]:
    """The first of `queue` up to the one from which the target is no further than verdicts are calibrated, nor than the
    ladder is long; none where it is not further from `nearest`, or no rung comes so far.
    """

    def is_far(spec: RunSpec) -> bool:
        length = abs(math.log2(place(spec)[axis] / place(nearest)[axis])) or MAX_DOUBLINGS  # of a ladder up to it
        return abs(math.log2(goal[axis] / place(spec)[axis])) > min(MAX_DOUBLINGS, length) + 1e-6

    near = [i for i, spec in enumerate(queue) if not is_far(spec)]
    return queue[: near[0] + 1] if near and is_far(nearest) else []


def _variance(rungs: list[RunSpec], goal: dict[str, float]) -> float:
    """Of the target's optimum on a straight line through the rungs' optima, octaves²."""
    lines = np.hstack([np.ones((len(rungs), 1)), doublings(places(rungs), goal)])
    prior = np.diag([1e-4, *[SLOPE**-2] * len(AXES)])
    return float(np.linalg.inv(lines.T @ lines / (OPTIMUM**2 + SCATTER**2) + prior)[0, 0])


def _too_few(
    proxy: RunSpec,
    ladder: LadderConfig,
    limits: BudgetConfig,
    steps: dict[str, list[list[RunSpec]]],
    share: Callable[[RunSpec], float],
) -> Refusal:
    """Why the base is alone, and what would give it company."""
    width = proxy.model.width
    works = f"for example ladder.widths=[{2 * width},{4 * width}]"
    nearest = [queue[0] for queues in steps.values() for queue in queues if queue]
    given = {key: value for key in ("budget_fraction", "budget_minutes") if (value := getattr(limits, key)) is not None}
    if nearest and given:
        need = 1.5 * (share(proxy) + min(map(share, nearest))) / FIRST_SHARE  # of the tighter one, which is not known
        keys = " and ".join(f"{key}={value:g}" for key, value in given.items())
        works = " ".join(f"{key}={need * value:.2g}" for key, value in given.items())
        return Refusal(f"{keys} has no room for the first runs of two rungs; for example {works}.")
    listed = [axis for axis in ladder.chosen_axes if ladder.rungs(axis)]
    if listed == ["width"]:
        return Refusal(f"ladder.widths={ladder.widths} holds only the study's own width; {works}.")
    if listed:
        return Refusal(
            f"ladder.{AXIS_KEYS[listed[0]]}={ladder.rungs(listed[0])} holds only the study's own run; {works}."
        )
    return Refusal(f"ladder.axes={ladder.chosen_axes} has no rung that the study's run can be; {works}.")


def rung_name(spec: RunSpec, base: RunSpec) -> str:
    """`w64` for a width, and what else differs from the base: `w32_d8`, `w32_t245760`, `w32_b1024`."""
    here, there = place(spec), place(base)
    return f"w{spec.model.width}" + "".join(
        f"_{axis[0]}{here[axis]:.0f}" for axis in AXES if axis != "width" and here[axis] != there[axis]
    )
