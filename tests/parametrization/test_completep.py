"""CompleteP: Table 1 of arXiv:2505.01618 cell by cell, its golden numbers, and what depth does to training.

m_N = width / base width, m_L = depth / base depth, α in [1/2, 1].
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mutune.model.decoder import Decoder
from mutune.model.shape import BaseConfig, ModelConfig, base_shape, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Plan, make_plan
from mutune.parametrization.rules import BTLM, MUP, Table, completep
from tests.training import tiny

HYPER = BaseHyperparameters(learning_rate=0.02, init_std=0.08, weight_decay=0.1, adam_eps=1e-12)
BASE = BaseConfig(width=256, depth=2, ffn_width=682.6)
TARGET = ModelConfig(width=2560, depth=32, head_size=80)
SMALLER = ModelConfig(width=512, depth=6, head_size=64, ffn_width=1365)


def plan_of(shape: ModelConfig, table: Table) -> Plan:
    untied = replace(shape, tied=False)
    return make_plan(
        table,
        tensor_specs(untied, tiny.VOCAB),
        base_shape(replace(BASE, ffn_width=shape.ffn * BASE.width / shape.width), like=untied),
        HYPER,
        depth=shape.depth,
        head_size=shape.size_per_head,
    )


# ------------------------------------------------------------------------------------------------ Table 1, cell by cell
@dataclass(frozen=True)
class Cells:
    """A row of Table 1 as factors over the base: of the init variance, the rate, the decay, and ε."""

    variance: float
    lr: float
    wd: float
    eps: float


def table_1(name: str, m_N: float, m_L: float, alpha: float) -> Cells:
    """The row that rules a tensor. Gains start at 1 and biases at 0, and neither is decayed here."""
    inside = name.startswith("h.")
    eps = m_N**-1 * m_L**-alpha if inside else m_N**-1
    if name.startswith("ln_f"):
        return Cells(0.0, 1.0, 0.0, eps)
    if ".ln_" in name or name.endswith("bias"):
        return Cells(0.0, m_L ** (alpha - 1), 0.0, eps)
    if inside:
        return Cells(m_N**-1, m_N**-1 * m_L ** (alpha - 1), m_N, eps)
    return Cells(1.0, 1.0, 1.0, eps)  # embedding and unembedding


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
@pytest.mark.parametrize("shape", [SMALLER, TARGET], ids=["512x6", "2560x32"])
def test_every_cell_of_table_1(shape: ModelConfig, alpha: float) -> None:
    m_N, m_L = shape.width / BASE.width, shape.depth / BASE.depth
    plan = plan_of(shape, completep(alpha))
    for name, row in plan.parameters.items():
        cells = table_1(name, m_N, m_L, alpha)
        found = Cells((row.init_std / 0.08) ** 2, row.peak_lr / 0.02, row.weight_decay / 0.1, row.adam_eps / 1e-12)
        assert vars(found) == pytest.approx(vars(cells), rel=1e-14), name
        assert (row.lr_mult, row.wd_mult, row.eps_mult) == pytest.approx((cells.lr, cells.wd, cells.eps), rel=1e-14)
    assert {site: row.value for site, row in plan.multipliers.items()} == pytest.approx(
        {
            "embedding": 1.0,
            "attention_logits": 1 / shape.size_per_head,
            "residual.attn": m_L**-alpha,
            "residual.mlp": m_L**-alpha,
            "output": m_N**-1,
        },
        rel=1e-14,
    )


@pytest.mark.parametrize(
    ("alpha", "hidden_lr", "vector_lr", "residual", "eps", "decay"),
    [(1.0, 0.1, 1.0, 0.0625, 0.00625, 10.0), (0.5, 0.025, 0.25, 0.25, 0.025, 10.0)],
)
def test_the_golden_numbers_at_width_2560_and_depth_32(
    alpha: float, hidden_lr: float, vector_lr: float, residual: float, eps: float, decay: float
) -> None:
    plan = plan_of(TARGET, completep(alpha))
    hidden = plan.parameters["h.17.mlp.c_fc.weight"]
    assert (hidden.width_mult, hidden.depth_mult) == (10.0, 16.0)
    assert hidden.lr_mult == pytest.approx(hidden_lr, rel=1e-15)
    assert (hidden.eps_mult, hidden.wd_mult) == (pytest.approx(eps, rel=1e-15), decay)
    for name in ("h.17.ln_1.weight", "h.17.ln_2.bias", "h.17.attn.c_proj.bias"):
        assert plan.parameters[name].lr_mult == vector_lr
    for name in ("wte.weight", "lm_head.weight", "ln_f.weight", "ln_f.bias"):
        assert (plan.parameters[name].lr_mult, plan.parameters[name].eps_mult) == (1.0, 0.1)
    assert plan.multipliers["residual.attn"].value == plan.multipliers["residual.mlp"].value == residual


@pytest.mark.parametrize("alpha", [0.5, 0.75, 1.0])
def test_at_the_base_depth_completep_is_mup(alpha: float) -> None:
    shape = replace(TARGET, depth=2)
    plan, mup = plan_of(shape, completep(alpha)), plan_of(shape, MUP)
    assert plan.parameters == mup.parameters
    assert values(plan) == values(mup)


def test_away_from_the_base_depth_completep_is_not_mup() -> None:
    assert plan_of(TARGET, completep()).parameters != plan_of(TARGET, MUP).parameters
    assert values(plan_of(TARGET, completep())) != values(plan_of(TARGET, MUP))


def values(plan: Plan) -> Mapping[str, float]:
    return {site: row.value for site, row in plan.multipliers.items()}


def test_one_table_has_one_depth_rule() -> None:
    """The branches are scaled or the initial 1/sqrt(2L) is there, never both."""
    deep, shallow = (plan_of(replace(TARGET, depth=depth), completep()) for depth in (32, 2))
    for name in ("h.0.attn.c_proj.weight", "h.0.mlp.c_proj.weight"):
        assert deep.parameters[name].init_std == shallow.parameters[name].init_std
    btlm = plan_of(TARGET, BTLM)
    assert btlm.parameters["h.0.attn.c_proj.weight"].init_std == pytest.approx(0.08 / math.sqrt(10 * 64), rel=1e-15)
    assert values(btlm)["residual.attn"] == values(btlm)["residual.mlp"] == 1.0


# ------------------------------------------------------------------------------------------ what depth does to training
DEPTHS, SEEDS, WIDTH = (2, 4, 8, 16), (0, 1), 32
SMALL_STEP = replace(tiny.HYPER, learning_rate=0.002)  # at ten times this rate, the first step is not a small one
PROBE_BT = torch.from_numpy(tiny.tiny_batches(sequences=8, time=24)(999))[:, :-1]


def with_lr_depth(table: Table, exponent: float) -> Table:
    """The same table with another power of m_L on the rate of every tensor inside blocks."""
    inside = ("hidden", "residual_output", "gain", "bias")
    return replace(table, rules=table.rules | {r: replace(table.rules[r], lr_depth=exponent) for r in inside})


@torch.no_grad()
def activations(model: Decoder) -> dict[str, Tensor]:
    """On the probe batch: the input of every linear layer, by name, and the last residual stream, `x_L`."""
    seen: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    hooks.append(model.ln_f.register_forward_pre_hook(lambda _, inputs: seen.update(x_L=inputs[0])))
    model(PROBE_BT)
    for hook in hooks:
        hook.remove()
    return seen


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def one_step(table: Table, depth: int, seed: int) -> dict[str, float]:
    """RMS of Δx_L, and of (W_1 - W_0)·x for each kind of block matrix (mean over blocks), after one step."""
    shape = ModelConfig(width=WIDTH, depth=depth, head_size=16)
    plan = tiny.tiny_plan(shape, table, SMALL_STEP, base=replace(shape, depth=DEPTHS[0]))
    model = tiny.tiny_decoder(shape, plan, seed)
    start, before = {name: p.detach().clone() for name, p in model.named_parameters()}, activations(model)
    tiny.tiny_train(model, tiny.tiny_optimizer(model, plan), 1, rate=lambda step: 1.0, clip_norm=math.inf)
    after = activations(model)
    moved = defaultdict(list)
    for name, x in after.items():
        if name != "x_L":
            change = model.get_parameter(f"{name}.weight").detach() - start[f"{name}.weight"]
            moved[name.split(".", 2)[2]].append(rms(x @ change.T))
    return {"x_L": rms(after["x_L"] - before["x_L"]), **{matrix: float(np.mean(rs)) for matrix, rs in moved.items()}}


@cache
def depth_slopes(alpha: float, lr_depth: float | None = None) -> dict[str, float]:
    """d log2 RMS / d log2 depth, mean over seeds, of CompleteP or of one with another power of m_L on its rates."""
    table = completep(alpha) if lr_depth is None else with_lr_depth(completep(alpha), lr_depth)
    runs = [[one_step(table, depth, seed) for depth in DEPTHS] for seed in SEEDS]
    sizes = {key: np.log2([[at_depth[key] for at_depth in run] for run in runs]).mean(axis=0) for key in runs[0][0]}
    return {key: float(np.polyfit(np.log2(DEPTHS), size, 1)[0]) for key, size in sizes.items()}


MATRICES = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_fc2", "mlp.c_proj"}


def test_under_completep_the_stream_and_every_matrix_move_alike_at_every_depth() -> None:
    slopes = depth_slopes(alpha=1.0)
    assert slopes.keys() == {"x_L", *MATRICES}
    assert slopes == pytest.approx(dict.fromkeys(slopes, 0.0), abs=0.25)


def test_rates_that_also_fall_with_depth_are_found_by_the_stream_and_by_every_matrix() -> None:
    slopes = depth_slopes(alpha=1.0, lr_depth=-1.0)
    assert all(slope < -0.5 for slope in slopes.values()), slopes


def test_branches_over_the_root_of_depth_at_an_unchanged_rate_are_found_by_the_stream() -> None:
    slopes = depth_slopes(alpha=0.5, lr_depth=0.0)
    assert slopes["x_L"] > 0.25, slopes


def test_at_half_the_exponent_the_stream_is_even_and_the_matrices_are_lazy() -> None:
    """α = 1/2 with its own rate, m_L^(-1/2): the reason for α = 1 (arXiv:2505.01618)."""
    slopes = depth_slopes(alpha=0.5)
    assert slopes["x_L"] == pytest.approx(0.0, abs=0.25)
    assert {matrix: slopes[matrix] for matrix in MATRICES} == pytest.approx(dict.fromkeys(MATRICES, -0.5), abs=0.25)
