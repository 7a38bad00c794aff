"""What the guard can say: its settings, and a table with every alarm, what it means, and what to do. No torch."""

import json
from dataclasses import dataclass
from typing import Any

from mutune.errors import require, require_number

GROWTH = "growth"  # where an alarm is of what is below its bound, and on the way there
POLICIES = ("warn", "pause", "rollback")
WARN, PAUSE, ROLLBACK = POLICIES


@dataclass(frozen=True)
class GuardConfig:
    """What is watched during a target's training, and what an alarm does.

    A deviation σ is that of the last `window` steps, from the median step-to-step difference, so that neither a
    falling loss nor an outlier widens it. What one odd sequence of a small batch can do is no alarm.

    Attributes:
        policy: `warn` notes an alarm and goes on; `pause` saves and stops at a grave one; `rollback` goes back to the
            last checkpoint before it and skips the batches that led to it, where batches can be the cause, else pauses.
        every: steps between probes of weights, optimizer and logits, each with an audit; 0 probes never.
        window: steps that say what is usual.
        after: steps, of a stage and of a resumed run that had no guard, before what is usual is known.
        loss_spike: deviations σ by which one loss may lie above the median.
        loss_level: sum of deviations beyond 1 σ, each counted up to 4 σ, of losses in a row (a CUSUM).
        grad_spike: times by which one gradient norm may lie above the median, and as many σ of its logarithm.
        grad_growth: times by which the median gradient norm may lie above the lowest median of the stage.
        seen_tolerance: relative error of the squared gradients in Adam's second moment, against the clipped norms.
        update_jump: times by which a role's update-to-weight ratio, over the rate, may lie above its median.
        moved: times that Adam's updates can account for, by which a tensor may have moved between two probes.
        attention_logit: largest attention logit, before positions are added.
        output_logit: largest output logit, either sign.
        logit_growth: times by which either may have grown over the last `window` steps, once above a quarter of its
            bound.
        eps_share: share of a role's elements whose second moment may lie below Adam's ε.
        rank_spike: deviations σ by which the farthest rank's loss may lie from the others, beyond its own median.
        chance: of the same rank being the highest so many times in a row, below which it is no chance.
        skip_before: steps before the first suspicious one that a rollback skips too; it skips up to the alarm, and
            twice as many batches with each further rollback near by.
        max_rollbacks: rollbacks within 1,000 steps before the run is paused instead: batches are then not the cause.
    """

    policy: str = WARN
    every: int = 10
    window: int = 64
    after: int = 32
    loss_spike: float = 8.0
    loss_level: float = 10.0
    grad_spike: float = 5.0
    grad_growth: float = 10.0
    seen_tolerance: float = 0.01
    update_jump: float = 3.0
    moved: float = 2.0
    attention_logit: float = 100.0
    output_logit: float = 100.0
    logit_growth: float = 2.0
    eps_share: float = 0.5
    rank_spike: float = 10.0
    chance: float = 1e-8
    skip_before: int = 2
    max_rollbacks: int = 3

    def __post_init__(self) -> None:
        require(
            self.policy in POLICIES,
            f"guard.policy={self.policy} is unknown; known: {', '.join(POLICIES)}.",
        )
        require_number("guard.every", self.every, at_least=0, example=10, whole=True)
        require_number("guard.window", self.window, at_least=16, at_most=4096, example=64, whole=True)
        require_number("guard.after", self.after, at_least=8, example=16, whole=True)
        require(
            self.after <= self.window,
            f"guard.after={self.after} must be at most guard.window={self.window}; for example guard.after=16.",
        )
        for name in ("skip_before", "max_rollbacks"):
            require_number(f"guard.{name}", getattr(self, name), at_least=0, example=2, whole=True)
        for name in ("loss_spike", "loss_level", "attention_logit", "output_logit", "rank_spike"):
            require_number(f"guard.{name}", getattr(self, name), above=0.0, example=getattr(GuardConfig, name))
        for name in ("grad_spike", "grad_growth", "update_jump", "moved", "logit_growth"):
            require_number(f"guard.{name}", getattr(self, name), above=1.0, example=getattr(GuardConfig, name))
        for name in ("seen_tolerance", "eps_share", "chance"):
            require_number(f"guard.{name}", getattr(self, name), above=0.0, below=1.0, example=0.01)


@dataclass(frozen=True)
class Kind:
    """One alarm: what it says, and what to do.

    Attributes:
        means: what it usually means.
        advice: what to look at, and which key to change.
        calls_for: the strongest policy that it calls for: `warn` where a run may go on, `rollback` where other batches
            may cure it, `pause` where they cannot.
    """

    means: str
    advice: str
    calls_for: str


KINDS: dict[str, Kind] = {
    "not_finite": Kind(
        "the loss or the gradient is NaN or infinite, so that an update would destroy the weights",
        "where a rank is named, look at its host and GPU first (memory errors, temperature); else at the batch and at "
        "the attention and output logits before it; if it comes back with other batches, lower "
        "hyperparameters.learning_rate or target.loop.clip_norm",
        ROLLBACK,
    ),
    "diverged": Kind(
        "the loss is above target.loop.divergence_factor times that of a model that knows nothing, which ends the run",
        "read the text of the batch, and look at the losses before it: one alone is a batch, a rise is a rate that is "
        "too high; guard.policy=rollback leaves the batch out",
        ROLLBACK,
    ),
    "loss_spike": Kind(
        "one batch is far from the others (repeats, another language, damaged text), or one update was too large",
        "read the text of the batch; a spike that is over after a few steps costs nothing, while frequent ones ask for "
        "a smaller hyperparameters.beta2, a longer target.schedule.warmup_steps or a lower target.loop.clip_norm",
        WARN,
    ),
    "loss_level": Kind(
        "the loss has risen and stays up: updates too large, other data, or weights that are no longer the run's",
        "look at the gradient norm, the rate and the logits just before the first step; guard.policy=rollback goes "
        "back and skips the batches; if it comes back with other batches, lower hyperparameters.learning_rate",
        ROLLBACK,
    ),
    "outside_band": Kind(
        "the smoothed loss has left the band that the ladder predicts: above it, the transferred values do not hold "
        "here or something is broken; below it, text is seen twice or leaks",
        "compare the plan, the data and the schedule with the ladder's (`differences` in certificate.json); above the "
        "band from the start, make a ladder closer to the target",
        PAUSE,
    ),
    "grad_spike": Kind(
        "one gradient is far larger than the others; clipping bounds what it does, not where it points",
        "harmless alone; with a loss spike read the batch's text; frequent ones ask for a lower "
        "target.loop.clip_norm or hyperparameters.beta2",
        WARN,
    ),
    "grad_growth": Kind(
        "gradients grow steadily, which comes before a divergence, often with growing logits",
        "look at attention_logit_max and output_logit_max; lower hyperparameters.learning_rate, or raise "
        "hyperparameters.weight_decay",
        WARN,
    ),
    "gradient_seen": Kind(
        "Adam's second moment does not follow from the gradient norms after clipping: larger, the gradient is not "
        "clipped or is scaled afterwards; smaller, it does not reach all weights",
        "hold target.loop.clip_norm and whatever touches gradients between the backward pass and the update against "
        "the loop",
        PAUSE,
    ),
    "update_ratio": Kind(
        "a role's weights are updated by much more than the schedule explains: another rate, lost moments, or weights "
        "that shrank",
        "look at the groups' rates and at what changed at this step; a resumed run needs its optimizer's state",
        PAUSE,
    ),
    "rewritten": Kind(
        "a tensor moved further than Adam can move it: something else wrote to it (a re-initialised layer, a "
        "checkpoint loaded half, a memory error)",
        "look at what loads or resets weights during the run, and at the device's memory errors; go back to a "
        "checkpoint from before it",
        PAUSE,
    ),
    "attention_logits": Kind(
        "attention logits grow: softmax turns into one-hot, gradients vanish and then explode (arXiv:2309.14322)",
        "lower hyperparameters.learning_rate or hyperparameters.attention_multiplier; a larger "
        "hyperparameters.weight_decay slows the growth",
        WARN,
    ),
    "output_logits": Kind(
        "output logits drift away from zero, which ends in divergence (arXiv:2309.14322)",
        "lower hyperparameters.learning_rate or hyperparameters.output_multiplier; a larger "
        "hyperparameters.weight_decay bounds the output matrix",
        WARN,
    ),
    "eps_dominates": Kind(
        "most of a role's gradients lie below Adam's ε, so that its updates shrink with them",
        "set hyperparameters.adam_eps below the root of Adam's second moment, for example 1e-12",
        WARN,
    ),
    "frozen": Kind(
        "a head or a tensor that should train gets no gradient since the last probe",
        "look for a detached or masked part of the model, a lost requires_grad, or a hook on its gradient",
        PAUSE,
    ),
    "dead_head": Kind(
        "a head's output is the same for every token, so that it carries nothing",
        "look at its attention logits, which may be saturated; lower hyperparameters.learning_rate, or go back to a "
        "checkpoint from before it",
        WARN,
    ),
    "dtype": Kind(
        "weights, optimizer or products of matrices are in another number format than before",
        "look at target.loop.dtype, and at what converts the model or its checkpoints",
        PAUSE,
    ),
    "data_changed": Kind(
        "the token file is not the one that the run began with",
        "restore the file, or begin another run; look at who prepares data into the cache folder",
        PAUSE,
    ),
    "rank_differs": Kind(
        "one rank's loss differs from the others by more than its batches explain: other weights, other data, or a "
        "device that computes wrongly",
        "compare that rank's weights and batch with the others'; exclude its host and resume from the last checkpoint",
        PAUSE,
    ),
}


@dataclass(frozen=True)
class Alarm:
    """One thing that went wrong.

    Attributes:
        name: a key of `KINDS`.
        step: the updates done when it was seen.
        value, bound: what was measured, and what would have been usual; or names, where nothing is measured.
        onset: the first suspicious step; the last good checkpoint is from before it.
        where: the role, tensor, head or rank that it is about; empty where it is the whole run.
    """

    name: str
    step: int
    value: float | str
    bound: float | str
    onset: int
    where: str = ""

    @property
    def means(self) -> str:
        """What it usually means."""
        return KINDS[self.name].means

    @property
    def advice(self) -> str:
        """What to look at, and which key to change."""
        return KINDS[self.name].advice

    @property
    def calls_for(self) -> str:
        """The strongest policy that it calls for."""
        return KINDS[self.name].calls_for

    def __str__(self) -> str:
        growing = self.where == GROWTH
        about = f" of {self.where}" if self.where and not growing else ""
        expected = "more than growth within guard.window allows:" if growing else self._expected
        return (
            f"step {self.step:,}: {self.name}{about} is {_shown(self.value)}, {expected} {_shown(self.bound)}; "
            f"{self.means}. Advice: {self.advice}."
        )

    @property
    def _expected(self) -> str:
        return "expected" if isinstance(self.bound, str) else "and the bound is"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a file of alarms; numbers that JSON lacks become words."""
        data = {
            "name": self.name,
            "step": self.step,
            "value": self.value,
            "bound": self.bound,
            "onset": self.onset,
            "where": self.where,
            "means": self.means,
            "advice": self.advice,
        }
        return {key: value if _is_json(value) else str(value) for key, value in data.items()}


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
