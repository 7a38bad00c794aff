"""BTLM-3B-8K's published per-tensor values, through the path that every run takes.

Sources: Cerebras modelzoo Release_2.0.2, params_btlm_2p7b_{2k,8k}.yaml (standard deviations printed to the last digit
there), and config.json of cerebras/btlm-3b-8k-base (multipliers).
"""

import dataclasses

import pytest

from mutune.model.shape import BaseConfig, ModelConfig, base_shape, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import Plan, make_plan
from mutune.parametrization.rules import get_table

PUBLISHED = BaseHyperparameters(
    learning_rate=0.012, init_std=0.073, embedding_multiplier=14.6, output_multiplier=2.22, weight_decay=0.1
)
DECLARED = BaseConfig(width=256, depth=32, ffn_width=682.6)
HIDDEN = ("attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_fc2.weight")
RESIDUAL = ("attn.c_proj.weight", "mlp.c_proj.weight")
LAST = 2e-16  # relative; one unit in the last place of a double


def btlm_plan(width: int = 2560, base: BaseConfig = DECLARED, hyperparameters: BaseHyperparameters = PUBLISHED) -> Plan:
    shape = ModelConfig(width=width, depth=32, num_heads=32)
    return make_plan(
        get_table("btlm"),
        tensor_specs(shape, vocab_size=50257),
        base_shape(base, like=shape),
        hyperparameters,
        depth=shape.depth,
        head_size=shape.size_per_head,
    )


def test_initial_standard_deviations_equal_the_published_ones_to_the_last_digit() -> None:
    rows = btlm_plan().parameters
    assert rows["wte.weight"].init_std == 0.073
    for block in range(32):
        for name in HIDDEN:
            assert rows[f"h.{block}.{name}"].init_std == 0.023084626919229165
        for name in RESIDUAL:
            assert rows[f"h.{block}.{name}"].init_std == 0.0028855783649036457


def test_matrices_are_truncated_normals_with_the_smaller_realised_deviation() -> None:
    rows = btlm_plan().parameters
    for name, realised in (
        ("wte.weight", 0.0642126733),
        ("h.0.attn.c_attn.weight", 0.0203058302),
        ("h.31.mlp.c_proj.weight", 0.0025382288),
    ):
        assert rows[name].init == "truncated_normal"
        assert rows[name].init_std_realised == pytest.approx(realised, abs=5e-11)


def test_rates_decays_and_their_products_equal_the_published_ones() -> None:
    for name, row in btlm_plan().parameters.items():
        if name == "wte.weight":
            rate, decay = 0.012, 0.1
        elif name.endswith((*HIDDEN, *RESIDUAL)):
            rate, decay = 0.0012, 0.1
        else:
            rate, decay = 0.012, 0.0
        assert row.peak_lr == pytest.approx(rate, rel=LAST), name
        assert row.weight_decay == decay, name
        assert row.peak_lr * row.weight_decay == pytest.approx(rate * decay, rel=2 * LAST), name
        assert row.adam_eps == 1e-8, name  # not scaled in the published recipe


def test_gains_start_at_one_and_biases_at_zero() -> None:
    rows = btlm_plan().parameters
    assert {row.init for name, row in rows.items() if name.endswith("bias")} == {"zeros"}
    assert {row.init for row in rows.values() if row.role == "gain"} == {"ones"}
    assert {row.init_std for row in rows.values() if row.role in ("gain", "bias")} == {0.0}


def test_forward_multipliers_equal_the_published_ones() -> None:
    sites = btlm_plan().multipliers
    assert {name: site.value for name, site in sites.items()} == {
        "embedding": 14.6,
        "attention_logits": 0.0125,  # 1 / 80, not 1 / sqrt(80)
        "residual.attn": 1.0,
        "residual.mlp": 1.0,
        "output": pytest.approx(0.222, rel=LAST),
    }
    assert sites["output"].tensor == sites["embedding"].tensor == "wte.weight"


@pytest.mark.parametrize(
    ("width", "m", "rate", "std_hidden", "std_residual", "output"),
    [
        (256, 1, 0.012, 0.073, 0.009125, 2.22),
        (512, 2, 0.006, 0.05161879502661796, 0.006452349378327245, 1.11),
        (1024, 4, 0.003, 0.0365, 0.0045625, 0.555),
        (2560, 10, 0.0012, 0.023084626919229165, 0.0028855783649036457, 0.222),
        (4096, 16, 0.00075, 0.01825, 0.00228125, 0.13875),
    ],
)
def test_the_width_sweep_follows_the_theory(
    width: int, m: int, rate: float, std_hidden: float, std_residual: float, output: float
) -> None:
    plan = btlm_plan(width)
    hidden, residual = plan.parameters["h.7.attn.c_attn.weight"], plan.parameters["h.7.attn.c_proj.weight"]
    assert hidden.width_mult == residual.width_mult == m
    assert hidden.init_std == std_hidden
    assert residual.init_std == std_residual
    assert hidden.peak_lr == residual.peak_lr == pytest.approx(rate, rel=LAST)
    assert plan.multipliers["output"].value == pytest.approx(output, rel=LAST)
    assert plan.parameters["wte.weight"].init_std == 0.073
    assert plan.parameters["wte.weight"].peak_lr == 0.012


def test_the_declared_feed_forward_base_makes_its_ratio_exactly_ten() -> None:
    assert btlm_plan().parameters["h.0.mlp.c_proj.weight"].width_mult == 10.0


@pytest.mark.parametrize(("ffn_width", "ratio"), [(None, 6826 / 682), (682.0, 10.0087976540), (683.0, 9.9941434846)])
def test_a_base_of_integer_sizes_gives_each_tensor_its_own_ratio(ffn_width: float | None, ratio: float) -> None:
    rows = btlm_plan(base=BaseConfig(width=256, depth=32, ffn_width=ffn_width)).parameters
    assert rows["h.0.mlp.c_proj.weight"].width_mult == pytest.approx(ratio, rel=1e-10)
    assert rows["h.0.mlp.c_proj.weight"].peak_lr == pytest.approx(0.012 / ratio, rel=1e-10)
    assert rows["h.0.mlp.c_fc.weight"].width_mult == 10.0  # reads the model width


def test_another_base_rate_moves_every_rate_and_nothing_else() -> None:
    before = btlm_plan().parameters
    after = btlm_plan(hyperparameters=dataclasses.replace(PUBLISHED, learning_rate=0.024)).parameters
    for name, row in after.items():
        assert row == dataclasses.replace(before[name], peak_lr=2 * before[name].peak_lr)


def test_four_times_the_width_quarters_matrix_rates_and_halves_their_deviations() -> None:
    narrow, wide = btlm_plan(1024).parameters, btlm_plan(4096).parameters
    for name in ("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc2.weight"):
        assert wide[name].peak_lr == narrow[name].peak_lr / 4
        assert wide[name].init_std == narrow[name].init_std / 2
    for name in ("wte.weight", "h.0.ln_1.weight", "ln_f.bias", "h.0.attn.c_attn.bias"):
        assert wide[name].peak_lr == narrow[name].peak_lr
        assert wide[name].init_std == narrow[name].init_std
