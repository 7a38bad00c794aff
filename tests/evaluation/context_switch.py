"""The experiment on switching the context length: a run that switches, and its control that stays, from one trunk."""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import torch

from mutune.evaluation.positions import document_windows, loss_by_position
from mutune.training.config import RunSpec, StageConfig
from mutune.training.run import Run

SWITCHED, CONTROL = "switched", "control"


def arms(trunk: StageConfig, factor: int, num_steps: int) -> dict[str, tuple[StageConfig, StageConfig]]:
    """Stages of both arms: after the trunk, `num_steps` at `factor` times its context, or at its own, of equal tokens.

    The second stage has the same range of the tokens in both.
    """
    longer = StageConfig(factor * trunk.context_length, trunk.batch_sequences // factor, num_steps)
    return {SWITCHED: (trunk, longer), CONTROL: (trunk, replace(trunk, num_steps=num_steps))}


def curves(
    spec: RunSpec, factor: int, num_steps: int, seeds: Iterable[int], num_windows: int | None = None
) -> Iterator[dict[str, Any]]:
    """A row for each arm, seed and bin of positions: the loss of the finished run on long held-out documents.

    Args:
        spec: the trunk's run, of one stage.
    """
    for seed in seeds:
        runs = pair(replace(spec, seed=seed), factor, num_steps)
        corpus, context = runs[SWITCHED].corpus, runs[SWITCHED].spec.stages[-1].context_length
        documents = document_windows(corpus.heldout, corpus.heldout_ends, context, num_windows)
        for arm, run in runs.items():
            for row in loss_by_position(run.model, documents):
                longest = max(stage.context_length for stage in run.spec.stages)
                yield {"arm": arm, "context": longest, "seed": seed, **asdict(row)}


def pair(spec: RunSpec, factor: int, num_steps: int) -> dict[str, Run]:
    """Both arms, trained to their ends."""
    runs = forked(spec, factor, num_steps)
    for run in runs.values():
        _train(run, spec.num_steps, num_steps)
    return runs


def forked(spec: RunSpec, factor: int, num_steps: int) -> dict[str, Run]:
    """Both arms at the end of the trunk, which is trained once."""
    (trunk,) = spec.stages
    stages = arms(trunk, factor, num_steps)
    runs = {arm: Run(replace(spec, stages=stages[arm]), torch.device("cpu")) for arm in stages}
    first, second = runs.values()
    _train(first, 0, trunk.num_steps)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    return runs


def _train(run: Run, start: int, num_steps: int) -> None:
    records = list(islice(run.steps(start), num_steps))
    assert len(records) == num_steps
    assert not records[-1]["diverged"]
