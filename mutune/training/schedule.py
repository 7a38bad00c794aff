"""Schedules: multiplicative functions of the step, shared by every parameter group.

A scheduler that sets absolute rates erases the per-tensor ratios that a parametrization is made of; these cannot.
Step s means the rate used by the update that makes s into s + 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mutune.compose import later
from mutune.errors import require, require_number

KINDS = ("linear", "cosine", "wsd", "constant")
TRUNKS = ("wsd", "constant")  # which stay at the peak, so that a decay may leave them


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up from 0, then `kind`; every length is a ratio of the run unless it is given in steps.

    Attributes:
        kind: `linear` or `cosine` decay to `end_ratio`, `wsd` (warm-up, stable, linear decay), `constant`.
        warmup_fraction: share of the run spent warming up.
        warmup_steps: absolute warm-up; overrides the fraction (BTLM: 95).
        end_ratio: rate at the end over the peak (BTLM: 0.0085; 0 is arXiv:2502.15938).
        decay_fraction: share of the run spent decaying; `wsd` only.
        decay_steps: absolute decay, over the last steps of the run; overrides the fraction; `wsd` only.
    """

    kind: str = "linear"
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None
    end_ratio: float = 0.0
    decay_fraction: float = 0.2
    decay_steps: int | None = later()

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"schedule.kind={self.kind} is unknown; known kinds: {', '.join(KINDS)}.")
        for name, example in (("warmup_fraction", 0.05), ("end_ratio", 0.0), ("decay_fraction", 0.2)):
            require_number(f"schedule.{name}", getattr(self, name), at_least=0.0, at_most=1.0, example=example)
        if self.warmup_steps is not None:
            require_number("schedule.warmup_steps", self.warmup_steps, at_least=0, example=10, whole=True)
        if self.decay_steps is not None:
            require_number("schedule.decay_steps", self.decay_steps, at_least=1, example=50, whole=True)
            require(
                self.kind == "wsd",
                f"schedule.decay_steps={self.decay_steps} is for schedule.kind=wsd, and this is {self.kind}; for "
                "example schedule.kind=wsd.",
            )
        elif self.kind == "wsd":
            shares = self.decay_fraction + (self.warmup_fraction if self.warmup_steps is None else 0.0)
            require(
                self.decay_fraction > 0 and shares <= 1,
                f"schedule.decay_fraction={self.decay_fraction} must be above 0 and leave room for "
                f"schedule.warmup_fraction={self.warmup_fraction}; for example schedule.decay_fraction=0.2.",
            )

    def warmup(self, num_steps: int) -> int:
        """Warm-up length in steps of a run of `num_steps`."""
        steps = round(self.warmup_fraction * num_steps) if self.warmup_steps is None else self.warmup_steps
        name, works = ("warmup_fraction", 0.05) if self.warmup_steps is None else ("warmup_steps", num_steps // 20)
        require(
            steps < num_steps,
            f"schedule.{name}={getattr(self, name)} must be shorter than the run of {num_steps} steps; "
            f"for example schedule.{name}={works}.",
        )
        self._check_room(steps, num_steps)
        return steps

    def _check_room(self, warmup: int, num_steps: int) -> None:
        """Refuse a decay that would begin during warm-up."""
        if self.kind != "wsd":
            return
        by_steps, left = self.decay_steps is not None, num_steps - warmup
        name, works = ("decay_steps", f"{left // 2}") if by_steps else ("decay_fraction", f"{left / num_steps / 2:.3g}")
        decay = self.decay_steps if self.decay_steps is not None else self.decay_fraction * num_steps
        require(
            0 < decay < left + 1,  # one for rounding, or to be as long as all that is left
            f"schedule.{name}={getattr(self, name)} leaves no room for the warm-up of {warmup} of {num_steps} "
            f"steps; for example schedule.{name}={works}.",
        )

    def decay_share(self, num_steps: int) -> float:
        """Share of a run of `num_steps` in which `wsd` decays."""
        return self.decay_fraction if self.decay_steps is None else self.decay_steps / num_steps

    def decay_words(self, num_steps: int) -> str:
        """Where in a run of `num_steps` the rate falls, in words."""
        if self.kind == "constant":
            return "constant, no decay"
        if self.kind != "wsd":
            return f"{self.kind} decay from warm-up to end"
        steps = round(self.decay_share(num_steps) * num_steps)
        return f"wsd, decay over the last {steps:,} steps"


def multiplier(
    schedule: ScheduleConfig, num_steps: int, stage_ends: Sequence[tuple[int, float | None]] = ()
) -> Callable[[int], float]:
    """The schedule as a function step → rate / peak rate.

    Args:
        schedule: its settings.
        num_steps: steps of the whole run, all stages together.
        stage_ends: per stage (last step + 1, its own end ratio or None for the schedule's). The curve of a stage
            still spans the whole run, as in BTLM's two configurations.
    """
    warmup = schedule.warmup(num_steps)

    def end_ratio(step: int) -> float:
        own = next((ratio for end, ratio in stage_ends if step < end), stage_ends[-1][1] if stage_ends else None)
        return schedule.end_ratio if own is None else own

    def at(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 1.0 + (end_ratio(step) - 1.0) * _decay_share(schedule, step, warmup, num_steps)

    return at


def branch_schedule(
    trunk: ScheduleConfig, trunk_steps: int, step: int, decay_steps: int, end_ratio: float | None = None
) -> ScheduleConfig:
    """The schedule of a run of `step` + `decay_steps` steps that leaves a trunk after its first `step` and decays.

    Its first `step` rates are the trunk's, bit for bit.

    Args:
        trunk: `constant`, or `wsd`, whose decay begins at `step` or later.
        trunk_steps: steps of the trunk's whole run.
        end_ratio: rate at the end over the peak; None takes the trunk's.

    Raises:
        Refusal: the trunk's rate is not at its peak there.
    """
    require(
        trunk.kind in TRUNKS,
        f"schedule.kind={trunk.kind} falls from the end of its warm-up on, so that no branch can leave it; a trunk has "
        "schedule.kind=wsd or constant.",
    )
    warmup, at = trunk.warmup(trunk_steps), multiplier(trunk, trunk_steps)
    require(
        warmup <= step <= trunk_steps and (step == warmup or at(step - 1) == 1.0),
        f"step {step} of the trunk is not on its plateau, which begins at step {warmup}"
        f"{'' if step <= warmup else ' and ends where its decay begins'}; branch from a step in between.",
    )
    ratio = trunk.end_ratio if end_ratio is None else end_ratio
    branch = replace(trunk, kind="wsd", warmup_steps=warmup, end_ratio=ratio, decay_steps=decay_steps)
    branch.warmup(step + decay_steps)
    return branch


def _decay_share(schedule: ScheduleConfig, step: int, warmup: int, num_steps: int) -> float:
    """How much of the way from the peak to the end ratio is done, in [0, 1], at a `step` after warm-up."""
    if schedule.kind == "wsd" and schedule.decay_steps is not None:
        return min(1.0, max(0, step - (num_steps - schedule.decay_steps)) / schedule.decay_steps)
    progress = min(1.0, (step - warmup) / (num_steps - warmup))
    if schedule.kind == "linear":
        return progress
    if schedule.kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        decay = min(1.0, schedule.decay_fraction / ((num_steps - warmup) / num_steps))
        return max(0.0, (progress - (1.0 - decay)) / decay)
    return 0.0
