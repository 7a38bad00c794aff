"""What a run would cost, without allocating anything: parameters, steps, tokens, FLOPs and memory; and what a step was
measured to take.
"""

from dataclasses import dataclass

from mutune.model.shape import tensor_specs
from mutune.scaling.arithmetic import (
    activation_bytes,
    matmul_parameter_count,
    parameter_count,
    state_bytes,
    train_flops_per_token,
)
from mutune.training.config import LoopConfig, RunSpec, StageConfig, stage_ends
from mutune.training.schedule import multiplier


@dataclass(frozen=True)
class StagePrice:
    """One stage: tokens it predicts, and its training FLOPs."""

    tokens: int
    flops: int


@dataclass(frozen=True)
class Price:
    """A whole run.

    Attributes:
        parameters: trainable parameters, the tied table once.
        tensors: distinct trainable tensors.
        stages: tokens and FLOPs of each stage.
        state_bytes: weights, gradients and Adam's moments, fp32, on one device.
        activation_bytes: estimate of what one forward pass keeps, fp32, at the stage that needs most.
    """

    parameters: int
    tensors: int
    stages: list[StagePrice]
    state_bytes: int
    activation_bytes: int

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        """Training FLOPs of all stages, full attention counted."""
        return sum(stage.flops for stage in self.stages)

    @property
    def bytes(self) -> int:
        """Memory of one device that trains alone."""
        return self.state_bytes + self.activation_bytes


@dataclass(frozen=True)
class Timing:
    """What one way of computing costs.

    Attributes:
        loop: the way. seconds: of a step, CPU seconds where it has one thread. compiling: seconds before its steps are
            as fast as that.
        busy: share of the time in which a GPU computes; 1 on a CPU.
        memory: bytes that a GPU holds at most; 0 on a CPU.
    """

    loop: LoopConfig
    seconds: float
    compiling: float
    busy: float = 1.0
    memory: int = 0


def price(spec: RunSpec) -> Price:
    """Count a run's parameters, tokens, FLOPs and memory."""
    shape, vocab = spec.model, spec.tokenizer.num_ids
    specs = tensor_specs(shape, vocab)
    matrices = matmul_parameter_count(specs)

    def flops(stage: StageConfig) -> int:
        per_token = train_flops_per_token(
            matrices, vocab_size=vocab, width=shape.width, depth=shape.depth, context_length=stage.context_length
        )
        return per_token * stage.tokens

    def activations(stage: StageConfig) -> int:
        return activation_bytes(
            sequences=min(spec.loop.micro_sequences or stage.batch_sequences, stage.batch_sequences),
            context_length=stage.context_length,
            width=shape.width,
            ffn_width=shape.ffn,
            depth=shape.depth,
            heads=shape.heads,
            vocab_size=vocab,
        )

    parameters = parameter_count(specs)
    return Price(
        parameters=parameters,
        tensors=len(specs),
        stages=[StagePrice(stage.tokens, flops(stage)) for stage in spec.stages],
        state_bytes=state_bytes(parameters),
        activation_bytes=max(activations(stage) for stage in spec.stages),
    )


def price_table(name: str, spec: RunSpec) -> str:
    """The price in words and numbers, with the schedule at its turning points."""
    cost, shape = price(spec), spec.model
    lines = [
        f"target     {name}: width {shape.width}, depth {shape.depth}, {shape.heads} heads of {shape.size_per_head}, "
        f"FFN {shape.ffn}, vocabulary {spec.tokenizer.num_ids:,}",
        f"parameters {cost.parameters:,} in {cost.tensors} tensors",
    ]
    for number, (stage, part) in enumerate(zip(spec.stages, cost.stages, strict=True), 1):
        lines.append(
            f"stage {number}    context {stage.context_length:,} × {stage.batch_sequences:,} sequences = "
            f"{stage.tokens_per_step:,} tokens per step; {stage.num_steps:,} steps, {part.tokens:,} tokens, "
            f"{part.flops:.3e} FLOPs{_share(part.tokens, cost.tokens)}{_mixture(stage)}"
        )
    lines += [
        f"total      {spec.num_steps:,} steps, {cost.tokens:,} tokens, {cost.flops:.3e} FLOPs",
        f"memory     {_gib(cost.state_bytes)} for weights, gradients and Adam's moments (fp32, one device) and about "
        f"{_gib(cost.activation_bytes)} of activations per forward pass",
        *_schedule_lines(spec),
    ]
    return "\n".join(lines)


def _share(tokens: int, total: int) -> str:
    """A stage's share of a run's tokens, where it is not all of them."""
    return "" if tokens == total else f"; {tokens / total:.4g} of all tokens"


def _mixture(stage: StageConfig) -> str:
    """What a stage's windows are drawn from, where that is not the run's data alone."""
    if stage.data is None:
        return ""
    total = sum(each.weight for each in stage.data)
    return "; of " + ", ".join(f"{each.path or each.source} {each.weight / total:.4g}" for each in stage.data)


def _schedule_lines(spec: RunSpec) -> list[str]:
    """Base and hidden-matrix independent: the base rate at the start, after warm-up, at each stage's end."""
    rate = multiplier(spec.schedule, spec.num_steps, stage_ends(spec.stages))
    warmup = spec.schedule.warmup(spec.num_steps)
    steps = sorted({0, warmup, *(end for end, _ in stage_ends(spec.stages))})
    peak = spec.hyperparameters.learning_rate
    rates = ", ".join(f"step {step:,}: {peak * rate(step):.5g}" for step in steps)
    return [f"schedule   {spec.schedule.kind}, warm-up {warmup:,} steps; base learning rate at {rates}"]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
