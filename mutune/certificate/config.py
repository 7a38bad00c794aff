"""What a transfer is asked for (target, ladder), and what it hands on (the transfer file)."""

import hashlib
import inspect
import json
import re
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from mutune.certificate.stages import TargetStage, resolve
from mutune.compose import build, later, plain, written
from mutune.data.config import DataConfig, TokenizerConfig
from mutune.errors import MAX_WHOLE, Refusal, require, require_name, require_number
from mutune.model.shape import MAX_DEPTH, MAX_WIDTH, BaseConfig, ModelConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.scaling.hardware import ACCELERATORS, CURRENCY, EXAMPLE, default_flops_per_gpu_second
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.schedule import ScheduleConfig

VERDICTS = ("GO", "GO WITH CARE", "NO-GO", "NOT CERTIFIED")
MIN_GAP = 0.01  # octaves between two learning rates of a ladder
OF_A_RUN = re.compile(r"(?<![\w.])(schedule|model|stages)(?=[.=])")  # keys of a run that are the target's own
MAX_SEEDS = 100
MAX_MULTIPLE = 2**20  # of the study's tokens or batch


@dataclass(frozen=True)
class TargetConfig:
    """The run that the money is for.

    Attributes:
        name: names its folders.
        model: its shape.
        stages: context lengths, batches and steps, or shares of `tokens`, in order.
        tokens: of the whole run, where the stages have shares of them.
        schedule, data, tokenizer: its own; null takes the study's. Of one that is given, what is left out is at its
            default, and not the study's.
        loop: how its steps are taken.
    """

    name: str = "target"
    model: ModelConfig = field(default_factory=ModelConfig)
    stages: list[TargetStage] = field(default_factory=list)
    tokens: int | None = later()
    schedule: ScheduleConfig | None = None
    data: DataConfig | None = None
    tokenizer: TokenizerConfig | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        require_name("target.name", self.name)
        if self.tokens is not None:
            require_number("target.tokens", self.tokens, at_least=1, example=20_000_000_000, whole=True)
        self.run_stages()  # refuses shares that make no run

    def run_stages(self) -> tuple[StageConfig, ...]:
        """The stages with whole steps."""
        return resolve(self.stages, self.tokens)

    def resolved(self) -> "TargetConfig":
        """The same target with steps in place of shares."""
        return replace(self, stages=[TargetStage.of(stage) for stage in self.run_stages()], tokens=None)


AXIS_KEYS = {"width": "widths", "tokens": "tokens", "batch": "batches", "depth": "depths"}  # of a ladder: its rungs


@dataclass(frozen=True)
class LadderConfig:
    """The runs that tell whether the best learning rate holds at other sizes. `ladder=[width,tokens]` sets the axes.

    Each axis is varied alone, from the study's run. What is null is chosen: the rungs that narrow the target's optimum
    most for their cost, and learning rates around where smaller rungs expect the optimum.

    Attributes:
        axes: of width, tokens, batch and depth, those that are varied; null takes those whose rungs are listed, and
            without any, width and tokens, which a GO needs.
        widths, depths: rungs besides the base.
        tokens: rungs as multiples of the study's tokens, by the number of steps.
        batches: rungs as multiples of the study's batch, at the same tokens.
        offsets: a fixed grid of learning rates, in octaves from the study's best; null chooses rates by their results.
        seeds: of each point of a grid; by design at most so many. null: 2 of a grid, at most 8 by design.
        workers: worker processes; null takes as many as have cores.
    """

    axes: list[str] | None = None
    widths: list[int] | None = None
    tokens: list[float] | None = None
    batches: list[float] | None = None
    depths: list[int] | None = None
    offsets: list[float] | None = None
    seeds: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        self._check_axes()
        for axis, example in (("width", 64), ("depth", 8), ("tokens", 2), ("batch", 2)):
            self._check_rungs(axis, example)
        if self.offsets is not None:
            _check_offsets(self.offsets)
        for key, most, example in (("seeds", MAX_SEEDS, 2), ("workers", MAX_WHOLE, 2)):
            if getattr(self, key) is not None:
                require_number(
                    f"ladder.{key}", getattr(self, key), at_least=1, at_most=most, example=example, whole=True
                )

    @property
    def chosen_axes(self) -> list[str]:
        """The axes that are varied."""
        listed = [axis for axis in AXIS_KEYS if self.rungs(axis)]
        return self.axes or listed or ["width", "tokens"]

    def rungs(self, axis: str) -> list[float] | None:
        """The listed rungs of an axis."""
        listed: list[float] | None = getattr(self, AXIS_KEYS[axis])
        return listed

    def _check_axes(self) -> None:
        if self.axes is None:
            return
        works = "for example ladder=[width,tokens]"
        require(len(self.axes) > 0, f"ladder.axes=[] is empty; {works}.")
        for axis in self.axes:
            require(
                axis in AXIS_KEYS, f"ladder.axes={self.axes} has an unknown axis; known axes: {', '.join(AXIS_KEYS)}."
            )
        require(len(set(self.axes)) == len(self.axes), f"ladder.axes={self.axes} repeats an axis; {works}.")

    def _check_rungs(self, axis: str, example: int) -> None:
        listed, key = self.rungs(axis), f"ladder.{AXIS_KEYS[axis]}"
        if listed is None:
            return
        works = f"for example {key}=[{example},{2 * example}]"
        require(len(listed) > 0, f"{key}=[] is empty; {works}, or null to have them chosen.")
        most, whole = {"width": (MAX_WIDTH, True), "depth": (MAX_DEPTH, True)}.get(axis, (MAX_MULTIPLE, False))
        for rung in listed:
            require_number(key, rung, above=0, at_most=most, example=example, whole=whole)
        require(len(set(listed)) == len(listed), f"{key}={listed} repeats a rung; {works}.")
        require(
            self.axes is None or axis in self.axes,
            f"{key}={listed} lists rungs of an axis that ladder.axes={self.axes} leaves out; for example "
            f"ladder=[{','.join([*(self.axes or []), axis])}].",
        )


def _check_offsets(offsets: list[float]) -> None:
    works = "for example ladder.offsets=[-1,0,1], or null to have them chosen"
    require(
        len(set(offsets)) == len(offsets) >= 3,
        f"ladder.offsets={offsets} must hold at least three distinct offsets; {works}.",
    )
    for offset in offsets:
        require_number("ladder.offsets", offset, at_least=-20, at_most=20, example=1)
    gaps = [high - low for low, high in pairwise(sorted(offsets))]
    require(
        min(offsets) < 0 < max(offsets) and min(gaps) >= MIN_GAP,
        f"ladder.offsets={offsets} must lie on both sides of 0, which is the transferred rate, and at least "
        f"{MIN_GAP:g} octaves apart; {works}.",
    )


@dataclass(frozen=True)
class BudgetConfig:
    """What a ladder may cost. Both null: what 112 trials of the study cost, about 4 minutes for the sweep `proxy`.

    Attributes:
        budget_fraction: of the target's FLOPs, that all runs of a ladder together may cost (with compare: of each
            table's). Null with budget_minutes null takes what 112 trials of the study cost, or more where rungs are
            listed.
        budget_minutes: how long they may take here, by the time that the study's trials took.
    """

    budget_fraction: float | None = None
    budget_minutes: float | None = None

    def __post_init__(self) -> None:
        for key, works in (("budget_fraction", 0.1), ("budget_minutes", 4.0)):
            if getattr(self, key) is not None:
                require_number(key, getattr(self, key), above=0, example=works)


@dataclass(frozen=True)
class PriceConfig:
    """What compute costs, for the certificate's regret. Settings, not quotes.

    Attributes:
        flops_per_gpu_second: what one GPU really does; the default is the MFU assumed of a target's price, of an H100's
            dense bfloat16 peak.
        gpu_hour: price of a GPU's hour.
        currency: of the price.
    """

    flops_per_gpu_second: float = default_flops_per_gpu_second()
    gpu_hour: float = ACCELERATORS[EXAMPLE].gpu_hour
    currency: str = CURRENCY

    def __post_init__(self) -> None:
        works = PriceConfig.flops_per_gpu_second
        require_number("prices.flops_per_gpu_second", self.flops_per_gpu_second, above=0, example=works)
        require_number("prices.gpu_hour", self.gpu_hour, at_least=0, example=PriceConfig.gpu_hour)


@dataclass(frozen=True)
class Overrides:
    """Base hyperparameters set by hand over the study's; None keeps the study's."""

    learning_rate: float | None = None
    init_std: float | None = None
    embedding_multiplier: float | None = None
    output_multiplier: float | None = None
    attention_multiplier: float | None = None
    weight_decay: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    adam_eps: float | None = None
    decay_timescale: float | None = None

    def apply(self, hyperparameters: BaseHyperparameters) -> BaseHyperparameters:
        """The study's values with these put in."""
        return replace(hyperparameters, **self.given())

    def given(self) -> dict[str, float]:
        """Only what was set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


Overrides.__doc__ = f"{Overrides.__doc__}\n\n{inspect.getdoc(BaseHyperparameters)}"  # its keys mean the same


@dataclass(frozen=True)
class Provenance:
    """Where the hyperparameters come from.

    Attributes:
        study: the study's name.
        source: the study's folder, or the publication.
        trial: number of the best trial; None for published values.
        heldout_loss: its held-out loss, nats per token.
        data_hash: content hash of the study's corpus and tokenizer; None for published values.
        study_commit: commit of the code that ran the study.
        commit: commit of the code that wrote the transfer file.
        overridden: base hyperparameters that were set by hand.
    """

    study: str
    source: str
    trial: int | None = None
    heldout_loss: float | None = None
    data_hash: str | None = None
    study_commit: str | None = None
    commit: str = "none"
    overridden: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Prediction:
    """What the target is expected to lose, said before it runs; or the reason why no number is given.

    The quantity is that of every run's end: held-out loss in nats per token, of one run at the transferred rate.

    Attributes:
        reason: why there is no number; None where there is one.
        loss: the median.
        low, high: the interval that holds the run's loss with probability `level`.
        exponent: α of L = E + a·width^-α, posterior mean.
        floor: E, posterior mean: the loss of an infinite width at this data.
        left_out: loss of the widest rung minus what the others predict of it.
        left_out_inside: whether it lies in their interval.
        band: [fraction of the run, low, median, high] of the training loss, smoothed over a twentieth of the run, from
            after the warm-up to the end, where the ladder's curves tell of it (`certificate/band.py`).
    """

    reason: str | None = None
    loss: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = 0.9
    exponent: float | None = None
    floor: float | None = None
    left_out: float | None = None
    left_out_inside: bool | None = None
    band: list[list[float]] | None = later()

    def __post_init__(self) -> None:
        rows = [] if self.band is None else self.band
        ordered = all(len(row) == 4 and row[1] <= row[2] <= row[3] for row in rows)
        require(
            self.band is None or (ordered and len(rows) > 0 and all(a[0] < b[0] for a, b in pairwise(rows))),
            "prediction.band must hold rows of fraction, low, median, high, by rising fraction; null gives no band.",
        )

    def __str__(self) -> str:
        if self.loss is None:
            return f"none: {self.reason}"
        return f"{self.loss:.4f} ({self.low:.4f}-{self.high:.4f}), held-out nats per token, {self.level:.0%}"


@dataclass(frozen=True)
class TransferFile:
    """All that `mutune.train` needs: base hyperparameters, the shape they live at, and the target.

    The schedule is kept as ratios of the run wherever the study gave it so. `prediction` is the target's loss as it was
    predicted before any of its runs; None in a file that knows none. `seal` is a hash of everything else: the verdict
    and the prediction are about these values and no others.
    """

    provenance: Provenance
    parametrization: ParametrizationConfig
    base: BaseConfig
    hyperparameters: BaseHyperparameters
    schedule: ScheduleConfig
    data: DataConfig
    tokenizer: TokenizerConfig
    target: TargetConfig
    verdict: str
    prediction: Prediction | None = None
    seal: str = ""
    format: int = 1

    def __post_init__(self) -> None:
        require(
            self.format == 1, f"format={self.format} of the transfer file is unknown to this version, which reads 1."
        )
        require(self.verdict in VERDICTS, f"verdict={self.verdict} is unknown; known verdicts: {', '.join(VERDICTS)}.")

    def spec(self, seed: int) -> RunSpec:
        """The target's run.

        Raises:
            Refusal: its parts do not fit each other; keys are those of the transfer's command.
        """
        try:
            return self._spec(seed)
        except Refusal as refusal:
            raise Refusal(self._located(str(refusal))) from refusal

    def _located(self, message: str) -> str:
        """A run's sentence, with the keys that a transfer has for them."""
        own = OF_A_RUN.sub(r"target.\1", message)
        if self.target.schedule is not None or not message.startswith("schedule."):
            return own
        (why, example, _), (_, _, works) = message.partition("for example "), own.partition("for example ")
        return f"the study's {why}{example}target.schedule.kind={self.schedule.kind} {works}"

    def _spec(self, seed: int) -> RunSpec:
        target = self.target
        return RunSpec(
            model=target.model,
            data=target.data or self.data,
            tokenizer=target.tokenizer or self.tokenizer,
            parametrization=self.parametrization,
            base=self.base,
            hyperparameters=self.hyperparameters,
            schedule=target.schedule or self.schedule,
            stages=target.run_stages(),
            loop=target.loop,
            seed=seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as it is written."""
        plain: dict[str, Any] = written(self)
        return plain

    def sealed(self, verdict: str) -> "TransferFile":
        """The same values with a verdict, and with the seal that ties both."""
        judged = replace(self, verdict=verdict)
        return replace(judged, seal=judged._hash())

    def check_seal(self) -> None:
        """Refuse values or a verdict that were changed since they were judged."""
        require(
            self.seal == self._hash(),
            f"seal={self.seal or 'none'} is not that of the transfer file's other keys, so its verdict is about other "
            "values; make it again with python -m mutune.transfer, which takes any value, for example "
            "hyperparameters.learning_rate=0.01.",
        )

    def check_text(self, content_hash: str) -> None:
        """Refuse the study's text where it is another than it was: `content_hash` is today's."""
        known = self.provenance.data_hash
        require(
            known in (None, content_hash),
            f"the text behind data.source={self.data.source} has changed since the study ({str(known)[:12]} → "
            f"{content_hash[:12]}); run the study and the transfer again.",
        )

    def _hash(self) -> str:
        """Of the values as they are read back from a file, where every number has the type of its field."""
        values = written(build(TransferFile, plain(replace(self, seal=""))))
        if self.prediction is None:
            del values["prediction"]  # a file from before there were predictions keeps its seal
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
