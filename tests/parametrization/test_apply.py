"""The plan on a live model: initial values, optimizer groups, and parity with the `mup` package."""

import math
from dataclasses import replace

import pytest
import torch

from mutune.errors import Refusal
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.apply import initial_tensor, initialise, optimizer_groups, set_rates
from tests.parametrization.mup_package import mup_optimizer, unscaled
from tests.training.tiny import (
    BASE,
    HYPER,
    VOCAB,
    same_parameters,
    tiny_decoder,
    tiny_optimizer,
    tiny_plan,
    tiny_train,
)

WIDE = ModelConfig(width=64, depth=2, head_size=16)


# ---------------------------------------------------------------------------------------------------- initial values
def test_initial_values_depend_on_the_seed_and_the_name_alone() -> None:
    """Not on the other tensors, their order, the depth, or the state of the global generator."""
    torch.manual_seed(1)
    one = tiny_decoder(WIDE, tiny_plan(WIDE))
    torch.manual_seed(2)
    deeper = replace(WIDE, depth=5, positions="learned")
    other = dict(tiny_decoder(deeper, tiny_plan(deeper)).named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(parameter, other[name]), name


def test_initialising_leaves_the_global_generator_alone() -> None:
    plan = tiny_plan(WIDE)
    model = tiny_decoder(WIDE, plan)
    before = torch.get_rng_state()
    initialise(model, plan, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("table", ["mup", "btlm"])
def test_other_seeds_and_other_names_give_other_values(table: str) -> None:
    plan = tiny_plan(WIDE, table)
    rows = plan.parameters
    draw = initial_tensor(rows["h.0.attn.c_attn.weight"], torch.Size([192, 64]), seed=0)
    assert torch.equal(draw, initial_tensor(rows["h.0.attn.c_attn.weight"], torch.Size([192, 64]), seed=0))
    for name, seed in (("h.0.attn.c_attn.weight", 1), ("h.1.attn.c_attn.weight", 0)):
        assert not torch.isclose(draw, initial_tensor(rows[name], torch.Size([192, 64]), seed)).any(dim=1).all()


def test_a_larger_deviation_scales_the_same_draw() -> None:
    row = tiny_plan(WIDE).parameters["wte.weight"]
    one, two = (initial_tensor(replace(row, init_std=std), torch.Size([VOCAB, 64]), seed=0) for std in (0.25, 0.5))
    assert torch.equal(2 * one, two)


@pytest.mark.parametrize("table", ["sp", "mup", "btlm"])
@pytest.mark.parametrize("shape", [BASE, WIDE], ids=["base", "wide"])
def test_observed_deviations_lie_within_the_sampling_interval_of_the_realised_ones(
    table: str, shape: ModelConfig
) -> None:
    plan = tiny_plan(shape, table)
    for name, parameter in tiny_decoder(shape, plan).named_parameters():
        row = plan.parameters[name]
        if row.role == "gain":
            assert (parameter == 1).all()
        elif row.role == "bias":
            assert (parameter == 0).all()
        else:
            error = 1 / math.sqrt(2 * parameter.numel())  # of a normal's sample deviation; a truncated one's is smaller
            assert parameter.std().item() == pytest.approx(row.init_std_realised, rel=4 * error), name
            assert parameter.mean().item() == pytest.approx(0, abs=4 * row.init_std / math.sqrt(parameter.numel()))


def test_truncated_values_stay_within_two_deviations_and_reach_them() -> None:
    plan = tiny_plan(WIDE, "btlm")
    for name, parameter in tiny_decoder(WIDE, plan).named_parameters():
        row = plan.parameters[name]
        if row.init == "truncated_normal":
            largest = parameter.abs().max().item()
            assert 1.9 * row.init_std < largest <= 2 * row.init_std * (1 + 1e-6), name


def test_untruncated_values_go_beyond_two_deviations() -> None:
    plan = tiny_plan(WIDE, "mup")
    weight = tiny_decoder(WIDE, plan).get_parameter("h.0.attn.c_attn.weight")
    beyond = (weight.abs() > 2 * plan.parameters["h.0.attn.c_attn.weight"].init_std).float().mean().item()
    assert beyond == pytest.approx(0.0455, abs=0.008)  # 1 - erf(sqrt(2)), four deviations of 12,288 draws


def test_a_plan_of_another_model_is_not_applied() -> None:
    with pytest.raises(Refusal, match=r"the plan has wpe\.weight, which the model does not have"):
        initialise(tiny_decoder(WIDE, tiny_plan(WIDE)), tiny_plan(replace(WIDE, positions="learned")), seed=0)


# --------------------------------------------------------------------------------------------------------- the groups
@pytest.mark.parametrize("table", ["sp", "mup", "btlm"])
def test_groups_hold_the_values_of_the_plan(table: str) -> None:
    plan = tiny_plan(WIDE, table)
    model = tiny_decoder(WIDE, plan)
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = []
    for group in tiny_optimizer(model, plan).param_groups:
        for parameter in group["params"]:
            row = plan.parameters[names[parameter]]
            assert group["lr"] == group["peak_lr"] == row.peak_lr
            assert group["weight_decay"] == row.weight_decay
            assert group["eps"] == row.adam_eps
            assert group["betas"] == (0.9, 0.95)
            seen.append(row.name)
    assert sorted(seen) == sorted(plan.parameters)


def test_tensors_with_the_same_values_share_a_group() -> None:
    model, plan = Decoder(WIDE, VOCAB, dict.fromkeys(tiny_plan(WIDE).multipliers, 1.0)), tiny_plan(WIDE)
    groups = optimizer_groups(model, plan)
    rows = plan.parameters.values()
    assert len(groups) == len({(row.peak_lr, row.weight_decay, row.adam_eps) for row in rows})
    assert len(groups) < len(plan.parameters) / 3


def test_setting_rates_multiplies_every_peak() -> None:
    plan = tiny_plan(WIDE)
    optimizer = tiny_optimizer(tiny_decoder(WIDE, plan), plan)
    for factor in (0.5, 0.0, 0.25):  # from the peak each time, not from the last rate
        set_rates(optimizer, factor)
        assert [group["lr"] for group in optimizer.param_groups] == [
            factor * group["peak_lr"] for group in optimizer.param_groups
        ]


# ----------------------------------------------------------------------------------------- parity with the mup package
PAIRS = [
    pytest.param(replace(BASE, ffn_width=40), replace(WIDE, ffn_width=160), id="ratio-4-everywhere"),
    pytest.param(BASE, WIDE, id="feed-forward-rounded-down"),  # 170 / 42, not 4
    pytest.param(replace(BASE, activation="gelu"), replace(WIDE, activation="gelu", positions="learned"), id="gelu"),
    pytest.param(BASE, replace(WIDE, width=48), id="ratio-3"),  # 0.02 / 3 and 0.02 · (1 / 3) are different doubles
    pytest.param(BASE, BASE, id="at-the-base"),
]


def groups_by_name(model: Decoder, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float, float]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["peak_lr"], group["weight_decay"], group["eps"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize(("base", "shape"), PAIRS)
def test_learning_rates_and_decays_equal_those_of_mup(base: ModelConfig, shape: ModelConfig) -> None:
    plan = tiny_plan(shape, base=base)
    ours, theirs = tiny_decoder(shape, plan), tiny_decoder(shape, plan)
    base = replace(base, positions=shape.positions)
    reference = mup_optimizer(theirs, base, unscaled(plan, HYPER.learning_rate, HYPER.weight_decay))
    assert groups_by_name(ours, tiny_optimizer(ours, plan)) == groups_by_name(theirs, reference)


@pytest.mark.parametrize(("base", "shape"), PAIRS)
def test_fifty_steps_equal_those_of_mup_bit_for_bit(base: ModelConfig, shape: ModelConfig) -> None:
    plan = tiny_plan(shape, base=base)
    ours, theirs = tiny_decoder(shape, plan), tiny_decoder(shape, plan)
    start = tiny_decoder(shape, plan)
    base = replace(base, positions=shape.positions)
    reference = mup_optimizer(theirs, base, unscaled(plan, HYPER.learning_rate, HYPER.weight_decay))
    records = tiny_train(ours, tiny_optimizer(ours, plan), 50)
    assert records == tiny_train(theirs, reference, 50)
    assert same_parameters(ours, theirs)
    assert not same_parameters(ours, start)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]  # it did learn, and so did the reference


def test_fifty_steps_differ_from_mup_at_another_epsilon() -> None:
    plan = tiny_plan(WIDE)
    ours, theirs = tiny_decoder(WIDE, plan), tiny_decoder(WIDE, plan)
    base_values = unscaled(plan, HYPER.learning_rate, HYPER.weight_decay)
    reference = mup_optimizer(theirs, BASE, lambda name: base_values(name) | {"eps": 1e-4})
    assert tiny_train(ours, tiny_optimizer(ours, plan), 50) != tiny_train(theirs, reference, 50)


def trained(table: str, shape: ModelConfig, attention_multiplier: float, num_steps: int) -> Decoder:
    plan = tiny_plan(shape, table, replace(HYPER, attention_multiplier=attention_multiplier))
    model = tiny_decoder(shape, plan)
    tiny_train(model, tiny_optimizer(model, plan), num_steps)
    return model


def test_at_the_base_shape_mup_and_sp_train_alike_bit_for_bit_at_the_same_attention_scale() -> None:
    mup_model = trained("mup", BASE, attention_multiplier=1.0, num_steps=20)  # 1 / 16
    assert same_parameters(mup_model, trained("sp", BASE, attention_multiplier=0.25, num_steps=20))  # 1/4 / sqrt(16)


def test_at_the_base_shape_mup_and_sp_differ_at_their_own_attention_scales() -> None:
    mup_model = trained("mup", BASE, attention_multiplier=1.0, num_steps=20)
    assert not same_parameters(mup_model, trained("sp", BASE, attention_multiplier=1.0, num_steps=20))


def test_away_from_the_base_shape_mup_and_sp_differ_at_the_same_attention_scale() -> None:
    mup_model = trained("mup", WIDE, attention_multiplier=1.0, num_steps=5)
    assert not same_parameters(mup_model, trained("sp", WIDE, attention_multiplier=0.25, num_steps=5))
