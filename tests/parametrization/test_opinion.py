"""The second opinion: `mup.MuAdamW` on the same tensors."""

from dataclasses import replace

import pytest
from torch import nn

from examples.llama import LlamaShape, build
from mutune.parametrization import opinion
from mutune.parametrization.infer import Family
from mutune.parametrization.opinion import Disagreement, mup_opinion
from mutune.parametrization.roles import Role
from mutune.parametrization.rules import MUP
from tests.parametrization.test_any_model import EXPERTS, Mixture, decoder_family
from tests.training.tiny import BASE


@pytest.mark.parametrize("tied", [True, False])
def test_mup_agrees_on_every_tensor_of_the_decoder(tied: bool) -> None:
    base = replace(BASE, tied=tied)
    for shape in (base, replace(base, width=48), replace(base, width=64, depth=3)):
        assert mup_opinion(decoder_family(base), shape) == []


def test_mup_has_no_rule_for_keys_and_values_of_a_fixed_width() -> None:
    family = Family(build, LlamaShape(16, kv_heads=1), LlamaShape(32, kv_heads=1))
    found = mup_opinion(family, LlamaShape(64, kv_heads=1))
    assert {d.tensor for d in found} == {f"layers.{i}.attn.{w}.weight" for i in (0, 1) for w in ("wk", "wv")}
    assert {(d.ours, d.theirs) for d in found} == {(0.25, 1.0)}
    assert all("mup takes it for an output" in d.why_not for d in found)


def test_mup_agrees_on_the_llama_whose_keys_grow() -> None:
    family = Family(build, LlamaShape(32, kv_heads=2), LlamaShape(64, kv_heads=4))
    assert mup_opinion(family, LlamaShape(96, kv_heads=6)) == []


def test_mup_takes_the_ratio_of_experts_from_their_outputs() -> None:
    def experts(shape: tuple[int, int]) -> nn.Module:
        model = Mixture(shape[0], depth=1)
        moe = model.get_submodule("layers.0.moe")
        moe.w_in = nn.Parameter(moe.get_parameter("w_in")[..., : shape[1]].detach().clone())
        moe.w_out = nn.Parameter(moe.get_parameter("w_out")[:, : shape[1]].detach().clone())
        return model

    found = mup_opinion(Family(experts, (16, 40), (32, 80), roles=EXPERTS), (64, 120))
    ratios = {d.tensor: (d.ours, d.theirs) for d in found}
    assert ratios == {
        "layers.0.moe.router.weight": (0.25, 1.0),
        "layers.0.moe.w_in": (1 / 4, 1 / 3),
        "layers.0.moe.w_out": (1 / 3, 1 / 4),
    }
    assert all(d.why_not for d in found)


def test_a_tensor_that_mup_refuses_is_listed() -> None:
    def cube(width: int) -> nn.Module:
        model = nn.Module()
        model.w = nn.Parameter(nn.init.zeros_(nn.Linear(width * width, width).weight.view(width, width, width)))
        return model

    found = mup_opinion(Family(cube, 4, 8, roles={"w": Role("hidden", fan_in=2)}), 12)
    assert [(d.tensor, d.ours, d.theirs, bool(d.why_not)) for d in found] == [("w", 1 / 3, None, True)]


def test_a_wrong_rate_where_the_rules_of_mup_apply_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = replace(MUP.rules["hidden"], lr=-0.5)
    monkeypatch.setattr(opinion, "MUP", replace(MUP, rules={**MUP.rules, "hidden": hidden}))
    found = mup_opinion(decoder_family(replace(BASE, depth=1)), replace(BASE, width=64, depth=1))
    assert Disagreement("h.0.attn.c_attn.weight", 0.5, 0.25, "") in found
    assert {d.why_not for d in found} == {""}
