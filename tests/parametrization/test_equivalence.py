"""Placements of one theory train alike: the tables of Tensor Programs V, θ at random, and mup's shared readout.

float64, twenty steps with warm-up and decay, weight decay on. ε and decay are mapped with the rest and nothing is
clipped; the controls leave out one of them at a time.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.apply import initialise, set_multipliers
from mutune.parametrization.plan import Plan
from mutune.parametrization.rules import BTLM, MUP, MUP_TABLE3, MUP_TABLE9, Table, completep
from mutune.parametrization.symmetry import SITE_OF, moved, moved_plan
from mutune.training.schedule import ScheduleConfig, multiplier
from tests import soak
from tests.parametrization.mup_package import SharedReadoutDecoder, mup_optimizer
from tests.parametrization.placements import ends, random_thetas, thetas_of
from tests.training import tiny
from tests.training.tiny import BASE, VOCAB, tiny_decoder, tiny_optimizer, tiny_train

TIED = replace(BASE, width=4 * BASE.width, depth=2 * BASE.depth)
UNTIED = replace(TIED, tied=False, positions="learned", max_positions=16)
NUM_STEPS, WARMUP, CLIP_OFF = 20, 3, math.inf
RATE = multiplier(ScheduleConfig(kind="cosine", warmup_steps=WARMUP, end_ratio=0.1), NUM_STEPS)
HYPER = replace(tiny.HYPER, adam_eps=1e-8)  # large enough to show where it is not mapped
SAME = 1e-10  # nats


def tiny_plan(shape: ModelConfig, table: Table = MUP) -> Plan:
    """The plan of a shape over `BASE`."""
    return tiny.tiny_plan(shape, table, HYPER)


class Theta(nn.Module):
    """The reparametrization W = θ·W', for tensors that no site multiplies."""

    def __init__(self, theta: float) -> None:
        super().__init__()
        self.theta = theta

    def forward(self, stored: Tensor) -> Tensor:
        """W' → W."""
        return self.theta * stored

    def right_inverse(self, weight: Tensor) -> Tensor:
        """W → W'."""
        return weight / self.theta


def losses(model: Decoder, optimizer: torch.optim.Optimizer, clip_norm: float = CLIP_OFF) -> Tensor:
    """The run's losses, (NUM_STEPS,)."""
    records = tiny_train(model, optimizer, NUM_STEPS, rate=RATE, clip_norm=clip_norm)
    assert len(records) == NUM_STEPS
    return torch.tensor([record["loss"] for record in records], dtype=torch.float64)


def trained(plan: Plan, shape: ModelConfig, clip_norm: float = CLIP_OFF) -> Tensor:
    """Losses of a plan, from its own initial values."""
    model = tiny_decoder(shape, plan, dtype=torch.float64)
    return losses(model, tiny_optimizer(model, plan), clip_norm)


def trained_at(
    theta: Mapping[str, float], plan: Plan, canonical: Plan, shape: ModelConfig, clip_norm: float = CLIP_OFF
) -> Tensor:
    """Losses of `plan` from the initial values of `canonical` over θ, with θ where the model reads each tensor."""
    model = tiny_decoder(shape, canonical, dtype=torch.float64)
    set_multipliers(model, plan)
    optimizer = tiny_optimizer(model, plan)
    for name, parameter in list(model.named_parameters()):
        if plan.parameters[name].role in SITE_OF:
            parameter.data /= theta.get(name, 1.0)
        elif name in theta:
            owner, _, attribute = name.rpartition(".")
            parametrize.register_parametrization(model.get_submodule(owner), attribute, Theta(theta[name]))
    return losses(model, optimizer, clip_norm)


def largest_difference(one: Tensor, other: Tensor) -> float:
    """max |Δloss| in nats over the run, of two runs that learn."""
    for run in (one, other):
        assert run[-1] < 0.9 * run[0], run
    return (one - other).abs().max().item()


# ------------------------------------------------------------------------------------------------------ the same theory
TABLES = [
    pytest.param(MUP, MUP_TABLE3, ends(0.0, 1.0), UNTIED, id="Table 3"),
    pytest.param(MUP, MUP_TABLE9, ends(0.5, 0.5), UNTIED, id="Table 9"),
    pytest.param(MUP, MUP_TABLE9, ends(0.5, 0.5), TIED, id="Table 9, tied"),
    pytest.param(MUP, MUP_TABLE9, ends(0.5, 0.5), replace(UNTIED, width=3 * BASE.width), id="Table 9, m = 3"),
    pytest.param(MUP_TABLE3, MUP_TABLE9, ends(0.5, -0.5), UNTIED, id="Table 3 to Table 9"),
    pytest.param(BTLM, moved(BTLM, ends(-0.5, 1.0)), ends(-0.5, 1.0), UNTIED, id="btlm"),
    pytest.param(completep(0.5), moved(completep(0.5), ends(1.0, 0.5)), ends(1.0, 0.5), UNTIED, id="completep"),
]


@pytest.mark.parametrize(("table", "placement", "exponents", "shape"), TABLES)
def test_a_table_trains_like_its_other_placements(
    table: Table, placement: Table, exponents: dict[str, float], shape: ModelConfig
) -> None:
    canonical, plan = tiny_plan(shape, table), tiny_plan(shape, placement)
    theta = thetas_of(canonical, exponents)
    assert set(theta.values()) != {1.0}
    after = trained_at(theta, plan, canonical, shape)
    assert largest_difference(trained(canonical, shape), after) < SAME


@pytest.mark.parametrize("shape", [TIED, UNTIED], ids=["tied", "untied"])
@settings(max_examples=5, derandomize=True, deadline=None, phases=[Phase.generate])  # a smaller θ tells no more
@given(data=st.data())
def test_any_theta_on_every_tensor_trains_alike(shape: ModelConfig, data: st.DataObject) -> None:
    canonical, theta = tiny_plan(shape), data.draw(random_thetas(shape))
    assert theta.keys() == canonical.parameters.keys()
    after = trained_at(theta, moved_plan(canonical, theta), canonical, shape)
    assert largest_difference(trained(canonical, shape), after) < SAME


def shared_readout(clip_norm: float = CLIP_OFF) -> tuple[Tensor, Tensor]:
    """Losses of the tied canonical placement, and of the mup package's.

    mup has no embedding multiplier and no ε rule: θ = 1/α_emb on the shared table, by hand.
    """
    plan, alpha = tiny_plan(TIED), HYPER.embedding_multiplier
    sites = {site: row.value for site, row in plan.multipliers.items()}
    theirs = SharedReadoutDecoder(TIED, VOCAB, {**sites, "output": HYPER.output_multiplier / alpha})
    initialise(theirs, plan, seed=0)
    theirs.to(torch.float64).wte.weight.data *= alpha

    def values(name: str) -> dict[str, float]:
        row = plan.parameters[name]
        theta = 1 / alpha if row.role == "embedding" else 1.0
        decay = 0.0 if row.role in ("gain", "bias") else HYPER.weight_decay
        return {"lr": HYPER.learning_rate / theta, "weight_decay": decay * theta, "eps": row.adam_eps * theta}

    optimizer = mup_optimizer(theirs, replace(BASE, depth=TIED.depth), values)
    return trained(plan, TIED, clip_norm), losses(theirs, optimizer, clip_norm)


def test_the_tied_canonical_placement_trains_like_the_shared_readout_of_mup() -> None:
    assert largest_difference(*shared_readout()) < SAME


# --------------------------------------------------------------------------------------------------- and what breaks it
def unmapped(column: str) -> float:
    """max |Δloss| of Table 3 against the canonical placement when one column of its plan is not moved."""
    canonical, plan = tiny_plan(UNTIED, MUP), tiny_plan(UNTIED, MUP_TABLE3)
    rows = {
        name: replace(row, **{column: getattr(canonical.parameters[name], column)})
        for name, row in plan.parameters.items()
    }
    assert rows != plan.parameters
    after = trained_at(thetas_of(canonical, {"output": 1.0}), replace(plan, parameters=rows), canonical, UNTIED)
    return largest_difference(trained(canonical, UNTIED), after)


def test_an_unmapped_epsilon_of_1e_8_shows() -> None:
    assert unmapped("adam_eps") > 1e-8


def test_an_unmapped_decay_shows() -> None:
    assert unmapped("weight_decay") > 1e-6


def test_an_unmapped_rate_shows() -> None:
    assert unmapped("peak_lr") > 1e-2


def test_unmapped_initial_values_show() -> None:
    canonical, plan = tiny_plan(UNTIED, MUP), tiny_plan(UNTIED, MUP_TABLE3)
    assert largest_difference(trained(canonical, UNTIED), trained_at({}, plan, canonical, UNTIED)) > 1e-2


def placements(clip_norm: float) -> dict[str, float]:
    """max |Δloss| against the canonical placement, by name."""
    canonical, draw = tiny_plan(UNTIED), np.random.default_rng(0)
    random = {name: 2.0 ** draw.uniform(-6, 6) for name in canonical.parameters}
    random["wpe.weight"] = random["wte.weight"]
    plans = {
        "mup_table3": (thetas_of(canonical, ends(0.0, 1.0)), tiny_plan(UNTIED, MUP_TABLE3)),
        "mup_table9": (thetas_of(canonical, ends(0.5, 0.5)), tiny_plan(UNTIED, MUP_TABLE9)),
        "θ = 2^U(-6, 6) on every tensor": (random, moved_plan(canonical, random)),
    }
    before = trained(canonical, UNTIED, clip_norm)
    return {
        name: largest_difference(before, trained_at(theta, plan, canonical, UNTIED, clip_norm))
        for name, (theta, plan) in plans.items()
    } | {"mup.MuSharedReadout, tied": largest_difference(*shared_readout(clip_norm))}


def test_clipping_sees_the_placement() -> None:
    """The global gradient norm is not invariant: with clipping, equivalent placements train differently."""
    for name, difference in placements(clip_norm=1.0).items():
        assert difference > 1e-6, name


@pytest.mark.soak
def test_soak_how_much_clipping_parts_equivalent_placements() -> None:
    rows: list[dict[str, Any]] = [
        {
            "placement": name,
            "clip": "off" if clip_norm == CLIP_OFF else clip_norm,
            "largest Δloss, nats": f"{difference:.1e}",
        }
        for clip_norm in (CLIP_OFF, 2.0, 1.0)
        for name, difference in placements(clip_norm).items()
    ]
    title = "Placements of μP against the canonical one: 20 steps at 4 times the base width, float64"
    soak.record("equivalence", title, rows)
    assert all(float(row["largest Δloss, nats"]) < SAME for row in rows if row["clip"] == "off")
