"""Schedules: multiplicative functions of the step, shared by every parameter group.

A scheduler that sets absolute rates erases the per-tensor ratios that a parametrization is made of; these cannot.
Step s means the rate used by the update that makes s into s + 1.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mutune.errors import require, require_number

KINDS = ("linear", "cosine", "wsd", "constant")


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warm-up from 0, then `kind`; every length is a ratio of the run unless `warmup_steps` says otherwise.

    Attributes:
        kind: `linear` or `cosine` decay to `end_ratio`, `wsd` (warm-up, stable, linear decay), `constant`.
        warmup_fraction: share of the run spent warming up.
        warmup_steps: absolute warm-up; overrides the fraction (BTLM: 95).
        end_ratio: rate at the end over the peak (BTLM: 0.0085; 0 is arXiv:2502.15938).
        decay_fraction: share of the run spent decaying; `wsd` only.
    """

    kind: str = "linear"
    warmup_fraction: float = 0.05
    warmup_steps: int | None = None
    end_ratio: float = 0.0
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        require(self.kind in KINDS, f"schedule.kind={self.kind} is unknown; known kinds: {', '.join(KINDS)}.")
        for name, example in (("warmup_fraction", 0.05), ("end_ratio", 0.0), ("decay_fraction", 0.2)):
            require_number(f"schedule.{name}", getattr(self, name), at_least=0.0, at_most=1.0, example=example)
        if self.warmup_steps is not None:
            require_number("schedule.warmup_steps", self.warmup_steps, at_least=0, example=10, whole=True)
        if self.kind == "wsd":
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
        require(
            self.kind != "wsd"
            or (
                self.decay_fraction > 0 and steps + self.decay_fraction * num_steps < num_steps + 1
            ),  # one for rounding
            f"schedule.decay_fraction={self.decay_fraction} leaves no room for the warm-up of {steps} of {num_steps} "
            f"steps; for example schedule.decay_fraction={(num_steps - steps) / num_steps / 2:.3g}.",
        )
        return steps


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
        progress = min(1.0, (step - warmup) / (num_steps - warmup))
        share = _decay_share(schedule, progress, (num_steps - warmup) / num_steps)
        return 1.0 + (end_ratio(step) - 1.0) * share

    return at


def _decay_share(schedule: ScheduleConfig, progress: float, share_after_warmup: float) -> float:
    """How much of the way from the peak to the end ratio is done, in [0, 1], at `progress` after warm-up."""
    if schedule.kind == "linear":
        return progress
    if schedule.kind == "cosine":
        return 0.5 * (1.0 - math.cos(math.pi * progress))
    if schedule.kind == "wsd":
        decay = min(1.0, schedule.decay_fraction / share_after_warmup)
        return max(0.0, (progress - (1.0 - decay)) / decay)
    return 0.0
