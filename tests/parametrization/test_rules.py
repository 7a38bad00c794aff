"""The tables against their sources, cell by cell."""

from dataclasses import replace

import pytest

from mutune.parametrization.rules import BTLM, MUP, MUP_TABLE3, MUP_TABLE9, SP, SP_EMBED, TABLES, Table

INPUTS, HIDDEN = ("embedding", "position_embedding"), ("hidden", "residual_output")
VECTORS = ("gain", "bias")

# arXiv:2203.03466 Tables 3, 8 and 9, Adam, as exponents of the width. A fan that is not a width (the input's fan_in,
# the output's fan_out) is a constant. Columns: input weights, output weights, hidden weights.
TENSOR_PROGRAMS_V: list[tuple[Table, str, tuple[float, float, float]]] = [
    (MUP_TABLE3, "init variance", (0.0, -2.0, -1.0)),  # 1/fan_in, 1/fan_in², 1/fan_in
    (MUP_TABLE3, "multiplier", (0.0, 0.0, 0.0)),
    (MUP_TABLE3, "Adam LR", (0.0, -1.0, -1.0)),
    (MUP, "init variance", (0.0, 0.0, -1.0)),  # Table 8: 1/fan_in, 1, 1/fan_in
    (MUP, "multiplier", (0.0, -1.0, 0.0)),
    (MUP, "Adam LR", (0.0, 0.0, -1.0)),
    (MUP_TABLE9, "init variance", (-1.0, -1.0, -1.0)),  # 1/fan_out, 1/fan_in, 1/fan_in
    (MUP_TABLE9, "multiplier", (0.5, -0.5, 0.0)),  # √fan_out, 1/√fan_in, 1
    (MUP_TABLE9, "Adam LR", (-0.5, -0.5, -1.0)),
]


def cell(table: Table, row: str, role: str) -> float:
    """The exponent of the width in a cell of the table."""
    if row == "multiplier":
        site = {"embedding": "embedding", "position_embedding": "embedding", "output": "output"}.get(role)
        return table.sites[site].width if site else 0.0
    rule = table.rules[role]
    return 2 * rule.std if row == "init variance" else rule.lr


@pytest.mark.parametrize(
    ("table", "row", "exponents"), TENSOR_PROGRAMS_V, ids=[f"{t.name} {row}" for t, row, _ in TENSOR_PROGRAMS_V]
)
def test_the_tables_of_tensor_programs_v_are_transcribed_exactly(
    table: Table, row: str, exponents: tuple[float, float, float]
) -> None:
    for roles, exponent in zip((INPUTS, ("output",), HIDDEN), exponents, strict=True):
        for role in roles:
            assert cell(table, row, role) == exponent, role


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_inputs_of_a_block_are_embeddings_without_a_multiplier(table: Table) -> None:
    """Not moved with the embedding's site, nor raised with the embedding layer's rate."""
    unmoved = {MUP_TABLE9.name: MUP, SP_EMBED.name: SP}.get(table.name, table)
    inside = table.rules["hidden"]
    embedding = replace(unmoved.rules["embedding"], lr_depth=inside.lr_depth, eps_depth=inside.eps_depth)
    assert table.rules["input"] == embedding


@pytest.mark.parametrize("table", [MUP_TABLE3, MUP, MUP_TABLE9, BTLM], ids=lambda table: str(table.name))
def test_gains_and_biases_keep_the_base_rate_at_every_width(table: Table) -> None:
    assert {table.rules[role].lr for role in VECTORS} == {0.0}


def test_btlm_is_table_8_in_its_rates_and_multipliers_and_scales_neither_epsilon_nor_decay() -> None:
    assert {role: rule.lr for role, rule in BTLM.rules.items()} == {role: rule.lr for role, rule in MUP.rules.items()}
    assert {role: rule.std for role, rule in BTLM.rules.items()} == {role: rule.std for role, rule in MUP.rules.items()}
    assert BTLM.sites == MUP.sites
    assert {(rule.eps, rule.wd) for rule in BTLM.rules.values()} == {(0.0, 0.0)}


def test_sp_embed_is_sp_with_the_rate_of_the_embeddings_times_the_width() -> None:
    """arXiv:2605.21486."""
    assert {role: rule.lr for role, rule in SP_EMBED.rules.items() if rule != SP.rules[role]} == dict.fromkeys(
        INPUTS, 1.0
    )
    assert SP_EMBED.sites == SP.sites


def test_only_placements_that_part_embedding_and_output_need_an_untied_model() -> None:
    assert {name for name, table in TABLES.items() if table.untied} == {"mup_table3"}
