"""One run, assembled: data, model, plan and optimizer from a `RunSpec`, and its records."""

import bisect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from mutune.data.corpora import Corpora, prepare_corpora
from mutune.data.told import Told
from mutune.data.windows import Stage, WindowLoader, heldout_windows
from mutune.errors import Refusal, require
from mutune.files import write_text, write_yaml
from mutune.folders import CONFIG
from mutune.model.decoder import Decoder
from mutune.parametrization.apply import initialise, make_optimizer
from mutune.parametrization.audit import audit, findings
from mutune.parametrization.finding import AuditError, Finding
from mutune.parametrization.opinion import second_opinion
from mutune.parametrization.plan import Plan
from mutune.training import checkpoint
from mutune.training.config import ParallelConfig, RunSpec, StageConfig, micro_sequences, stage_ends
from mutune.training.device import resolve_device
from mutune.training.execution import keep_memory, loss_functions, number_format, threaded
from mutune.training.guard import Guard
from mutune.training.loop import Heldout, Record, evaluate, train
from mutune.training.probes import Probe
from mutune.training.recompute import recomputed
from mutune.training.result import CHECKPOINTS, METRICS, RunResult, discard, smoothing
from mutune.training.schedule import multiplier
from mutune.training.watch import Watch
from mutune.training.world import World, alone, is_sharded
from mutune.versions import versions

WRITER = ".writer.lock"  # held by the process that trains: what a killed parent leaves running ends first
SAVE_SECONDS = 30.0  # between the checkpoints of a trial or of a ladder's run

SPREAD = ParallelConfig()
WATCHED_WINDOWS, WATCHED_TOKENS = 2, 256  # of the held-out text, whose logits the guard's probes look at
#: Tokens of the first batch that the first audit runs through the model; what multipliers do does not depend on them.
PROBE_TOKENS = 8


def corpora_of(spec: RunSpec) -> Corpora:
    """What the run reads: its main corpus, and those of its stages' mixtures."""
    stages = [*spec.stages, *(stage for listed in spec.extends or () for stage in listed)]
    return prepare_corpora(spec.data, spec.tokenizer, [stage.data for stage in stages])


def window_loader(spec: RunSpec, corpora: Corpora, tells: bool = True) -> WindowLoader:
    """The run's batches; where it takes a while to find what is unread, that is said if it `tells`."""
    before, own = [loader_stages(stages, corpora) for stages in spec.extends or ()], loader_stages(spec.stages, corpora)
    with closing(Told(corpora.main.name)) as told:
        return WindowLoader(
            corpora.main.train,
            own,
            spec.seed,
            corpora=corpora.tokens,
            extends=before,
            left_out=spec.left_out or (),
            tell=told.share if tells else lambda *so_far: None,
        )


def loader_stages(stages: Sequence[StageConfig], corpora: Corpora) -> list[Stage]:
    """The stages as the loader takes them."""
    return [Stage(s.context_length, s.num_steps, s.batch_sequences, corpora.parts(s.data)) for s in stages]


def write_plan(directory: Path, plan: Plan) -> None:
    """Write the plan's two tables beside a run."""
    write_text(directory / "parametrization.csv", plan.parameters_csv())
    write_text(directory / "multipliers.csv", plan.multipliers_csv())


class Run:
    """A model in training.

    Args:
        spec: what to train.
        device: where.
        world: the processes that train it together, each of which makes one of these; None is this one alone, whose
            model is not sharded.
        parallel: how it is spread over them.
    """

    def __init__(
        self,
        spec: RunSpec,
        device: torch.device,
        world: World | None = None,
        parallel: ParallelConfig = SPREAD,
    ) -> None:
        self.spec, self.parallel = spec, parallel
        self.world = world or alone(device)
        self.corpora = corpora_of(spec)
        self.corpus = self.corpora.main
        self.plan = spec.plan(self.corpus.vocab_size)
        sites = {site: row.value for site, row in self.plan.multipliers.items()}
        loop = replace(spec.loop.settled(), compile=spec.loop.compiled_on(device.type))
        if device.type == "cpu":
            tokens = (n * s.context_length for n, s in zip(self._micro_sequences, spec.stages, strict=True))
            keep_memory(4 * self.corpus.vocab_size * max(tokens))
        attention = spec.loop.attention_on(device.type)
        recompute = recomputed(parallel.activation_checkpointing)

        def build() -> Decoder:
            end = self.corpus.tokenizer.eot if spec.loop.document_mask else None
            return Decoder(spec.model, self.corpus.vocab_size, sites, attention, recompute, end)

        if world is None:
            self.model = build().to(device)
        else:
            from mutune.training.distribution import sharded

            self.model = sharded(build, world, loop, parallel)
        self.loss, self.heldout_loss = loss_functions(self.model, loop, alone=world is None)
        initialise(self.model, self.plan, spec.seed)
        self.optimizer = make_optimizer(self.model, self.plan, betas=self._betas)
        self.loader = window_loader(spec, self.corpora, self.world.is_first)

    def records(self, start_step: int = 0) -> Iterator[Record]:
        """Train and evaluate from `start_step`; one record per step, with the held-out loss where it was measured.

        Adds to the loop's records: `tokens` counted from the start of the run, `context_length`, `seconds` since
        this call, and `heldout_loss`, `heldout_bits_per_byte` at the end of each stage and every `eval_every` steps. A
        held-out loss that is not finite is left out, and ends the run as diverged.
        The run is held against its plan before the first update and every `audit_every` steps.

        Raises:
            AuditError: the model or the optimizer is not what the plan says.
        """
        spec, started = self.spec, time.monotonic()
        ends = [end for end, _ in stage_ends(spec.stages)]
        rate = self._rate()
        self._audit_start(start_step)
        for record in self.steps(start_step):
            step = record["step"]
            stage = spec.stages[bisect.bisect_left(ends, step)]
            record["tokens"] = tokens_after(spec.stages, step)
            record["context_length"] = stage.context_length
            if spec.loop.audit_every and step % spec.loop.audit_every == 0 and not record["diverged"]:
                self._audit(rate(step - 1))
            every = spec.loop.eval_every
            if not record["diverged"] and (step in ends or (every and step % every == 0)):
                measured = evaluate(self.model, self._heldout(stage.context_length), self.heldout_loss, self.world)
                record["diverged"] = not math.isfinite(measured["heldout_loss"])  # the update itself broke the weights
                record |= {} if record["diverged"] else measured
            record["seconds"] = round(time.monotonic() - started, 4)
            yield record
            if record["diverged"]:
                return

    def steps(self, start_step: int = 0) -> Iterator[Record]:
        """The loop alone, from `start_step`: nothing is audited or evaluated."""
        for (end, _), sequences in zip(stage_ends(self.spec.stages), self._micro_sequences, strict=True):
            for record in self._steps(start_step, end, sequences):
                yield record
                if record["diverged"]:
                    return
            start_step = max(start_step, end)

    def _steps(self, start_step: int, end: int, sequences: int) -> Iterator[Record]:
        """From `start_step` to `end`, so many sequences at a time."""
        spec = self.spec
        return train(
            self.model,
            self.optimizer,
            self._batch,
            self._rate(),
            loss=self.loss,
            start_step=start_step,
            num_steps=end,
            peak_lr=spec.hyperparameters.learning_rate,
            clip_norm=spec.loop.clip_norm,
            micro_sequences=sequences,
            loss_bound=spec.loop.divergence_factor * math.log(self.corpus.vocab_size),
            warmup_steps=spec.schedule.warmup(spec.num_steps),
            world=self.world,
        )

    def _batch(self, step: int) -> np.ndarray:
        """This process's rows of the global batch."""
        return self.loader.batch(step, self.world.rank, self.world.size)

    def watch(self, guard: Guard) -> Watch:
        """The guard's eyes on this run as it now stands: anew after each start, resume and rollback."""
        context = min(WATCHED_TOKENS, *(stage.context_length for stage in self.spec.stages))
        windows = heldout_windows(self.corpus.heldout, context, WATCHED_WINDOWS)
        ids_BT, rate = torch.from_numpy(windows).to(next(self.model.parameters()).device), self._rate()
        return Watch(
            guard,
            Probe(self.model, self.optimizer, self.plan),
            forward=lambda: self.heldout_loss(ids_BT[:, :-1], ids_BT[:, 1:]),
            tokens=lambda: self.loader.corpora.values(),
            audit=lambda step: self._audit(rate(step - 1)),
        )

    @property
    def _micro_sequences(self) -> list[int]:
        """Of each stage."""
        chosen = zip(micro_sequences(self.spec, self.parallel), self.spec.stages, strict=True)
        return [sequences or stage.batch_sequences for sequences, stage in chosen]

    def _rate(self) -> Callable[[int], float]:
        return multiplier(self.spec.schedule, self.spec.num_steps, stage_ends(self.spec.stages))

    @property
    def _betas(self) -> tuple[float, float]:
        return self.spec.hyperparameters.beta1, self.spec.hyperparameters.beta2

    def _audit_start(self, start_step: int) -> None:
        """The first audit: initial values of a fresh run, the forward pass, and what `mup` thinks of the plan."""
        device = next(self.model.parameters()).device
        ids_BT = torch.from_numpy(self._batch(start_step)[:1, :PROBE_TOKENS]).to(device)
        found = findings(
            self.model,
            self.optimizer,
            self.plan,
            at_init=start_step == 0,
            betas=self._betas,
            forward=lambda: self._logits(ids_BT),
        )
        if start_step == 0:  # a checkpoint's plan is compared, and had its opinion
            found += second_opinion_of(self.spec, self.plan)
        self.world.together(lambda: _raise(found))

    def _audit(self, factor: float) -> None:
        """Every process holds its own model and optimizer against the plan; what one finds, all raise."""
        self.world.together(lambda: audit(self.model, self.optimizer, self.plan, factor=factor, betas=self._betas))

    def _logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """In float32 where that can be; a model that is gathered in bfloat16 cannot."""
        sharded = self.world.size > 1 or any(map(is_sharded, self.model.parameters()))
        with number_format(self.spec.loop, ids_BT.device) if sharded else nullcontext():
            logits_BTV: torch.Tensor = self.model(ids_BT)
        return logits_BTV

    def _heldout(self, context_length: int) -> Heldout:
        windows = heldout_windows(self.corpus.heldout, context_length, self.spec.loop.heldout_windows)
        stages = zip(micro_sequences(self.spec, self.parallel), self.spec.stages, strict=True)
        fit = [sequences for sequences, stage in stages if sequences and stage.context_length == context_length]
        return Heldout(windows, self.corpus.tokenizer.token_bytes, min((Heldout.chunk, *fit)))


def _raise(found: list[Finding]) -> None:
    if found:
        raise AuditError(found)


def second_opinion_of(spec: RunSpec, plan: Plan) -> list[Finding]:
    """Where `mup` differs from a run's plan (`second_opinion`); its blocks are alike, so one of them is compared.

    A base that is declared with real-valued sizes has no model, and so there is no opinion on it.
    """
    width, ffn = int(spec.base.width), int(spec.base.ffn)
    if (width, ffn) != (spec.base.width, spec.base.ffn):
        return []
    base = replace(spec.model, width=width, ffn_width=ffn, num_heads=1, depth=1)
    delta = replace(base, width=2 * width, ffn_width=2 * ffn)
    sites = dict.fromkeys(plan.multipliers, 1.0)
    with torch.device("meta"):
        models = [Decoder(shape, 1, sites) for shape in (base, delta, replace(spec.model, depth=1))]
    return second_opinion(plan, *models, decays=spec.parametrization.decay == "table")


def tokens_after(stages: tuple[StageConfig, ...], step: int) -> int:
    """Tokens predicted by the first `step` updates."""
    ends = list(accumulate(stage.num_steps for stage in stages))
    done = 0
    for end, stage in zip(ends, stages, strict=True):
        done += stage.tokens_per_step * max(0, min(step, end) - (end - stage.num_steps))
    return done


class Stopped(Exception):
    """A run was asked to stop, and saved."""


def run_to_end(
    spec: RunSpec,
    directory: Path,
    device: str,
    note: dict[str, Any],
    *,
    until: int | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train `spec` to its last step, leaving its records and its plan under `directory`; a rerun goes on.

    It goes on from its checkpoint, which it writes every `SAVE_SECONDS` and where it pauses, to the same losses as a
    run that was never interrupted.

    Args:
        note: what the run belongs to (study and trial, or rung); kept in its `config.yaml`.
        until: pause after this many steps.
        stop: asked after every step; once it is true, the run is saved.

    Raises:
        Stopped: it was.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / WRITER), threaded(spec.loop.threads or 1):
        return _to_end(Run(spec, resolve_device(device)), directory, note, until, stop)


def _to_end(run: Run, directory: Path, note: dict[str, Any], until: int | None, stop: Callable[[], bool]) -> RunResult:
    spec = run.spec
    root, end = directory / CHECKPOINTS, min(until or spec.num_steps, spec.num_steps)
    start, records = _resume(run, directory)
    if not start or not (directory / CONFIG).is_file():
        describe(directory, run, note)
    write_text(directory / METRICS, "".join(json.dumps(record) + "\n" for record in records))
    before, saved = records[-1]["seconds"] if records else 0.0, time.monotonic()

    def save(step: int) -> None:
        os.fsync(lines.fileno())  # a checkpoint never knows a step that the records do not
        checkpoint.save(root, step, run.model, run.optimizer, run.plan, _identity(run), keep=1)

    with (directory / METRICS).open("a", buffering=1) as lines:
        for record in run.records(start) if start < end else ():
            record["seconds"] = round(before + record["seconds"], 4)
            lines.write(json.dumps(record) + "\n")
            records.append(record)
            step, over = record["step"], record["diverged"]
            stopped = stop() and not over and step < spec.num_steps
            if not over and (stopped or step == end < spec.num_steps or time.monotonic() - saved > SAVE_SECONDS):
                save(step)
                saved = time.monotonic()
            if stopped:
                raise Stopped(f"stopped after step {step}")
            if step == end:
                break
    return _result(run, records)


def _result(run: Run, records: list[Record]) -> RunResult:
    """What a run says after these records, all from its first on."""
    last, losses = records[-1], [record["loss"] for record in records]
    steps, seconds = last["step"], last["seconds"]
    if last["diverged"]:
        worst = max([math.log(run.corpus.vocab_size), *filter(math.isfinite, losses)])
        return RunResult(worst, True, None, steps - 1, seconds)
    if steps < run.spec.num_steps:
        return RunResult(fmean(losses[-smoothing(run.spec.num_steps) :]), False, None, steps, seconds, finished=False)
    return RunResult(last["heldout_loss"], False, last["heldout_bits_per_byte"], steps, seconds)


def _resume(run: Run, directory: Path) -> tuple[int, list[Record]]:
    """Load the run's checkpoint where there is one; returns its step and the records up to it.

    One that is damaged, of another run, or without its records is no use: the run begins again, to the same losses.
    """
    try:
        found = checkpoint.newest(directory / CHECKPOINTS)
        if found is None:
            return 0, []
        checkpoint.check_meta(found, run.plan, _identity(run))
        lines = (directory / METRICS).read_text().splitlines()[: found.step]
        records = [json.loads(line) for line in lines]
        require([record["step"] for record in records] == list(range(1, found.step + 1)), "a record is missing")
        checkpoint.restore(found, run.model, run.optimizer)
    except (Refusal, OSError, ValueError, KeyError, TypeError) as error:
        print(f"begun anew {directory}, whose checkpoint is no use ({error})", file=sys.stderr)
        discard(directory)
        return 0, []
    return found.step, records


def _identity(run: Run) -> dict[str, Any]:
    """What a run and its checkpoint must agree in, besides the plan."""
    return {
        "run": run.spec.as_dict(),
        "data_hash": run.corpora.content_hash,
        "tokenizer_hash": run.corpus.tokenizer.content_hash,
    }


def describe(directory: Path, run: Run, note: dict[str, Any]) -> None:
    """Write what a run is, and the versions it begins with, beside its records: `config.yaml` and the plan's tables."""
    directory.mkdir(parents=True, exist_ok=True)
    facts = {"data_hash": run.corpora.content_hash, "vocab_size": run.corpus.vocab_size}
    write_yaml(directory / CONFIG, {**note, **facts, "versions": versions(), "run": run.spec.as_dict()})
    write_plan(directory, run.plan)
