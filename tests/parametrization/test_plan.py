"""The plan: which tensor gets which number, for every table."""

import csv
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutune.errors import Refusal
from mutune.model.shape import ModelConfig, base_config, base_shape, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import BaseShape, Plan, TensorSpec, base_of, kind, make_plan
from mutune.parametrization.rules import TABLES, TRUNCATED_STD_RATIO, get_table

HYPER = BaseHyperparameters(
    learning_rate=0.02, init_std=0.08, embedding_multiplier=4.0, output_multiplier=3.0, weight_decay=0.1
)
BASE = ModelConfig(width=32, depth=2, ffn_width=96)
WIDE = ModelConfig(width=128, depth=2, ffn_width=384)
MATRICES = ("hidden", "residual_output")
VECTORS = ("embedding", "position_embedding", "gain", "bias")


def plan_of(
    table: str, shape: ModelConfig, base: ModelConfig = BASE, hyperparameters: BaseHyperparameters = HYPER
) -> Plan:
    return make_plan(
        get_table(table),
        tensor_specs(shape, vocab_size=96),
        base_shape(base_config(base), like=shape),
        hyperparameters,
        depth=shape.depth,
        head_size=shape.size_per_head,
    )


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("positions", ["alibi", "learned"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_every_tensor_of_every_variant_has_a_rule_in_every_table(table: str, positions: str, activation: str) -> None:
    tied = not get_table(table).untied
    shape = ModelConfig(width=128, depth=2, positions=positions, activation=activation, tied=tied)
    plan = plan_of(table, shape)
    assert list(plan.parameters) == [spec.name for spec in tensor_specs(shape, vocab_size=96)]


def test_a_role_without_a_rule_is_refused() -> None:
    specs = [TensorSpec("h.0.router.weight", "router", (4, 8), 8)]
    with pytest.raises(
        Refusal, match=r"table mup has no rule for role router of h\.0\.router\.weight; it rules \['emb"
    ):
        make_plan(get_table("mup"), specs, base_of(specs, depth=1), HYPER, depth=1, head_size=8)


def test_a_tensor_that_the_base_lacks_is_refused() -> None:
    shape = ModelConfig(width=128, depth=2, positions="learned")
    with pytest.raises(Refusal, match=r"the base shape has no tensor wpe\.weight; build it with the same switches"):
        make_plan(
            get_table("mup"),
            tensor_specs(shape, vocab_size=96),
            base_shape(base_config(BASE), like=BASE),
            HYPER,
            depth=2,
            head_size=16,
        )


def test_an_unknown_table_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Refusal, match=r"parametrization\.table=mu is unknown; known tables: btlm, completep, mup,"):
        get_table("mu")


def test_the_tied_table_is_one_row() -> None:
    names = list(plan_of("mup", WIDE).parameters)
    assert names.count("wte.weight") == 1
    assert not [name for name in names if "head" in name]


@pytest.mark.parametrize("table", ["mup", "sp", "btlm"])
def test_at_the_base_shape_nothing_changes(table: str) -> None:
    for row in plan_of(table, BASE).parameters.values():
        assert (row.width_mult, row.depth_mult, row.lr_mult, row.eps_mult) == (1.0, 1.0, 1.0, 1.0)
        assert row.wd_mult == (0.0 if row.role in ("gain", "bias") else 1.0)
        assert row.peak_lr == 0.02
        assert row.adam_eps == get_table(table).adam_eps
        if table != "btlm" and row.role in ("embedding", *MATRICES):
            assert row.init_std == row.init_std_realised == 0.08


def test_at_the_base_shape_mup_and_sp_differ_in_the_attention_scale_alone() -> None:
    mup, sp = plan_of("mup", BASE), plan_of("sp", BASE)
    assert mup.parameters == sp.parameters
    different = {site for site in mup.multipliers if mup.multipliers[site].value != sp.multipliers[site].value}
    assert different == {"attention_logits"}
    assert mup.multipliers["attention_logits"].value == 1 / 16
    assert sp.multipliers["attention_logits"].value == 1 / 4


def test_mup_at_four_times_the_width_has_the_golden_values() -> None:
    plan = plan_of("mup", WIDE)
    for row in plan.parameters.values():
        assert row.width_mult == 4.0
        assert row.eps_mult == 0.25
        assert row.adam_eps == 1e-12 / 4
        if row.role in MATRICES:
            assert (row.lr_mult, row.wd_mult, row.init_std) == (0.25, 4.0, 0.04)
            assert (row.peak_lr, row.weight_decay) == (0.005, 0.4)
        else:
            assert row.role in VECTORS
            assert (row.lr_mult, row.peak_lr) == (1.0, 0.02)
            assert (row.wd_mult, row.weight_decay) == ((1.0, 0.1) if row.role == "embedding" else (0.0, 0.0))
    assert plan.parameters["wte.weight"].init_std == 0.08
    assert {name: site.value for name, site in plan.multipliers.items()} == {
        "embedding": 4.0,
        "attention_logits": 1 / 16,
        "residual.attn": 1.0,
        "residual.mlp": 1.0,
        "output": 0.75,
    }


def test_mup_gives_each_matrix_the_ratio_of_its_own_fan_in() -> None:
    plan = plan_of("mup", ModelConfig(width=128, depth=2), base=ModelConfig(width=32, depth=2))  # 341 over 85
    assert plan.parameters["h.1.mlp.c_proj.weight"].peak_lr == 0.02 / (341 / 85)
    assert plan.parameters["h.1.mlp.c_fc.weight"].peak_lr == 0.005


def test_sp_has_the_same_numbers_at_every_width() -> None:
    for row in plan_of("sp", WIDE).parameters.values():
        assert (row.lr_mult, row.eps_mult, row.peak_lr) == (1.0, 1.0, 0.02)
        assert row.init_std == (0.0 if row.role in ("gain", "bias") else 0.08)


def test_an_epsilon_of_the_user_replaces_the_one_of_the_table() -> None:
    rows = plan_of("mup", WIDE, hyperparameters=BaseHyperparameters(adam_eps=8e-9)).parameters
    assert {row.adam_eps for row in rows.values()} == {2e-9}


DECAYS = st.just(0.0) | st.floats(1e-9, 1.0)  # no subnormal numbers, which have fewer digits


@given(width=st.integers(1, 512).map(lambda n: 8 * n), eta=st.floats(1e-5, 1.0), decay=DECAYS)
def test_mup_keeps_rate_times_decay_constant_across_width(width: int, eta: float, decay: float) -> None:
    shape = ModelConfig(width=width, depth=1, head_size=8)
    hyper = BaseHyperparameters(learning_rate=eta, weight_decay=decay)
    for row in plan_of("mup", shape, hyperparameters=hyper).parameters.values():
        wanted = 0.0 if row.role in ("gain", "bias") else eta * decay
        assert row.peak_lr * row.weight_decay == pytest.approx(wanted, rel=1e-14, abs=0.0)


@given(st.integers(1, 512).map(lambda n: 8 * n))
def test_btlm_lets_rate_times_decay_fall_with_width(width: int) -> None:
    shape = ModelConfig(width=width, depth=1, head_size=8)
    row = plan_of("btlm", shape).parameters["h.0.attn.c_attn.weight"]
    assert row.peak_lr * row.weight_decay == pytest.approx(0.02 * 0.1 * 32 / width, rel=1e-14)


def test_depth_multipliers_belong_to_residual_blocks() -> None:
    rows = plan_of("mup", ModelConfig(width=32, depth=6, ffn_width=96)).parameters
    assert {row.depth_mult for name, row in rows.items() if name.startswith("h.")} == {3.0}
    assert {row.depth_mult for name, row in rows.items() if not name.startswith("h.")} == {1.0}


def test_only_btlm_divides_residual_outputs_by_the_root_of_twice_the_depth() -> None:
    deep = ModelConfig(width=32, depth=8, ffn_width=96)
    name = "h.0.attn.c_proj.weight"
    assert plan_of("btlm", deep).parameters[name].init_std == 0.08 / 4
    assert plan_of("mup", deep).parameters[name].init_std == 0.08


def test_parametrization_csv_has_exactly_the_documented_columns() -> None:
    rows = list(csv.reader(io.StringIO(plan_of("btlm", WIDE).parameters_csv())))
    assert ", ".join(rows[0]) == (
        "name, role, shape, fan_in, width_mult, depth_mult, init, init_std, init_std_realised, "
        "lr_mult, wd_mult, eps_mult, peak_lr, weight_decay, adam_eps"
    )
    assert rows[1][:3] == ["wte.weight", "embedding", "96x128"]
    assert len(rows) == 1 + len(tensor_specs(WIDE, vocab_size=96))


def test_multipliers_csv_has_exactly_the_documented_columns() -> None:
    rows = list(csv.reader(io.StringIO(plan_of("mup", WIDE).multipliers_csv())))
    assert rows == [
        ["site", "tensor", "value", "formula"],
        ["embedding", "wte.weight", "4.0", "α_emb"],
        ["attention_logits", "h.*.attn.c_attn.weight", "0.0625", "α_attn / d_head"],
        ["residual.attn", "h.*.attn.c_proj.weight", "1.0", "1"],
        ["residual.mlp", "h.*.mlp.c_proj.weight", "1.0", "1"],
        ["output", "wte.weight", "0.75", "α_out / m"],
    ]


def test_csv_numbers_read_back_to_the_same_doubles() -> None:
    plan = plan_of("btlm", ModelConfig(width=48, depth=3))
    for row in csv.DictReader(io.StringIO(plan.parameters_csv())):
        assert float(row["init_std"]) == plan.parameters[row["name"]].init_std
        assert float(row["peak_lr"]) == plan.parameters[row["name"]].peak_lr


def test_the_truncation_ratio_is_its_closed_form() -> None:
    density, mass = math.exp(-2.0) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))  # φ(2) and 2·Φ(2) - 1
    assert pytest.approx(math.sqrt(1 - 4 * density / mass), rel=1e-15) == TRUNCATED_STD_RATIO


def test_kinds_replace_block_indices_only() -> None:
    assert kind("h.31.ln_1.bias") == "h.*.ln_1.bias"
    assert kind("h.3.mlp.c_fc2.weight") == "h.*.mlp.c_fc2.weight"


def test_a_base_keeps_one_fan_in_per_kind() -> None:
    base = base_shape(base_config(BASE), like=WIDE)
    assert isinstance(base, BaseShape)
    assert base.fan_in["h.*.mlp.c_proj.weight"] == 96
    assert base.fan_in["h.*.attn.c_attn.weight"] == 32


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "learning_rate",
            0.0,
            r"hyperparameters\.learning_rate=0\.0 must be a finite number above 0; for example .*=0\.01",
        ),
        ("init_std", math.nan, r"hyperparameters\.init_std=nan must be a finite number above 0"),
        ("weight_decay", -0.1, r"hyperparameters\.weight_decay=-0\.1 must be a finite number at least 0"),
        ("beta2", 1.0, r"hyperparameters\.beta2=1\.0 must be a finite number at least 0 and below 1; .*=0\.95"),
        ("adam_eps", 0.0, r"hyperparameters\.adam_eps=0\.0 must be a finite number above 0; .*=1e-12"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(key: str, value: float, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        BaseHyperparameters(**{key: value})
