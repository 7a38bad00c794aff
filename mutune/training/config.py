"""What a run is, as plain data: stages, and everything that decides its losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mutune.compose import later, written
from mutune.data.config import DataConfig, MixedData, TokenizerConfig
from mutune.data.segments import Skip
from mutune.errors import MAX_WHOLE, require, require_number
from mutune.model.shape import BaseConfig, ModelConfig, base_shape, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Decay, Plan, make_plan
from mutune.parametrization.rules import ParametrizationConfig
from mutune.training.schedule import ScheduleConfig

MAX_SEED = 2**31 - 1
MOST_THREADS = 1024  # of a process
DTYPES, ATTENTIONS = ("float32", "bfloat16"), ("sdpa", "explicit", "causal")
RECOMPUTED = ("none", "selective", "full")
WRITERS = ("tensorboard", "wandb")  # besides metrics.jsonl


@dataclass(frozen=True)
class StageConfig:
    """A stretch of a run at one context length.

    Attributes:
        context_length: tokens per sequence T.
        batch_sequences: sequences per step, over all processes.
        num_steps: optimizer steps.
        end_ratio: this stage's own end of the schedule, over the peak; None takes the schedule's.
        data: corpora that a target's windows are drawn from, each with source, path and weight; None reads the run's
            data alone.
    """

    context_length: int = 128
    batch_sequences: int = 4
    num_steps: int = 240
    end_ratio: float | None = None
    data: tuple[MixedData, ...] | None = later()

    def __post_init__(self) -> None:
        for name, example in (("context_length", 128), ("batch_sequences", 4), ("num_steps", 240)):
            require_number(f"stages.{name}", getattr(self, name), at_least=1, example=example, whole=True)
        if self.end_ratio is not None:
            require_number("stages.end_ratio", self.end_ratio, at_least=0.0, at_most=1.0, example=0.0085)
        if self.data is not None:
            self._check_data(self.data)

    @staticmethod
    def _check_data(data: Sequence[MixedData]) -> None:
        works = "for example stages.data=[{source: sotu, weight: 0.7}, {source: text, path: books, weight: 0.3}]"
        require(len(data) > 0, f"stages.data=[] is empty; {works}, or null for the run's own data.")
        seen = list[DataConfig]()
        for each in data:
            name = each.source if each.path is None else f"{each.source} {each.path}"
            require(
                each.corpus not in seen, f"stages.data has {name} twice; give it once, with the sum of its weights."
            )
            seen.append(each.corpus)

    @property
    def tokens_per_step(self) -> int:
        """Tokens predicted by one optimizer step."""
        return self.context_length * self.batch_sequences

    @property
    def tokens(self) -> int:
        """Tokens predicted in the whole stage."""
        return self.tokens_per_step * self.num_steps


@dataclass(frozen=True)
class LoopConfig:
    """How steps are taken and watched; the same for trials, rungs and target.

    Attributes:
        clip_norm: bound on the global gradient norm.
        micro_sequences: sequences per forward pass; None takes the whole batch.
        heldout_windows: number of fixed held-out windows.
        eval_every: steps between evaluations; 0 evaluates at the end of each stage only.
        audit_every: steps between audits of the live run against its plan; 0 audits at the start and on resume only.
        divergence_factor: a training loss above this many times ln(vocabulary) after warm-up ends the run.
        dtype: `float32`, or `bfloat16` for products of matrices, with float32 weights; null is what a sweep measures to
            pay, elsewhere float32.
        attention: `sdpa`, torch's fused kernel, which reads a bias of context² per head; `explicit`, written out;
            `causal`, the fused kernel without a bias, which columns of queries and keys make; null is what a sweep
            measures to pay, elsewhere sdpa on CPUs, on GPUs causal in bfloat16, and FlexAttention in float32 or with a
            document mask.
        compile: whether the model is compiled; null is what a sweep measures to pay, elsewhere true on GPUs.
        threads: CPU threads of a run; null is what a sweep measures to pay where cores would idle, elsewhere 1;
            a target takes OMP_NUM_THREADS, or all cores.
        document_mask: whether attention stays within documents; null lets tokens see those of the documents before, as
            BTLM's did.
    """

    clip_norm: float = 1.0
    micro_sequences: int | None = None
    heldout_windows: int = 128
    eval_every: int = 0
    audit_every: int = 100
    divergence_factor: float = 2.0
    dtype: str | None = None
    attention: str | None = None
    compile: bool | None = None
    threads: int | None = None
    document_mask: bool | None = later()

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("attention", ATTENTIONS)):
            value = getattr(self, name)
            require(
                value is None or value in known, f"loop.{name}={value} is unknown; known: {', '.join(known)}, or null."
            )
        require_number("loop.clip_norm", self.clip_norm, above=0.0, example=1.0)
        require_number("loop.heldout_windows", self.heldout_windows, at_least=1, example=128, whole=True)
        require_number("loop.eval_every", self.eval_every, at_least=0, example=50, whole=True)
        require_number("loop.audit_every", self.audit_every, at_least=0, example=100, whole=True)
        require_number("loop.divergence_factor", self.divergence_factor, above=1.0, example=2.0)
        require(
            self.attention != "causal" or not self.document_mask,
            "loop.attention=causal cannot tell documents apart, as loop.document_mask=true asks; for example "
            "loop.attention=null.",
        )
        if self.micro_sequences is not None:
            require_number("loop.micro_sequences", self.micro_sequences, at_least=1, example=4, whole=True)
        if self.threads is not None:
            require_number("loop.threads", self.threads, at_least=1, at_most=MOST_THREADS, example=2, whole=True)

    def attention_on(self, device: str) -> str:
        """How attention is computed on that kind of device where nothing was measured; on GPUs without the biases of a
        long context, which would not fit.
        """
        if self.attention or not device.startswith("cuda"):
            return self.attention or ATTENTIONS[0]
        return "flex" if self.document_mask or self.dtype != "bfloat16" else "causal"

    def compiled_on(self, device: str) -> bool:
        """Whether the model is compiled on that kind of device where nothing was measured."""
        return device.startswith("cuda") if self.compile is None else self.compile

    def settled(self) -> "LoopConfig":
        """With what is left open as it is where nothing was measured."""
        return replace(
            self,
            dtype=self.dtype or DTYPES[0],
            attention=self.attention or ATTENTIONS[0],
            compile=bool(self.compile),
            threads=self.threads or 1,
        )


@dataclass(frozen=True)
class ParallelConfig:
    """How a run is spread over the processes that torchrun starts. It decides losses no further than rounding does.

    Attributes:
        replicas: whole copies of the weights (HSDP): each is sharded over processes / replicas of them. 1 shards over
            all processes (FSDP).
        reshard: whether a block's weights are dropped after its forward pass and gathered again for its backward pass,
            or kept in between.
        activation_checkpointing: what the backward pass computes again: `none`; `selective`, all but products of
            matrices and attention; `full`, every block.
        micro_sequences: sequences per forward pass of a process, one number or one for each stage, as [8,2]; null takes
            the target's loop.micro_sequences. fit=true finds the most that fit.
    """

    replicas: int = 1
    reshard: bool = True
    activation_checkpointing: str = "none"
    micro_sequences: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        require_number("parallel.replicas", self.replicas, at_least=1, example=1, whole=True)
        require(
            self.activation_checkpointing in RECOMPUTED,
            f"parallel.activation_checkpointing={self.activation_checkpointing} is unknown; known: "
            f"{', '.join(RECOMPUTED)}.",
        )
        if isinstance(self.micro_sequences, tuple):
            listed = ",".join(map(str, self.micro_sequences))
            works = ",".join(str(n) if _counts(n) else "1" for n in self.micro_sequences) or "1"
            require(
                all(map(_counts, self.micro_sequences)),
                f"parallel.micro_sequences=[{listed}] must have whole numbers of at least 1; for example "
                f"parallel.micro_sequences=[{works}].",
            )
        elif self.micro_sequences is not None:
            require_number("parallel.micro_sequences", self.micro_sequences, at_least=1, example=1, whole=True)


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides the losses of a run, and nothing else.

    `extends` has the stages of the runs that this one goes on from, as they were run, the first one first: its windows
    depend on them. `left_out` has for each of them what rollbacks had left out of it by the step at which it was left.
    None for a run that begins at step 0, or where nothing was left out.
    """

    model: ModelConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    parametrization: ParametrizationConfig
    base: BaseConfig
    hyperparameters: BaseHyperparameters
    schedule: ScheduleConfig
    stages: tuple[StageConfig, ...]
    loop: LoopConfig = field(default_factory=LoopConfig)
    seed: int = 0
    extends: tuple[tuple[StageConfig, ...], ...] | None = later()
    left_out: tuple[tuple[Skip, ...], ...] | None = later()

    def __post_init__(self) -> None:
        require(
            len(self.stages) > 0, "stages=[] is empty; a run needs at least one, for example stages=[{num_steps: 240}]."
        )
        require_number("seed", self.seed, at_least=0, at_most=MAX_SEED, example=0, whole=True)
        self.schedule.warmup(self.num_steps)
        longest = max(stage.context_length for stage in self.stages)
        if self.model.positions == "learned":
            require(
                longest <= self.model.max_positions,
                f"model.max_positions={self.model.max_positions} is shorter than the context of {longest}; "
                f"for example model.max_positions={longest}.",
            )

        self.plan(vocab_size=1)  # refuses what the table cannot rule

    def as_dict(self) -> dict[str, Any]:
        """Plain data: what is hashed and compared with what other versions of mutune wrote."""
        plain: dict[str, Any] = written(self)
        return plain

    def plan(self, vocab_size: int) -> Plan:
        """The run's plan, without allocating its model."""
        shape, theory = self.model, self.parametrization
        return make_plan(
            theory.theory(),
            tensor_specs(shape, vocab_size),
            base_shape(self.base, like=shape),
            self.hyperparameters,
            depth=shape.depth,
            head_size=shape.size_per_head,
            decay=Decay(theory.decay, theory.decay_exponent, self.num_steps),
        )

    @property
    def num_steps(self) -> int:
        """Steps of all stages."""
        return total_steps(self.stages)


def _counts(value: object) -> bool:
    """Whether it is a number of sequences."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_WHOLE


def micro_sequences(spec: RunSpec, parallel: ParallelConfig) -> list[int | None]:
    """Sequences per forward pass of a process in each stage; None takes all that it has.

    Raises:
        Refusal: there is a list of them, and not one for each stage.
    """
    given, stages = parallel.micro_sequences, len(spec.stages)
    if not isinstance(given, tuple):
        return [given or spec.loop.micro_sequences] * stages
    works = [*given, *(given[-1:] or (1,)) * stages][:stages]
    require(
        len(given) == stages,
        f"parallel.micro_sequences=[{','.join(map(str, given))}] has {len(given)} for a run's {stages} "
        f"{'stage' if stages == 1 else 'stages'}; for example parallel.micro_sequences=[{','.join(map(str, works))}], "
        "or one number for all.",
    )
    return list(given)


def total_steps(stages: Sequence[StageConfig]) -> int:
    """Steps of all stages."""
    return sum(stage.num_steps for stage in stages)


def total_tokens(stages: Sequence[StageConfig]) -> int:
    """Tokens of all stages."""
    return sum(stage.tokens for stage in stages)


def first_steps(stages: Sequence[StageConfig], step: int, more: int = 0) -> tuple[StageConfig, ...]:
    """The stages of a run's first `step` steps, the last one longer by `more`: those of a branch that leaves it there.

    Raises:
        Refusal: the run has no such step.
    """
    require_number("step", step, at_least=1, at_most=total_steps(stages), example=total_steps(stages), whole=True)
    kept = list[StageConfig]()
    for stage in stages:
        if step > 0:
            kept.append(replace(stage, num_steps=min(step, stage.num_steps)))
        step -= stage.num_steps
    return (*kept[:-1], replace(kept[-1], num_steps=kept[-1].num_steps + more))


def stage_ends(stages: Sequence[StageConfig]) -> list[tuple[int, float | None]]:
    """(last step + 1, own end ratio) of each stage, as `schedule.multiplier` takes them."""
    ends, step = [], 0
    for stage in stages:
        step += stage.num_steps
        ends.append((step, stage.end_ratio))
    return ends
