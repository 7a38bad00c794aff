"""A decoder small enough to train in a test, with its plan and its batches."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig, base_config, base_shape, tensor_specs
from mutune.parametrization.apply import initialise, make_optimizer
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Decay, Plan, make_plan
from mutune.parametrization.rules import Table, get_table
from mutune.training.loop import Record, train
from mutune.training.schedule import ScheduleConfig, multiplier

VOCAB = 31
BASE = ModelConfig(width=16, depth=2, head_size=16)
HYPER = BaseHyperparameters(
    learning_rate=0.02, init_std=0.25, embedding_multiplier=2.0, output_multiplier=1.5, weight_decay=0.1
)
DECAY = Decay()


def tiny_plan(
    shape: ModelConfig,
    table: str | Table = "mup",
    hyperparameters: BaseHyperparameters = HYPER,
    base: ModelConfig = BASE,
    decay: Decay = DECAY,
) -> Plan:
    return make_plan(
        get_table(table) if isinstance(table, str) else table,
        tensor_specs(shape, VOCAB),
        base_shape(base_config(base), like=shape),
        hyperparameters,
        depth=shape.depth,
        head_size=shape.size_per_head,
        decay=decay,
    )


def tiny_decoder(shape: ModelConfig, plan: Plan, seed: int = 0, dtype: torch.dtype = torch.float32) -> Decoder:
    model = Decoder(shape, VOCAB, {site: row.value for site, row in plan.multipliers.items()})
    initialise(model, plan, seed)
    return model.to(dtype)


def tiny_optimizer(model: Decoder, plan: Plan, hyperparameters: BaseHyperparameters = HYPER) -> torch.optim.AdamW:
    return make_optimizer(model, plan, betas=(hyperparameters.beta1, hyperparameters.beta2))


def tiny_batches(sequences: int = 4, time: int = 12) -> Callable[[int], np.ndarray]:
    """Step → (B, T+1) ids that can be learned: noisy counting modulo the vocabulary."""

    def batch(step: int) -> np.ndarray:
        draw = np.random.default_rng([7, step])
        counting = draw.integers(VOCAB, size=(sequences, 1)) + 3 * np.arange(time + 1)
        noise = draw.integers(VOCAB, size=counting.shape) * (draw.random(counting.shape) < 0.1)
        return (counting + noise) % VOCAB

    return batch


def tiny_train(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    *,
    start_step: int = 0,
    batch: Callable[[int], np.ndarray] | None = None,
    rate: Callable[[int], float] | None = None,
    clip_norm: float = 1.0,
    micro_sequences: int = 64,
    loss_bound: float = 100.0,
    warmup_steps: int = 3,
) -> list[Record]:
    """`mutune.training.loop.train` with defaults; all records."""
    return list(
        train(
            model,
            optimizer,
            batch or tiny_batches(),
            rate or multiplier(ScheduleConfig(warmup_steps=3, end_ratio=0.1), 50),
            start_step=start_step,
            num_steps=num_steps,
            peak_lr=HYPER.learning_rate,
            clip_norm=clip_norm,
            micro_sequences=micro_sequences,
            loss_bound=loss_bound,
            warmup_steps=warmup_steps,
        )
    )


def with_rate(learning_rate: float) -> BaseHyperparameters:
    return replace(HYPER, learning_rate=learning_rate)


def same_parameters(one: Decoder, other: Decoder) -> bool:
    """Whether all parameters have the same bits."""
    others = dict(other.named_parameters())
    return all(torch.equal(parameter, others[name]) for name, parameter in one.named_parameters())
