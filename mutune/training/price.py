"""What a run would cost, without allocating anything: parameters, steps, tokens, FLOPs and memory; and what a step was
measured to take.
"""

from dataclasses import dataclass

from mutune.model.shape import tensor_specs
from mutune.parametrization.plan import TensorSpec
from mutune.scaling.arithmetic import (
    forward_flops_per_token,
    matmul_parameter_count,
    parameter_count,
    state_bytes,
    train_flops_per_token,
)
from mutune.scaling.memory import DecoderSize, ForwardPass, Memory, Sharding, decoder_size, logits_at_once, peak_memory
from mutune.training.config import LoopConfig, ParallelConfig, RunSpec, StageConfig, micro_sequences, stage_ends
from mutune.training.schedule import multiplier

COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}
ALONE = ParallelConfig()


@dataclass(frozen=True)
class StagePrice:
    """One stage: tokens it predicts, their training FLOPs, those of what is computed again, and what a process holds at
    most.
    """

    tokens: int
    flops: int
    again: int
    memory: Memory

    @property
    def flops_per_token(self) -> float:
        """Forward and backward."""
        return self.flops / self.tokens


@dataclass(frozen=True)
class Price:
    """A whole run.

    Attributes:
        parameters: trainable parameters, the tied table once.
        tensors: distinct trainable tensors.
        stages: each stage by itself.
    """

    parameters: int
    tensors: int
    stages: list[StagePrice]

    @property
    def tokens(self) -> int:
        """Tokens of all stages."""
        return sum(stage.tokens for stage in self.stages)

    @property
    def flops(self) -> int:
        """Training FLOPs of all stages, full attention counted."""
        return sum(stage.flops for stage in self.stages)

    @property
    def memory(self) -> Memory:
        """What a process holds in the stage that needs most."""
        return max((stage.memory for stage in self.stages), key=lambda memory: memory.total)

    @property
    def bytes(self) -> int:
        """Memory of a process at its peak."""
        return self.memory.total


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


def price(
    spec: RunSpec,
    parallel: ParallelConfig = ALONE,
    processes: int = 1,
    device: str = "cpu",
    *,
    heap: bool = False,
) -> Price:
    """Count a run's parameters, tokens, FLOPs and the memory of each of its processes.

    Args:
        device: the kind of device whose memory is meant.
        heap: as `peak_memory` has it: whether the memory is that of a process on a CPU.
    """
    shape, vocab = spec.model, spec.tokenizer.num_ids
    specs = tensor_specs(shape, vocab)
    size, matrices = size_of(spec, specs), matmul_parameter_count(specs)
    sharding = Sharding(processes, parallel.replicas, parallel.reshard)

    def of(number: int, stage: StageConfig) -> StagePrice:
        of_model = {"width": shape.width, "depth": shape.depth, "context_length": stage.context_length}
        per_token = train_flops_per_token(matrices, vocab_size=vocab, **of_model)
        whole_blocks = parallel.activation_checkpointing == "full"  # selective leaves out what has FLOPs to speak of
        again = forward_flops_per_token(matrices, vocab_size=0, **of_model) if whole_blocks else 0
        memory = peak_memory(size, forward_pass(spec, number, parallel, processes, device), sharding, heap=heap)
        return StagePrice(stage.tokens, per_token * stage.tokens, again * stage.tokens, memory)

    return Price(parameter_count(specs), len(specs), [of(*each) for each in enumerate(spec.stages)])


def size_of(spec: RunSpec, specs: list[TensorSpec] | None = None) -> DecoderSize:
    """What of a run's model decides its memory."""
    shape = spec.model
    return decoder_size(
        tensor_specs(shape, spec.tokenizer.num_ids) if specs is None else specs,
        width=shape.width,
        ffn_width=shape.ffn,
        heads=shape.heads,
        depth=shape.depth,
        gated=shape.activation == "swiglu",
        alibi=shape.positions == "alibi",
    )


def forward_pass(
    spec: RunSpec, number: int, parallel: ParallelConfig, processes: int, device: str = "cpu"
) -> ForwardPass:
    """What one of so many processes computes at a time in the stage of that number, from 0."""
    loop, stage = spec.loop.settled(), spec.stages[number]
    share = sequences_of(stage, processes)
    at_once = min(micro_sequences(spec, parallel)[number] or share, share)
    return ForwardPass(
        sequences=at_once,
        context_length=stage.context_length,
        compute_bytes=COMPUTE_BYTES[str(loop.dtype)],
        attention=spec.loop.attention_on(device),
        recomputed=parallel.activation_checkpointing,
        accumulates=at_once < share,
        logits_at_once=logits_at_once(device),
    )


def sequences_of(stage: StageConfig, processes: int) -> int:
    """Sequences per step of the process that has most."""
    return -(-stage.batch_sequences // processes)


def price_table(name: str, spec: RunSpec, device: str | None = "cpu") -> str:
    """The price in words and numbers, with the schedule at its turning points.

    Args:
        device: the kind of device whose memory is told; None tells none.
    """
    cost, shape = price(spec, device=device or "cpu"), spec.model
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
    lines.append(f"total      {spec.num_steps:,} steps, {cost.tokens:,} tokens, {cost.flops:.3e} FLOPs")
    if device is not None:
        lines.append(
            f"memory     {_gib(state_bytes(cost.parameters))} for weights, gradients and Adam's moments (fp32, one "
            f"device) and at most about {_gib(cost.bytes)} with activations and what comes and goes"
        )
    lines += _schedule_lines(spec)
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
    """The base rate at the start, after warm-up, at each stage's end. Steps are those of a run's records: step n is
    the update that makes n of them, at the schedule's rate of n - 1.
    """
    rate = multiplier(spec.schedule, spec.num_steps, stage_ends(spec.stages))
    warmup = spec.schedule.warmup(spec.num_steps)
    steps = sorted({1, warmup + 1, *(end for end, _ in stage_ends(spec.stages))})
    peak, falls = spec.hyperparameters.learning_rate, spec.schedule.decay_words(spec.num_steps)
    rates = ", ".join(f"step {step:,}: {peak * rate(step - 1):.5g}" for step in steps)
    return [f"schedule   {falls}, warm-up {warmup:,} steps; base learning rate at {rates}"]


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
