"""Decay modes: what each gives every tensor, what each keeps constant, and AdamW against explicit shrinkage."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mutune.errors import Refusal
from mutune.model.shape import ModelConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Decay, Plan
from mutune.parametrization.rules import DECAYS, MUP, TABLES, Table, completep
from mutune.parametrization.symmetry import moved, moved_plan
from mutune.training.schedule import ScheduleConfig, multiplier
from tests.parametrization.placements import ends, thetas_of
from tests.training.tiny import HYPER, tiny_decoder, tiny_optimizer, tiny_plan, tiny_train

BASE = ModelConfig(width=16, depth=2, head_size=16, ffn_width=40, tied=False)
WIDE = replace(BASE, width=64, ffn_width=160)  # m = 4 in every tensor
DEEP = replace(WIDE, depth=8)
NUM_STEPS = 1000
HORIZON = replace(HYPER, decay_timescale=0.1)
ALL_TABLES = [*TABLES.values(), replace(completep(0.5), name="completep(1/2)")]


def plan_of(
    table: str | Table, decay: Decay, shape: ModelConfig = WIDE, hyperparameters: BaseHyperparameters = HYPER
) -> Plan:
    return tiny_plan(shape, table, hyperparameters, base=BASE, decay=decay)


def plan_in(mode: str, table: str | Table = "mup", learning_rate: float = 0.02) -> Plan:
    """The plan of a mode, deeper and wider than its base, at a base rate."""
    hyper = replace(HORIZON if mode == "horizon" else HYPER, learning_rate=learning_rate)
    return plan_of(table, Decay(mode, num_steps=NUM_STEPS), DEEP, hyper)


# -------------------------------------------------------------------------------------------------------- golden values
# Of embedding, hidden and output; η = 0.02, λ = 0.1, m = 4. Under μP the hidden rate is 0.005, and the output's too in
# Table 3; Table 9 has 0.01 at both ends; sp_embed's embedding has 0.08.
GOLDEN: list[tuple[str, Decay, BaseHyperparameters, tuple[float, float, float]]] = [
    ("mup", Decay("table"), HYPER, (0.1, 0.4, 0.1)),
    ("mup", Decay("fixed"), HYPER, (0.1, 0.1, 0.1)),
    ("mup", Decay("scaled", 0.0), HYPER, (0.1, 0.1, 0.1)),
    ("mup", Decay("scaled", 0.5), HYPER, (0.1, 0.2, 0.1)),
    ("mup", Decay("scaled", 1.0), HYPER, (0.1, 0.4, 0.1)),
    ("mup", Decay("scaled", 2.0), HYPER, (0.1, 1.6, 0.1)),
    ("mup", Decay("independent"), replace(HYPER, weight_decay=0.002), (0.1, 0.4, 0.1)),  # 0.002 / 0.02, 0.002 / 0.005
    ("mup", Decay("horizon", num_steps=1000), HORIZON, (0.5, 2.0, 0.5)),  # 1 / (0.1 · 1000 · 0.02)
    ("mup_table3", Decay("table"), HYPER, (0.1, 0.4, 0.4)),
    ("mup_table3", Decay("scaled", 0.5), HYPER, (0.1, 0.2, 0.2)),
    ("mup_table9", Decay("table"), HYPER, (0.2, 0.4, 0.2)),
    ("mup_table9", Decay("horizon", num_steps=500), HORIZON, (2.0, 4.0, 2.0)),
    ("btlm", Decay("table"), HYPER, (0.1, 0.1, 0.1)),
    ("btlm", Decay("scaled", 1.0), HYPER, (0.1, 0.4, 0.1)),
    ("sp", Decay("scaled", 1.0), HYPER, (0.1, 0.1, 0.1)),
    ("sp_embed", Decay("table"), HYPER, (0.1, 0.1, 0.1)),
    ("sp_embed", Decay("scaled", 1.0), HYPER, (0.025, 0.1, 0.1)),
]


@pytest.mark.parametrize(
    ("table", "decay", "hyperparameters", "golden"),
    GOLDEN,
    ids=[f"{table} {decay.mode} {decay.exponent:g}" for table, decay, _, _ in GOLDEN],
)
def test_the_decays_at_four_times_the_width_are_the_golden_ones(
    table: str, decay: Decay, hyperparameters: BaseHyperparameters, golden: tuple[float, float, float]
) -> None:
    embedding, hidden, output = golden
    by_role = {"embedding": embedding, "hidden": hidden, "residual_output": hidden, "output": output}
    for row in plan_of(table, decay, hyperparameters=hyperparameters).parameters.values():
        assert row.weight_decay == pytest.approx(by_role.get(row.role, 0.0), rel=1e-14, abs=0.0), row.name


def test_completep_decays_with_width_alone_and_scaled_follows_its_rates_into_the_depth() -> None:
    """m_L = 4 at α = 1/2 halves the rates inside blocks: Table 1 leaves λ·m_N, constant rate × decay needs twice it."""
    for mode, hidden in (("table", 0.4), ("scaled", 0.8)):
        assert plan_in(mode, completep(0.5)).parameters["h.7.mlp.c_fc.weight"].weight_decay == pytest.approx(hidden)


# -------------------------------------------------------------------------------------------------- what stays constant
def shrinks(plan: Plan) -> list[float]:
    """What a step at the peak rate takes off each decayed tensor, as a share of it."""
    rows = plan.parameters.values()
    return [row.peak_lr * row.weight_decay for row in rows if row.role not in ("gain", "bias")]


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: str(table.name))
def test_scaled_by_one_keeps_rate_times_decay_the_same_in_every_tensor(table: Table) -> None:
    assert shrinks(plan_in("scaled", table)) == pytest.approx([0.02 * 0.1] * (2 + 5 * 8), rel=1e-14)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: str(table.name))
def test_scaled_by_nothing_is_fixed(table: Table) -> None:
    assert plan_of(table, Decay("scaled", 0.0), DEEP) == plan_of(table, Decay("fixed"), DEEP)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: str(table.name))
def test_independent_takes_the_stated_share_off_every_tensor_per_step(table: Table) -> None:
    assert shrinks(plan_in("independent", table)) == pytest.approx([0.1] * 42, rel=1e-14)


@pytest.mark.parametrize("table", ALL_TABLES, ids=lambda table: str(table.name))
def test_horizon_gives_every_tensor_a_timescale_of_tau_of_the_run(table: Table) -> None:
    """arXiv:2405.13698: the moving average's timescale in steps is 1 / (lr·λ)."""
    assert [shrink * NUM_STEPS * 0.1 for shrink in shrinks(plan_in("horizon", table))] == pytest.approx([1.0] * 42)


@pytest.mark.parametrize("mode", DECAYS)
def test_another_rate_leaves_the_shrink_per_step_under_independent_and_horizon_alone(mode: str) -> None:
    before, after = shrinks(plan_in(mode, learning_rate=0.02)), shrinks(plan_in(mode, learning_rate=0.06))
    factor = 1.0 if mode in ("independent", "horizon") else 3.0
    assert after == pytest.approx([factor * shrink for shrink in before], rel=1e-14)


def test_horizon_refuses_a_weight_decay_of_ones_own_and_the_others_a_timescale() -> None:
    horizon = Decay("horizon", num_steps=NUM_STEPS)
    with pytest.raises(Refusal, match=r"weight_decay=0\.7 is not read by .*decay=horizon, .* set that, for example"):
        plan_of("mup", horizon, hyperparameters=replace(HORIZON, weight_decay=0.7))
    plan_of("mup", horizon, hyperparameters=replace(HORIZON, weight_decay=0.1))  # the default, as every config holds it
    for mode in ("table", "fixed", "scaled", "independent"):
        with pytest.raises(
            Refusal, match=rf"decay_timescale=0\.1 is read by .*decay=horizon alone, and decay is {mode}"
        ):
            plan_of("mup", Decay(mode), hyperparameters=HORIZON)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fxied",), r"^decay=fxied is unknown; known decays: table, fixed, scaled, independent, horizon\.$"),
        ((None,), "^decay=None is unknown"),
        (("scaled", 2.5), r"^decay\.exponent=2\.5 must be a finite number at least 0 and at most 2"),
        (("scaled", "1"), r"^decay\.exponent='1' must be a finite number"),
        (("fixed", 0.5), r"^decay\.exponent=0\.5 belongs to decay=scaled; for example Decay\('scaled', 0\.5\)\.$"),
        (("horizon", 1.0, 0), r"^decay\.num_steps=0 must be a whole number at least 1"),
        (("horizon", 1.0, "10"), r"^decay\.num_steps='10' must be a whole number"),
    ],
)
def test_a_decay_that_cannot_be_is_refused_where_it_is_made(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        Decay(*arguments)
    Decay("scaled", 0.5, 1000)
    Decay("table", num_steps=1000)  # the length is that of every run


@pytest.mark.parametrize("mode", DECAYS)
def test_gains_and_biases_are_never_decayed(mode: str) -> None:
    rows = plan_in(mode).parameters.values()
    assert {row.weight_decay for row in rows if row.role in ("gain", "bias")} == {0.0}


@pytest.mark.parametrize(
    ("decay", "same"),
    [
        (Decay("table"), True),
        (Decay("scaled", 1.0), True),
        (Decay("independent"), True),
        (Decay("horizon", num_steps=NUM_STEPS), True),
        (Decay("fixed"), False),
        (Decay("scaled", 0.5), False),
    ],
)
def test_a_decay_in_proportion_to_one_over_the_rate_means_the_same_in_every_placement(decay: Decay, same: bool) -> None:
    hyper = HORIZON if decay.mode == "horizon" else HYPER
    exponents, plan = ends(0.5, 1.0), plan_of("mup", decay, hyperparameters=hyper)
    there = shrinks(plan_of(moved(MUP, exponents), decay, hyperparameters=hyper))
    expected = shrinks(moved_plan(plan, thetas_of(plan, exponents)))
    assert (there == pytest.approx(expected, rel=1e-14)) == same


# ------------------------------------------------------------------------------------- AdamW against explicit shrinkage
def test_independent_decay_by_adamw_is_explicit_shrinkage_by_lambda_times_the_schedule() -> None:
    shape, independent = replace(WIDE, tied=True), 0.01
    rate = multiplier(ScheduleConfig(kind="cosine", warmup_steps=3, end_ratio=0.1), 20)
    plan = plan_of("mup", Decay("independent"), shape, replace(HYPER, weight_decay=independent))
    bare = plan_of("mup", Decay("table"), shape, replace(HYPER, weight_decay=0.0))
    by_adamw, by_hand, never = (tiny_decoder(shape, plan, dtype=torch.float64) for _ in range(3))
    tiny_train(by_adamw, tiny_optimizer(by_adamw, plan), 20, rate=rate)
    tiny_train(never, tiny_optimizer(never, bare), 20, rate=rate)

    optimizer, steps = tiny_optimizer(by_hand, bare), iter(range(20))

    def shrink(*_: Any) -> None:
        factor = 1 - independent * rate(next(steps))
        for parameter in by_hand.parameters():
            if parameter.dim() == 2:
                parameter.data *= factor

    optimizer.register_step_pre_hook(shrink)
    tiny_train(by_hand, optimizer, 20, rate=rate)
    for name, parameter in by_adamw.named_parameters():
        torch.testing.assert_close(parameter, by_hand.get_parameter(name), rtol=0, atol=1e-13)
        assert not torch.equal(parameter, never.get_parameter(name))


# ------------------------------------------------------------------------------------------------------------- refusals
def test_horizon_without_its_timescale_is_refused() -> None:
    with pytest.raises(Refusal, match=r"decay=horizon needs hyperparameters\.decay_timescale, .*timescale=0\.1\.$"):
        plan_of("mup", Decay("horizon", num_steps=NUM_STEPS))


def test_horizon_without_the_length_of_the_run_is_refused() -> None:
    with pytest.raises(Refusal, match=r"needs the run's num_steps; for example .*num_steps=1000\)\.$"):
        plan_of("mup", Decay("horizon"), hyperparameters=HORIZON)


@pytest.mark.parametrize(
    ("decay", "hyperparameters", "message"),
    [
        (Decay("independent"), replace(HYPER, weight_decay=1.0), r"hyperparameters\.weight_decay=1 is, .*=0\.0001\."),
        (Decay("horizon", num_steps=100), replace(HYPER, decay_timescale=0.01), r"decay_timescale=0\.01 of 100 steps"),
    ],
)
def test_a_decay_that_takes_all_of_a_weight_in_one_step_is_refused(
    decay: Decay, hyperparameters: BaseHyperparameters, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        plan_of("mup", decay, hyperparameters=hyperparameters)
