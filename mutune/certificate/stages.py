"""The stages of a target, as they are asked for: in steps, or in shares of its tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction

from mutune.compose import later
from mutune.data.config import MixedData
from mutune.errors import require, require_number
from mutune.training.config import StageConfig

TOLERANCE = Fraction(1, 10**9)  # of the sum of shares, for those that no decimal writes exactly


@dataclass(frozen=True)
class TargetStage:
    """A stretch of a target's run at one context length.

    Attributes:
        context_length: tokens per sequence.
        batch_sequences: sequences per step, over all processes.
        num_steps: optimizer steps; null follows from `share`, and without one is 240.
        share: of `target.tokens`, instead of steps; the shares of all stages make 1.
        end_ratio: this stage's own end of the schedule, over the peak; null takes the schedule's.
        data: corpora that its windows are drawn from, each with source, path and weight; null reads the target's data.
    """

    context_length: int = StageConfig.context_length
    batch_sequences: int = StageConfig.batch_sequences
    num_steps: int | None = None
    share: float | None = later()
    end_ratio: float | None = None
    data: tuple[MixedData, ...] | None = later()

    def __post_init__(self) -> None:
        require(
            self.share is None or self.num_steps is None,
            f"stages.share={self.share} and num_steps={self.num_steps} both say how long a stage is; leave one of them "
            "out, for example num_steps.",
        )
        if self.share is not None:
            require_number("stages.share", self.share, above=0, at_most=1, example=0.25)
        self.of_steps(StageConfig.num_steps if self.num_steps is None else self.num_steps)  # refuses what no run has

    def of_steps(self, num_steps: int) -> StageConfig:
        """The stage of a run."""
        return StageConfig(self.context_length, self.batch_sequences, num_steps, self.end_ratio, self.data)

    @classmethod
    def of(cls, stage: StageConfig) -> "TargetStage":
        """A run's stage, as a target asks for it."""
        return cls(**{field.name: getattr(stage, field.name) for field in fields(stage)})


def resolve(stages: Sequence[TargetStage], tokens: int | None) -> tuple[StageConfig, ...]:
    """The stages with whole steps.

    Each ends at the step nearest to where its share of `tokens` does (half a step counts up), whatever the stages
    before it took, so that roundings do not add up and the run is within half a step of `tokens`.

    Raises:
        Refusal: some stages have a share and some have none, the shares do not make 1, a share is less than a step,
            or there are shares and no `tokens`, or the other way round.
    """
    shares = [Fraction(str(stage.share)) for stage in stages if stage.share is not None]
    require(
        tokens is None or bool(shares) or not stages,
        f"target.tokens={tokens} is shared out by stages.share, and no stage has one; for example "
        f"target.tokens=null, or share: {1 / max(1, len(stages)):g} in each stage.",
    )
    if not shares:
        return tuple(s.of_steps(StageConfig.num_steps if s.num_steps is None else s.num_steps) for s in stages)
    _check_shares(shares, len(stages), tokens)
    assert tokens is not None, "shares were just checked"
    resolved, done, so_far = list[StageConfig](), 0, Fraction(0)
    for number, (stage, share) in enumerate(zip(stages, shares, strict=True)):
        per_step, so_far = stage.context_length * stage.batch_sequences, so_far + share
        end = tokens if number == len(stages) - 1 else tokens * so_far
        num_steps = math.floor((end - done) / Fraction(per_step) + Fraction(1, 2))
        require(
            num_steps > 0,
            f"target.stages[{number}].share={stage.share} of target.tokens={tokens} is less than a step of "
            f"{per_step:,} tokens; for example target.tokens={math.ceil(per_step / share)}.",
        )
        resolved.append(stage.of_steps(num_steps))
        done += resolved[-1].tokens
    return tuple(resolved)


def _check_shares(shares: Sequence[Fraction], num_stages: int, tokens: int | None) -> None:
    written, total = ", ".join(f"{float(share):g}" for share in shares), sum(shares, Fraction(0))
    require(
        len(shares) == num_stages,
        f"target.stages has share in {len(shares)} of its {num_stages} stages; give each a share, or each num_steps.",
    )
    require(
        abs(total - 1) <= TOLERANCE,
        f"target.stages has the shares {written}, which make {float(total):g} and not 1; for example "
        f"share: {1 / num_stages:.4g} in each.",
    )
    require(
        tokens is not None,
        f"target.tokens is missing, of which target.stages has the shares {written}; for example "
        "target.tokens=20000000000.",
    )
