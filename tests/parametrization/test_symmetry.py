"""The abc-symmetry as algebra: which tables and plans it relates, that it is a group, and what it refuses."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mutune.errors import Refusal
from mutune.model.shape import ModelConfig
from mutune.parametrization.plan import Plan
from mutune.parametrization.rules import MUP, MUP_TABLE3, MUP_TABLE9, SP_EMBED, TABLES, Table, completep
from mutune.parametrization.symmetry import moved, moved_plan
from tests.parametrization.placements import ends, random_thetas, thetas_of
from tests.training.tiny import tiny_plan

WIDE = ModelConfig(width=64, depth=2, head_size=16)
UNTIED = replace(WIDE, tied=False, positions="learned")


#: Multiples of 1/8, whose sums are exact.
EXPONENTS = st.integers(-16, 16).map(lambda n: n / 8)
MOVES = st.builds(ends, EXPONENTS, EXPONENTS)
#: A tied SP_EMBED is the embedding's although its output has another rule, so its `untied` cannot be won back.
GROUP = [*(table for table in TABLES.values() if table is not SP_EMBED), completep(0.5)]


def test_table_3_is_table_8_with_theta_m_on_the_output() -> None:
    assert replace(moved(MUP, {"output": 1.0}), name=MUP_TABLE3.name, source=MUP_TABLE3.source) == MUP_TABLE3


def test_table_9_is_table_8_with_theta_root_m_on_the_output_and_on_the_embeddings() -> None:
    assert replace(moved(MUP, ends(0.5, 0.5)), name=MUP_TABLE9.name, source=MUP_TABLE9.source) == MUP_TABLE9


@pytest.mark.parametrize("table", GROUP, ids=lambda table: str(table.name))
@given(first=MOVES, second=MOVES)
def test_moving_twice_is_moving_by_the_sum(table: Table, first: dict[str, float], second: dict[str, float]) -> None:
    at_once = moved(table, {role: first[role] + second[role] for role in first})
    assert moved(moved(table, first), second) == at_once


@pytest.mark.parametrize("table", GROUP, ids=lambda table: str(table.name))
@given(exponents=MOVES)
def test_moving_there_and_back_changes_nothing(table: Table, exponents: dict[str, float]) -> None:
    back = {role: -exponent for role, exponent in exponents.items()}
    assert moved(moved(table, exponents), back) == table


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: str(table.name))
def test_moving_by_nothing_changes_nothing(table: Table) -> None:
    assert moved(table, {}) == moved(table, ends(0.0, 0.0)) == table


def test_a_table_stays_fit_for_a_tied_model_only_while_both_ends_move_together() -> None:
    assert not moved(MUP, ends(0.5, 0.5)).untied
    assert moved(MUP, ends(0.5, 0.25)).untied
    assert moved(MUP_TABLE3, ends(0.5, 0.5)).untied
    assert not moved(MUP_TABLE3, {"output": -1.0}).untied


@given(exponents=MOVES)
def test_the_plan_of_a_moved_table_is_the_moved_plan(exponents: dict[str, float]) -> None:
    plan = tiny_plan(UNTIED)
    after = moved_plan(plan, thetas_of(plan, exponents))
    assert_same_numbers(tiny_plan(UNTIED, moved(MUP, exponents)), after)


@pytest.mark.parametrize("shape", [WIDE, UNTIED], ids=["tied", "untied"])
@given(data=st.data())
def test_moving_a_plan_is_a_group_action_too(shape: ModelConfig, data: st.DataObject) -> None:
    plan, first, second = tiny_plan(shape), data.draw(random_thetas(shape)), data.draw(random_thetas(shape))
    product = {name: first[name] * second[name] for name in first}
    assert_same_numbers(moved_plan(moved_plan(plan, first), second), moved_plan(plan, product))
    inverse = {name: 1 / value for name, value in first.items()}
    assert_same_numbers(moved_plan(moved_plan(plan, first), inverse), plan)


def assert_same_numbers(one: Plan, other: Plan) -> None:
    """Equal up to the rounding of a few multiplications."""
    assert one.parameters.keys() == other.parameters.keys()
    for name, row in one.parameters.items():
        assert numbers(vars(row)) == pytest.approx(numbers(vars(other.parameters[name])), rel=1e-14, abs=0.0), name
    for site, value in one.multipliers.items():
        assert value.value == pytest.approx(other.multipliers[site].value, rel=1e-14, abs=0.0), site


def numbers(row: Mapping[str, object]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, float)}


def test_a_moved_tied_table_carries_its_theta_at_both_of_its_sites() -> None:
    plan = tiny_plan(WIDE)
    after = moved_plan(plan, {"wte.weight": 4.0}).multipliers
    assert {site: after[site].value / plan.multipliers[site].value for site in after} == {
        "embedding": 4.0,
        "output": 4.0,
        "attention_logits": 1.0,
        "residual.attn": 1.0,
        "residual.mlp": 1.0,
    }


def test_a_role_without_a_site_is_refused() -> None:
    with pytest.raises(Refusal, match=r"role hidden has no site that could carry its θ; those that do: \['embedding',"):
        moved(MUP, {"hidden": 1.0})


def test_roles_that_share_a_site_move_together_or_not_at_all() -> None:
    with pytest.raises(Refusal, match=r"embedding and position_embedding share the site embedding; .*0\.5, 'position"):
        moved(MUP, {"embedding": 0.5})


def test_tensors_that_share_a_site_have_one_theta() -> None:
    with pytest.raises(Refusal, match=r"wte\.weight and wpe\.weight share the site embedding; give them the same θ"):
        moved_plan(tiny_plan(UNTIED), {"wte.weight": 2.0})


def test_a_theta_of_no_tensor_is_refused() -> None:
    with pytest.raises(Refusal, match=r"theta has wte, which the plan does not; it has \['wte\.weight',"):
        moved_plan(tiny_plan(WIDE), {"wte": 2.0})


@pytest.mark.parametrize("theta", [0.0, -1.0, math.nan, math.inf])
def test_a_theta_that_is_not_a_positive_number_is_refused(theta: float) -> None:
    with pytest.raises(Refusal, match=r"theta\['wte\.weight'\]=\S+ must be a finite number above 0; .*=2\.$"):
        moved_plan(tiny_plan(WIDE), {"wte.weight": theta})
