"""One configuration tree per door, composed of the rooms' dataclasses. No torch, no YAML."""

from dataclasses import dataclass, field
from typing import Any

from mutune.certificate.config import BudgetConfig, LadderConfig, Overrides, PriceConfig, TargetConfig
from mutune.compose import choices, written
from mutune.data.config import DataConfig, TokenizerConfig
from mutune.errors import Refusal, require, require_name, require_number
from mutune.model.shape import ModelConfig, base_config
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import TABLES, ParametrizationConfig
from mutune.scaling.hardware import ACCELERATORS, EXAMPLE, MFU, accelerator
from mutune.scaling.horizon import HorizonConfig
from mutune.search.config import LAUNCHERS, SearchConfig, without_password
from mutune.training.alarms import GuardConfig
from mutune.training.config import MAX_SEED, MOST_THREADS, WRITERS, LoopConfig, ParallelConfig, RunSpec, StageConfig
from mutune.training.schedule import ScheduleConfig
from mutune.verification.places import require_span

FOLLOWS = ("schedule", "refine")
MAX_RATE, MAX_WIDTH = 1e12, 1e12
#: What `runs` may be asked about → the most, and an example.
ASKED: dict[str, tuple[float, float]] = {
    "width": (MAX_WIDTH, 256.0),
    "depth": (MAX_WIDTH, 32.0),
    "tokens": (1e18, 1e10),
    "batch": (1e15, 524288.0),
    "parameters": (1e15, 1e9),
}
DEVICES = ("auto", "cpu", "cuda")
PUBLISHED = "published"  # the name under which a transfer finds BTLM-3B-8K's own values


@dataclass(frozen=True)
class DoorConfig:
    """The keys that every command has.

    Attributes:
        out: folder for everything that is written.
        seed: seeds initial values, data order and proposals.
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.
        dry_run: say what would be done, write nothing.
        overwrite: replace existing results that came from other inputs.
    """

    out: str = "runs"
    seed: int = 0
    device: str = "auto"
    dry_run: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        require(self.out != "", "out= is empty; for example out=runs.")
        require_number("seed", self.seed, at_least=0, at_most=MAX_SEED, example=0, whole=True)
        require(self.device in DEVICES, f"device={self.device} is unknown; known devices: {', '.join(DEVICES)}.")


@dataclass(frozen=True)
class SweepConfig(DoorConfig):
    """Everything that decides a study.

    Attributes:
        study: its name, and the name of its folder; a sweep's file has one.
        follows: `schedule` or `refine`: go on from the finished study of that name, with its run and its best values;
            the results are those of a study of their own, such as proxy-schedule. Set by +sweep=schedule and refine.
        model: shape of the proxy, which is the base.
        hyperparameters: what every trial has unless its search space names it.
        run: length and batch of every trial.
        loop: how steps are taken and watched.
        search: which trials are made.
        workers: worker processes of each command, of `loop.threads` each; null takes as many as pay. The same command
            again, on this host or another that shares `out`, joins the study.
        launcher: `local`, or `slurm` or `ray`: jobs of a cluster run the study, each by this command.
        jobs: how many.
        resources: what each job asks of the cluster, as submitit or Ray name it: +resources.slurm_partition=gpu.
        status: say where the study stands, also while another process runs it, and end.
        for_target: a target under conf/target, of whose FLOPs the plan says what share the study costs.
        prices: what compute costs, for the dry run.
    """

    study: str | None = None
    follows: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    hyperparameters: BaseHyperparameters = field(default_factory=BaseHyperparameters)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: StageConfig = field(default_factory=StageConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    workers: int | None = None
    launcher: str = "local"
    jobs: int = 1
    resources: dict[str, Any] = field(default_factory=dict)
    status: bool = False
    for_target: str = "btlm_3b"
    prices: PriceConfig = field(default_factory=PriceConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.study is not None:
            require_name("study", self.study)
        require(
            self.run.data is None,
            "run.data is a mixture, and a study reads one corpus; for example data=sotu, and the mixture in "
            "target.stages.",
        )
        if self.study == PUBLISHED:
            raise Refusal(f"study={PUBLISHED} is the name of BTLM-3B-8K's own values; for example study=mine.")
        require(
            self.follows in (None, *FOLLOWS),
            f"follows={self.follows} is unknown; known: {', '.join(FOLLOWS)}, for example +sweep=schedule.",
        )
        known = choices("target")
        require(
            self.for_target in known, f"for_target={self.for_target} is unknown; known targets: {', '.join(known)}."
        )
        if self.workers is not None:
            require_number("workers", self.workers, at_least=1, example=2, whole=True)
        require(
            self.launcher in LAUNCHERS,
            f"launcher={self.launcher} is unknown; known launchers: {', '.join(LAUNCHERS)}.",
        )
        require_number("jobs", self.jobs, at_least=1, at_most=10_000, example=4, whole=True)
        for key, value, unset in (("jobs", self.jobs, 1), ("resources", self.resources, {})):
            require(
                self.launcher != "local" or value == unset,
                f"{key}={value} is read with launcher=slurm or ray; for example launcher=slurm.",
            )

    def spec(self) -> RunSpec:
        """The run at the base values: the proxy is its own base."""
        return RunSpec(
            model=self.model,
            data=self.data,
            tokenizer=self.tokenizer,
            parametrization=self.parametrization,
            base=base_config(self.model),
            hyperparameters=self.hyperparameters,
            schedule=self.schedule,
            stages=(self.run,),
            loop=self.loop,
            seed=self.seed,
        )

    def identity(self) -> dict[str, object]:
        """What two starts of one study must agree in: all but where, on what and how long it runs."""
        data: dict[str, Any] = written(self)
        for key in (
            "out",
            "device",
            "dry_run",
            "overwrite",
            "follows",
            "status",
            "for_target",
            "prices",
            "workers",
            "launcher",
            "jobs",
            "resources",
        ):
            del data[key]
        for key in ("n_trials", "confirm", "confirm_seeds", "stop_regret"):
            del data["search"][key]
        data["search"]["storage"] = without_password(self.search.storage)
        return data


@dataclass(frozen=True)
class TransferConfig(BudgetConfig, DoorConfig):
    """Everything that decides a transfer.

    Attributes:
        study: name of a finished study under <out>/sweeps, or `published` for BTLM-3B-8K's own values.
        runs: instead of a study: a CSV file of finished runs (columns width, lr, loss; optional seed, depth, tokens,
            batch, table, diverged), or an Optuna study, `sqlite:///study.db`. Gives a certificate without training.
        runs_study: with an Optuna study: its name, where `runs` holds several.
        optima: instead of a study: a CSV file with the columns width and optimum. Gives a drift statement.
        target_width: with `runs` or `optima`: the width that is asked about; null takes twice the largest.
        target_depth, target_tokens, target_batch: with `runs`, where it has that column: what is asked about; null
            takes the largest.
        target_parameters: with `runs` that have tokens: the target's parameters without embeddings, which price the
            certificate's regret in FLOPs, GPU-hours and money.
        target: the run that the values are carried to.
        compare: parametrization tables that get the same ladder as the study's own, from the same values; the
            certificate says which transfers best and which trains best. For example compare=[mup,sp,completep].
        ladder: the runs that tell how far they can be carried.
        horizon: published laws for tokens and batch, where the ladder measured none.
        hyperparameters: base values set by hand over the study's.
        prices: what compute costs, for the certificate's regret.
        require_go: exit with code 3 unless the verdict is GO.
    """

    study: str = "proxy"
    runs: str | None = None
    runs_study: str | None = None
    optima: str | None = None
    target_width: float | None = None
    target_depth: float | None = None
    target_tokens: float | None = None
    target_batch: float | None = None
    target_parameters: float | None = None
    compare: list[str] | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    horizon: HorizonConfig = field(default_factory=HorizonConfig)
    hyperparameters: Overrides = field(default_factory=Overrides)
    prices: PriceConfig = field(default_factory=PriceConfig)
    require_go: bool = False

    def __post_init__(self) -> None:
        DoorConfig.__post_init__(self)
        BudgetConfig.__post_init__(self)
        require_name("study", self.study)
        for key, example in (("runs", "runs=mine.csv"), ("optima", "optima=optima.csv")):
            require(getattr(self, key) != "", f"{key}= is empty; for example {example}.")
        require(
            self.runs_study is None or "://" in str(self.runs),
            f"runs_study={self.runs_study} is read with an Optuna study; for example runs=sqlite:///study.db.",
        )
        require(
            self.runs is None or self.optima is None,
            f"runs={self.runs} and optima={self.optima} are two questions; give one of them.",
        )
        if self.compare is not None:
            self._check_compare()
        for key in ("budget_fraction", "budget_minutes"):
            require(
                getattr(self, key) is None or self._has_ladder,
                f"{key}={getattr(self, key)} limits the ladder of a study, and there is none here; leave it out, or "
                "take a study, for example study=proxy.",
            )
        if (rate := self.hyperparameters.learning_rate) is not None:
            require_number("hyperparameters.learning_rate", rate, above=0, at_most=MAX_RATE, example=0.01)
        if self.runs or self.optima:
            self._check_unread()
        for asked, (most, works) in ASKED.items():
            self._check_asked(asked, most, works)

    @property
    def asked(self) -> dict[str, float]:
        """Of `runs` or `optima`: the values of the target that are asked about, by axis."""
        given = {axis: getattr(self, f"target_{axis}") for axis in ASKED if axis != "parameters"}
        return {axis: float(value) for axis, value in given.items() if value is not None}

    @property
    def from_table(self) -> str:
        """What is asked about instead of a study, as it was given."""
        return f"runs={self.runs}" if self.runs else f"optima={self.optima}"

    def _check_asked(self, asked: str, most: float, example: float) -> None:
        key = f"target_{asked}"
        if (value := getattr(self, key)) is None:
            return
        require_number(key, value, above=0, at_most=most, example=example)
        use = "runs= or optima=" if asked == "width" else "runs="
        works = "optima= knows widths alone; leave it out" if self.optima else "a study's target is set by its own keys"
        require(
            self.runs is not None or (asked == "width" and self.optima is not None),
            f"{key}={value:g} is read with {use}; {works}, for example "
            f"{'target_width' if self.optima else 'target.model.width'}=256.",
        )

    def _check_unread(self) -> None:
        """Refuse what is a study's where somebody's runs are asked about."""
        given = [f"hyperparameters.{name}" for name in self.hyperparameters.given() if name != "learning_rate"]
        given += ["study"] if self.study != TransferConfig.study else []
        given += ["ladder"] if self.ladder != LadderConfig() else []
        require(
            not given,
            f"{' and '.join(given)} is read with a study, and {self.from_table} has none; leave it out, or set "
            "for example hyperparameters.learning_rate=0.01.",
        )

    @property
    def _has_ladder(self) -> bool:
        return self.study != PUBLISHED and self.runs is None and self.optima is None

    def _check_compare(self) -> None:
        assert self.compare is not None
        key, works = f"compare={self.compare}", "for example compare=[mup,sp]"
        require(len(self.compare) > 0, f"{key} names no table; {works}.")
        require(len(set(self.compare)) == len(self.compare), f"{key} repeats a table; {works}.")
        for table in self.compare:
            require(table in TABLES, f"{key} has an unknown table; known tables: {', '.join(sorted(TABLES))}.")
        require(
            self._has_ladder,
            f"{key} runs ladders of a study; for example study=proxy, or give the file of runs= a column table.",
        )


@dataclass(frozen=True)
class TrainConfig(DoorConfig):
    """Everything that decides how a target is trained, beside its transfer file.

    Attributes:
        transfer: the transfer file, written by `python -m mutune.transfer`.
        name: names the run's folder; null takes the target's name.
        checkpoint_every: steps between checkpoints; null makes it a twentieth of the run. There is one at the end of
            each stage too.
        keep_checkpoints: how many of the newest checkpoints stay, besides those at the ends of stages and the few that
            the guard may have to go back to.
        keep_every: also those stay whose step is a multiple of this, for example to branch from.
        background_checkpoints: whether several processes train on while a checkpoint is written; null does so on GPUs.
        branch_from: a checkpoint of another run, `<run>/checkpoints/<step>`, from which this one goes on: a decay that
            leaves a trunk (wsd, constant), a longer horizon, a longer context. Its first stages are those of that run.
        resume: the step of the checkpoint to go on from; null takes the newest. Newer ones are set aside.
        time_limit: minutes after which the run is saved and ends, as at SIGTERM.
        threads: CPU threads of a process; null takes the target's loop.threads, else OMP_NUM_THREADS (not the 1 that
            torchrun sets for several processes), else what cores it has.
        parallel: how the run is spread over the processes that torchrun starts.
        guard: what watches the run, and what an alarm does (docs/guard.md).
        hardware: GPUs that dry_run=true and fit=true are about, such as h100-sxm; in a run, whose peak and price count.
            null is the present device.
        gpus: how many of them.
        mfu: model FLOPs over the peak that a priced run is assumed to reach where it computes nothing again.
        peak_flops: of one device, FLOP/s, dense; null is what the table of hardware says.
        memory_gb: of one device, 1 GB = 10^9 bytes; null is what the table says.
        gpu_hour: price of a device's hour; null is what the table says, a setting and no quote.
        fit: find the most sequences per forward pass that fit, say what to set, and end. Without hardware= they really
            run here, in a process of their own.
        writers: who gets the records besides metrics.jsonl: tensorboard, wandb.
    """

    transfer: str | None = None
    name: str | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    keep_every: int | None = None
    background_checkpoints: bool | None = None
    branch_from: str | None = None
    resume: int | None = None
    time_limit: float | None = None
    threads: int | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    hardware: str | None = None
    gpus: int = 1
    mfu: float = MFU
    peak_flops: float | None = None
    memory_gb: float | None = None
    gpu_hour: float | None = None
    fit: bool = False
    writers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None:
            require_name("name", self.name)
        require_number("keep_checkpoints", self.keep_checkpoints, at_least=1, example=2, whole=True)
        for key, example in (("checkpoint_every", 50), ("keep_every", 1000), ("resume", 50)):
            if getattr(self, key) is not None:
                require_number(key, getattr(self, key), at_least=1, example=example, whole=True)
        if self.threads is not None:
            require_number("threads", self.threads, at_least=1, at_most=MOST_THREADS, example=2, whole=True)
        if self.time_limit is not None:
            require_number("time_limit", self.time_limit, above=0, example=60.0)
        self._check_machine()
        for writer in self.writers:
            require(
                writer in WRITERS, f"writers={self.writers} has an unknown one; known writers: {', '.join(WRITERS)}."
            )

    def _check_machine(self) -> None:
        require_number("gpus", self.gpus, at_least=1, at_most=10**6, example=8, whole=True)
        require_number("mfu", self.mfu, above=0, at_most=1, example=MFU)
        known = accelerator(self.hardware) if self.hardware is not None else ACCELERATORS[EXAMPLE]
        examples = (("peak_flops", known.bf16_flops), ("memory_gb", known.memory_bytes / 1e9))
        for key, example in (*examples, ("gpu_hour", known.gpu_hour)):
            if getattr(self, key) is not None:
                require_number(key, getattr(self, key), above=0, example=example)
        require(
            not (self.dry_run and self.fit),
            "dry_run=true prices the run as it is set, and fit=true finds what to set; neither writes anything, so "
            "give one of them, for example fit=true first.",
        )
        priced = self.dry_run or self.fit
        require(
            self.gpus == 1 or (self.hardware is not None and priced),
            f"gpus={self.gpus} is read with hardware= and dry_run=true or fit=true; for example hardware={EXAMPLE} "
            "dry_run=true. A run takes as many as torchrun starts processes.",
        )
        require(
            self.memory_gb is None or (self.hardware is not None and priced),
            f"memory_gb={self.memory_gb} is read with hardware= and dry_run=true or fit=true; for example "
            f"hardware={EXAMPLE} dry_run=true.",
        )


@dataclass(frozen=True)
class CheckConfig(DoorConfig):
    """Everything that decides a coordinate check.

    Attributes:
        name: names its folder; null takes the table's name.
        family: `module:name` of a `mutune.Family`, to check a model of your own; null is `model`'s.
        shapes: `module:name` of a function from size to the family's shape; null where its shapes are the sizes.
        model: the base shape.
        hyperparameters: at the base; by default the residual stream starts with RMS 1, where slopes are cleanest.
        run: context, batch and number of the steps that each model trains.
        widths: sizes checked over width; [] leaves width out.
        depths: sizes checked over depth; [] leaves depth out.
        seeds: models per size.
        workers: single-threaded worker processes; null takes the number of cores.
    """

    name: str | None = None
    family: str | None = None
    shapes: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    parametrization: ParametrizationConfig = field(default_factory=ParametrizationConfig)
    hyperparameters: BaseHyperparameters = field(
        default_factory=lambda: BaseHyperparameters(learning_rate=2**-7, init_std=0.08, embedding_multiplier=12.5)
    )
    run: StageConfig = field(default_factory=lambda: StageConfig(context_length=64, batch_sequences=8, num_steps=10))
    widths: list[int] = field(default_factory=lambda: [128, 256, 512])
    depths: list[int] = field(default_factory=list)
    seeds: int = 3
    workers: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.widths) + len(self.depths) > 0,
            "widths=[] and depths=[] leave nothing to check; for example widths=[128,256,512].",
        )
        for key, example in (("widths", [128, 256, 512]), ("depths", [2, 4, 8, 16])):
            sizes = getattr(self, key)
            for size in sizes:
                require_number(key, size, at_least=1, example=example[0], whole=True)
            if sizes:
                require_span(key, sizes, example)
        require(
            self.family is not None or self.shapes is None,
            f"shapes={self.shapes} is read with a family; for example family=examples.llama:deep.",
        )
        require(
            self.family is None or not (self.widths and self.depths),
            f"family={self.family} has one kind of shape; set widths=[] or depths=[] to say which it is.",
        )
        require_number("seeds", self.seeds, at_least=1, at_most=1000, example=3, whole=True)
        if self.workers is not None:
            require_number("workers", self.workers, at_least=1, example=2, whole=True)
        if self.name is not None:
            require_name("name", self.name)
