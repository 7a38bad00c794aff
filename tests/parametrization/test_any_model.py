"""A user's own model: dimensions, roles, fan-ins, depth, sites, and one sentence for each kind of bad input."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mutune
from examples.llama import LlamaShape, build
from mutune.errors import Refusal
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family, parametrize
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name
from mutune.parametrization.parametrized import Parametrized
from mutune.parametrization.plan import Decay, TensorSpec
from mutune.parametrization.roles import Role
from mutune.parametrization.rules import TABLES, Site, completep, get_table
from tests.training.tiny import BASE, HYPER, VOCAB, tiny_plan

PLAIN = BaseHyperparameters(learning_rate=0.02, init_std=0.25, weight_decay=0.1)
RESIDUAL = {"*.wo.weight": "residual_output", "*.w2.weight": "residual_output"}


def by_name(specs: list[TensorSpec]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


# ------------------------------------------------------------------------------------- parity with the house's decoder
SWITCHES = [
    pytest.param({}, id="btlm"),
    pytest.param({"tied": False}, id="untied"),
    pytest.param({"activation": "gelu", "positions": "learned"}, id="gelu-learned"),
    pytest.param({"depth": 1}, id="one-block"),
]


def decoder_family(base: ModelConfig, **options: Any) -> Family[ModelConfig]:
    roles = {"*.c_proj.weight": "residual_output"}
    if base.positions == "learned":
        roles["wpe.weight"] = "position_embedding"
    ones = dict.fromkeys(TABLES["mup"].sites, 1.0)
    return Family(
        lambda shape: Decoder(shape, VOCAB, ones),
        base,
        replace(base, width=2 * base.width),
        roles=roles,
        head_size=lambda shape: shape.size_per_head,
        **options,
    )


@pytest.mark.parametrize("switches", SWITCHES)
def test_the_inferred_tensors_of_the_decoder_are_the_declared_ones(switches: dict[str, Any]) -> None:
    base = replace(BASE, **switches)
    family = decoder_family(base)
    for shape in (base, replace(base, width=48), replace(base, width=64, depth=5)):
        assert family.specs(shape) == tensor_specs(shape, VOCAB)


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("table", TABLES)
def test_the_inferred_plan_of_the_decoder_is_the_declared_one(table: str, switches: dict[str, Any]) -> None:
    base = replace(BASE, **switches)
    wide = replace(base, width=64, depth=base.depth + 3)
    family = decoder_family(base)
    for shape in (base, wide):
        if base.tied and TABLES[table].untied:
            with pytest.raises(Refusal, match="untie them"):
                family.plan(shape, table, HYPER)
        else:
            assert family.plan(shape, table, HYPER) == tiny_plan(shape, table, base=base)


def test_a_declared_base_is_that_of_btlm() -> None:
    base = ModelConfig(width=256, depth=32, num_heads=32)
    ones = dict.fromkeys(TABLES["btlm"].sites, 1.0)
    vectors = {"wte.weight": 256.0, "ln_f.*": 256.0, "h.*.ln_?.*": 256.0, "h.*.c_proj.bias": 256.0}
    family = Family(
        lambda shape: Decoder(shape, VOCAB, ones),
        base,
        replace(base, width=512),
        roles={"*.c_proj.weight": "residual_output"},
        head_size=80,
        base_fan_in={
            **vectors,
            "h.*.c_attn.weight": 256.0,
            "h.*.c_attn.bias": 768.0,
            "h.*.c_fc*.weight": 256.0,
            "h.*.c_fc*.bias": 682.6,
            "h.*.attn.c_proj.weight": 256.0,
            "h.*.mlp.c_proj.weight": 682.6,
        },
    )
    plan = family.plan(ModelConfig(width=2560, depth=32, num_heads=32), "btlm", HYPER)
    assert {row.width_mult for row in plan.parameters.values()} == {10.0}


# ------------------------------------------------------------------------------------------- the Llama-form example
LLAMA = LlamaShape(32)
WIDE = LlamaShape(80, depth=4)


def llama(table: str = "mup", base: LlamaShape = LLAMA, hyper: BaseHyperparameters = PLAIN) -> Family[LlamaShape]:
    return Family(build, base, replace(base, width=64), roles=RESIDUAL, head_size=lambda shape: shape.head_size)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_roles_of_the_llama_are_those_of_the_field(tied: bool) -> None:
    specs = by_name(llama(base=replace(LLAMA, tied=tied)).specs(replace(WIDE, tied=tied)))
    ends = ("embedding", "output") if tied else ("embedding",)
    assert specs["embed.weight"] == TensorSpec("embed.weight", "embedding", (31, 80), 80, sites=ends)
    assert ("head.weight" in specs) is not tied
    if not tied:
        assert specs["head.weight"] == TensorSpec("head.weight", "output", (31, 80), 80, sites=("output",))
    block = {name.removeprefix("layers.3."): spec for name, spec in specs.items() if name.startswith("layers.3.")}
    assert {name: (spec.role, spec.fan_in, spec.sites) for name, spec in block.items()} == {
        "attn_norm.weight": ("gain", 80, ()),
        "attn.wq.weight": ("hidden", 80, ("attention_logits",)),
        "attn.wk.weight": ("hidden", 80, ()),
        "attn.wv.weight": ("hidden", 80, ()),
        "attn.wo.weight": ("residual_output", 80, ("residual.attn",)),
        "mlp_norm.weight": ("gain", 80, ()),
        "mlp.w1.weight": ("hidden", 80, ()),
        "mlp.w3.weight": ("hidden", 80, ()),
        "mlp.w2.weight": ("residual_output", 216, ("residual.mlp",)),
    }
    assert {name for name, spec in specs.items() if not spec.in_block} == {
        "embed.weight",
        "norm.weight",
        *([] if tied else ["head.weight"]),
    }


def test_each_tensor_of_the_llama_has_the_ratio_of_its_own_fan_in() -> None:
    rows = llama().plan(WIDE, "mup", PLAIN).parameters
    assert rows["layers.0.attn.wk.weight"].peak_lr == 0.02 / 2.5  # its key width is fixed, its fan-in is not
    assert rows["layers.0.mlp.w1.weight"].peak_lr == 0.02 / 2.5
    assert rows["layers.0.mlp.w2.weight"].peak_lr == 0.02 / (216 / 88)  # rounded up to a multiple of 8
    assert {row.depth_mult for row in rows.values() if row.name.startswith("layers.")} == {2.0}


def test_key_widths_that_grow_change_the_ratio_of_no_fan_in() -> None:
    base, delta = replace(LLAMA, kv_heads=2), LlamaShape(64, kv_heads=4)
    grown = Family(build, base, delta, roles=RESIDUAL, head_size=16).plan(LlamaShape(96, kv_heads=6))
    fixed = llama().plan(LlamaShape(96))
    assert {name: row.lr_mult for name, row in grown.parameters.items()} == {
        name: row.lr_mult for name, row in fixed.parameters.items()
    }


def test_parametrize_gives_a_model_with_the_values_and_groups_of_its_plan() -> None:
    result = parametrize(
        build, base=LLAMA, delta=LlamaShape(64), target=WIDE, roles=RESIDUAL, head_size=16, hyperparameters=HYPER
    )
    model = result.build(seed=3)
    assert {m.site: m.value for m in model.modules() if isinstance(m, Multiplier)} == {
        "embedding": 2.0,
        "attention_logits": 1 / 16,
        "residual.attn": 1.0,
        "residual.mlp": 1.0,
        "output": 1.5 / 2.5,
    }
    assert result.unplaced == ()
    for name, parameter in model.named_parameters():
        row = result.plan.parameters[name]
        if row.init_std:
            assert parameter.std().item() == pytest.approx(row.init_std, rel=0.1), name
    optimizer = result.optimizer(model)
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: rates[p] for name, p in model.named_parameters()} == {
        name: row.peak_lr for name, row in result.plan.parameters.items()
    }


def test_completep_divides_the_branches_of_the_llama_by_its_depth_ratio() -> None:
    plan = llama().plan(WIDE, completep(), PLAIN)
    assert plan.multipliers["residual.attn"].value == plan.multipliers["residual.mlp"].value == 0.5


def test_planning_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    llama().plan(WIDE)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------- what shapes cannot say
class Experts(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, 4, bias=False)
        self.w_in = nn.Parameter(torch.randn(4, width, 3 * width))
        self.w_out = nn.Parameter(torch.randn(4, 3 * width, width))


class Mixture(nn.Module):
    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.randn(1, 5, width))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(width), "moe": Experts(width)}) for _ in range(depth)
        )
        self.norm_f = nn.RMSNorm(width)
        self.out = Multiplier("output")
        self.head = nn.Linear(width, 11)


EXPERTS: dict[str, Role | str] = {"*.moe.w_*": Role("hidden", fan_in=1), "position": "position_embedding"}


def test_experts_get_the_ratio_of_the_dimension_that_the_user_names() -> None:
    family = Family(lambda n: Mixture(n), 16, 32, roles=EXPERTS)
    specs = by_name(family.specs(64))
    assert specs["layers.1.moe.w_in"].fan_in == 64
    assert specs["layers.1.moe.w_out"].fan_in == 192
    assert specs["layers.1.moe.router.weight"].role == "hidden"  # infinite → finite, but inside a block
    assert specs["head.weight"].role == "output"
    assert (specs["head.bias"].role, specs["head.bias"].fan_in) == ("bias", 11)
    assert specs["position"] == TensorSpec("position", "position_embedding", (1, 5, 64), 64, sites=("embedding",))
    rows = family.plan(64).parameters
    assert rows["layers.0.moe.w_in"].lr_mult == rows["layers.0.moe.router.weight"].lr_mult == 0.25
    assert rows["head.bias"].width_mult == 1.0


@pytest.mark.parametrize(
    ("missing", "entry"),
    [
        ("*.moe.w_*", r"layers\.0\.moe\.w_in, 4x16x48 in a Experts.*roles={\"layers\.\*\.moe\.w_in\": "),
        ("*.moe.w_*", r"Role\(\"hidden\", fan_in=1\)"),
        ("position", r"position, 1x5x16 in a Mixture.*roles={\"position\": Role\(\"position_embedding\"\)}"),
    ],
)
def test_a_role_that_cannot_be_told_is_asked_for_with_the_entry_that_settles_it(missing: str, entry: str) -> None:
    with pytest.raises(Refusal, match=entry):
        Family(lambda n: Mixture(n), 16, 32, roles={key: role for key, role in EXPERTS.items() if key != missing})


class Conditioned(nn.Module):
    """Weights of a fixed fan-in inside blocks: of a condition (adaLN), a depthwise convolution, a table of classes."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        width, depth = shape
        self.outer = nn.Linear(3, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "modulation": nn.Linear(3, 6 * width),
                    "conv": nn.Conv1d(width, width, 4, groups=width),
                    "classes": nn.Embedding(10, width),
                    "mix": nn.Linear(width, width),
                }
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 7)


@pytest.mark.parametrize("name", ["modulation", "conv", "classes"])
def test_inputs_of_a_block_have_the_rule_of_the_embedding_without_its_multiplier(name: str) -> None:
    family = Family(Conditioned, (16, 2), (32, 2), sites={"output": "head", "residual.mlp": "blocks.?.mix"})

    def numbers(table: str) -> tuple[float, ...]:
        row = family.plan((64, 4), table, PLAIN).parameters[f"blocks.3.{name}.weight"]
        assert (row.role, row.width_mult, row.depth_mult) == ("input", 4.0, 2.0)
        return row.init_std / 0.25, row.lr_mult, row.eps_mult, row.wd_mult

    assert by_name(family.specs((64, 4)))[f"blocks.3.{name}.weight"].sites == ()
    assert by_name(family.specs((64, 4)))["outer.weight"].role == "embedding"
    assert numbers("mup") == numbers("mup_table3") == (1.0, 1.0, 1 / 4, 1.0)
    assert numbers("completep") == (1.0, 1.0, 1 / 8, 1.0)
    assert numbers("btlm") == numbers("sp") == numbers("sp_embed") == (1.0, 1.0, 1.0, 1.0)


def test_inputs_of_a_block_stay_where_they_are_when_the_embedding_moves() -> None:
    sites = {"output": "head", "embedding": "outer"}
    rows = Family(Conditioned, (16, 2), (32, 2), sites=sites).plan((64, 2), "mup_table9").parameters
    assert rows["outer.weight"].lr_mult == 0.5
    assert {rows[f"blocks.0.{name}.weight"].lr_mult for name in ("modulation", "conv", "classes")} == {1.0}


def plain_mlp(width: int, depth: int = 3) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), *hidden, nn.Linear(width, 3))


def test_a_plain_sequential_has_an_input_hidden_layers_and_an_output() -> None:
    specs = Family(plain_mlp, 16, 32).specs(64)
    assert [(s.name, s.role, s.fan_in, s.in_block) for s in specs if s.name.endswith("weight")] == [
        ("0.weight", "embedding", 64, False),
        ("2.weight", "hidden", 64, True),
        ("4.weight", "hidden", 64, True),
        ("6.weight", "hidden", 64, True),
        ("8.weight", "output", 64, False),
    ]


def test_a_head_beside_the_blocks_is_no_block() -> None:
    def stacked(width: int) -> nn.Module:
        head = nn.ModuleDict(
            {"projection": nn.Linear(width, width, bias=False), "out": nn.Linear(width, 3, bias=False)}
        )
        return nn.Sequential(*(nn.ModuleDict({"w": nn.Linear(width, width, bias=False)}) for _ in range(2)), head)

    specs = Family(stacked, 16, 32).specs(64)
    assert [(s.name, s.role, s.in_block) for s in specs] == [
        ("0.w.weight", "hidden", True),
        ("1.w.weight", "hidden", True),
        ("2.projection.weight", "hidden", False),
        ("2.out.weight", "output", False),
    ]


def test_a_plain_sequential_needs_a_multiplier_only_where_its_table_has_one() -> None:
    family = Family(plain_mlp, 16, 32)
    with pytest.raises(
        Refusal, match=r"at site output by α_out / m, .*sites={'output': '8'}, or, untied, take table=mup_table3"
    ):
        family.plan(64)
    rows = family.plan(64, "mup_table3").parameters
    assert {name: rows[name].lr_mult for name in rows if name.endswith("weight")} == {
        "0.weight": 1.0,
        "2.weight": 0.25,
        "4.weight": 0.25,
        "6.weight": 0.25,
        "8.weight": 0.25,
    }
    placed = Family(plain_mlp, 16, 32, sites={"output": "8"})
    assert placed.plan(64).multipliers["output"].value == 0.25


class ZeroCentred(nn.Module):
    """1 + w, as in Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))


@pytest.mark.parametrize(
    ("make", "name", "role"),
    [
        (nn.LayerNorm, "weight", "gain"),
        (nn.LayerNorm, "bias", "bias"),
        (nn.RMSNorm, "weight", "gain"),
        (ZeroCentred, "weight", "bias"),  # the rule is the gain's, and it starts at zero
        (lambda width: nn.Conv1d(width, 2 * width, 3), "weight", "hidden"),
        (lambda width: nn.Linear(width, width), "bias", "bias"),
    ],
)
def test_roles_by_owner_and_initial_values(make: Callable[[int], nn.Module], name: str, role: str) -> None:
    family = Family(lambda n: nn.ModuleDict({"part": make(n)}), 16, 32)
    assert by_name(family.specs(64))[f"part.{name}"].role == role


class Biased(nn.Module):
    """A Linear of its own, or a step size as in Mamba: a vector called a bias."""

    def __init__(self, width: int, name: str, start: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Linear(width, width).weight
        self.register_parameter(name, nn.Parameter(start(width)))


def step_sizes(width: int) -> Tensor:
    """The inverse softplus of 0.001 to 0.1."""
    return torch.expm1(torch.logspace(-3, -1, width)).log()


def gaussian(width: int) -> Tensor:
    return 0.02 * torch.randn(width)


@pytest.mark.parametrize(
    ("name", "start", "words"),
    [
        ("dt_bias", step_sizes, r"part\.dt_bias starts at values from -6\.907 to -2\.252, so that it is no plain bias"),
        ("dt_bias", gaussian, r"part\.dt_bias starts at values from .* roles={\"part\.dt_bias\": Role\(\"bias\"\)}"),
        ("bias", step_sizes, r"part\.bias starts at values from -6\.907 to -2\.252"),
        ("bias", lambda width: torch.full((width,), 0.5), r"part\.bias starts at values from 0\.5 to 0\.5"),
        ("bias", lambda width: torch.full((1,), -4.6), r"part\.bias starts at values from -4\.6 to -4\.6"),
    ],
)
def test_a_bias_that_starts_at_values_of_its_own_is_asked_about(
    name: str, start: Callable[[int], Tensor], words: str
) -> None:
    def build(width: int) -> nn.Module:
        return nn.ModuleDict({"part": Biased(width, name, start)})

    roles: dict[str, Role | str] = {"part.weight": Role("hidden", 1)}
    refused(words, lambda: Family(build, 16, 32, roles=roles))
    specs = by_name(Family(build, 16, 32, roles={**roles, f"part.{name}": Role("bias")}).specs(64))
    assert specs[f"part.{name}"].role == "bias"


@pytest.mark.parametrize(
    "make",
    [
        lambda width: nn.Linear(width, 1),
        lambda width: nn.Linear(1, width),
        lambda width: nn.Conv1d(width, width, 3),
        lambda width: nn.LayerNorm(width),
        lambda width: Biased(width, "bias", gaussian),
        lambda width: Biased(width, "q_bias", torch.zeros),
        lambda width: Biased(width, "dt_bias", lambda n: torch.empty(n, device="meta")),  # not known
    ],
)
def test_a_bias_at_zero_or_as_torch_draws_it_or_of_unknown_values_is_one(make: Callable[[int], nn.Module]) -> None:
    def build(width: int) -> nn.Module:
        return nn.ModuleDict({"part": make(width)})

    roles: dict[str, Role | str] = {"part.weight": Role("hidden", 0)}
    specs = Family(build, 16, 32, roles=roles).specs(64)
    assert [spec.role for spec in specs if spec.name.endswith("bias")] == ["bias"]


def test_a_convolution_sums_over_channels_and_kernel() -> None:
    family = Family(lambda n: nn.ModuleDict({"conv": nn.Conv2d(n, 2 * n, (3, 5))}), 16, 32)
    assert by_name(family.specs(64))["conv.weight"].fan_in == 64 * 15


def test_parameters_that_are_not_trained_are_left_out() -> None:
    def frozen(width: int) -> nn.Module:
        model = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False), "fixed": nn.Embedding(7, width)})
        model["fixed"].requires_grad_(False)
        return model

    assert [spec.name for spec in Family(frozen, 16, 32).specs(64)] == ["linear.weight"]


def test_blocks_that_differ_count_as_one_stack_and_experts_in_a_list_as_none() -> None:
    def alternating(shape: tuple[int, int]) -> nn.Module:
        width, depth = shape

        def layer(index: int) -> nn.Module:
            experts = [nn.Linear(width, width, bias=False) for _ in range(3)] if index % 2 else []
            return nn.ModuleDict({"attn": nn.Linear(width, width, bias=False), "experts": nn.ModuleList(experts)})

        return nn.ModuleDict({"layers": nn.ModuleList(layer(index) for index in range(depth))})

    rows = Family(alternating, (16, 2), (32, 2)).rows((64, 8), get_table("mup"))
    assert len(rows) == 8 + 4 * 3
    assert {(row.role, row.width_mult, row.depth_mult) for row in rows.values()} == {("hidden", 4.0, 4.0)}


def test_experts_in_a_model_without_blocks_are_no_depth() -> None:
    def flat(shape: tuple[int, int], name: str) -> nn.Module:
        width, number = shape
        parts = nn.ModuleList(nn.Linear(width, width) for _ in range(number))
        return nn.ModuleDict({"embed": nn.Embedding(7, width), name: parts, "head": nn.Linear(width, 7)})

    def ratios(name: str, **options: Any) -> set[float]:
        family = Family(lambda shape: flat(shape, name), (16, 2), (32, 2), **options)
        return {row.depth_mult for row in family.rows((64, 8), completep()).values()}

    assert ratios("experts") == ratios("local_experts") == {1.0}
    assert ratios("layers") == {1.0, 4.0}
    assert ratios("towers", depth=lambda shape: 1) == {1.0}


class Stacks(nn.Module):
    def __init__(self, width: int, encoder: int, decoder: int) -> None:
        super().__init__()
        self.encoder = nn.ModuleList(nn.ModuleList([nn.Linear(width, width)]) for _ in range(encoder))
        self.decoder = nn.ModuleList(nn.ModuleList([nn.Linear(width, width)]) for _ in range(decoder))


def test_depth_is_counted_in_each_stack_or_said() -> None:
    def stacks(shape: tuple[int, int, int]) -> nn.Module:
        return Stacks(*shape)

    table = replace(completep(), sites={})
    even = Family(stacks, (16, 2, 2), (32, 2, 2)).plan((64, 6, 6), table)
    assert {row.depth_mult for row in even.parameters.values() if row.role == "hidden"} == {3.0}
    with pytest.raises(Refusal, match=r"different numbers of blocks, {'encoder': 2, 'decoder': 4}.*depth=lambda"):
        Family(stacks, (16, 2, 2), (32, 2, 2)).plan((64, 2, 4), table)
    said = Family(stacks, (16, 2, 2), (32, 2, 2), depth=lambda shape: shape[2]).plan((64, 2, 4), table)
    assert {row.depth_mult for row in said.parameters.values() if row.role == "hidden"} == {2.0}


# ------------------------------------------------------------------------------------------------- sites by module name
class Bare(nn.Module):
    """A Llama without a Multiplier, as a library would ship it, with a bias on its logits."""

    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(2)
        )
        self.head = nn.Linear(width, 13)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


BRANCH = Site(width=0.5)  # no table's, but a number that is seen
BARE_SITES = {"embedding": "embed", "output": "head", "residual.mlp": "layers.?"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_named_modules_multiply_as_written_out(tied: bool) -> None:
    family = Family(lambda n: Bare(n, tied), 16, 32, sites=BARE_SITES)
    result = family.at(64, replace(get_table("mup"), sites={**get_table("mup").sites, "residual.mlp": BRANCH}), HYPER)
    model = result.build(seed=0)
    assert isinstance(model, Bare)
    with torch.no_grad():
        model.head.bias.uniform_()
        ids = torch.arange(13)[None]
        x = 2.0 * nn.functional.embedding(ids, model.embed.weight)
        for layer in model.layers:
            assert isinstance(layer, nn.Sequential)
            x = x + 2.0 * layer[3](layer[2](layer[1](layer[0](x))))
        wanted = 1.5 / 4 * x @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(ids), wanted)


def test_a_named_output_whose_input_comes_by_name_multiplies_it_too() -> None:
    class ByName(Bare):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(input=self.embed(ids))

    class ByPlace(Bare):
        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    named, placed = (
        Family(make, 16, 32, sites=BARE_SITES).at(64, "mup", HYPER).build(seed=0) for make in (ByName, ByPlace)
    )
    assert torch.equal(named(torch.arange(13)), placed(torch.arange(13)))


def test_placing_twice_is_placing_once() -> None:
    result = Family(Bare, 16, 32, sites=BARE_SITES).at(64, "mup", HYPER)
    model = result.build(seed=0)
    before = model(torch.arange(13)[None])
    result.initialise(model, seed=0)
    result.place(model)
    assert torch.equal(model(torch.arange(13)[None]), before)
    assert sum(isinstance(module, Multiplier) for module in model.modules()) == 4


# ---------------------------------------------------------------------------------------------------------- bad input
def refused(message: str, function: Callable[[], object]) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        function()
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def llama_result(**changed: Any) -> Parametrized:
    given: dict[str, Any] = {"base": LLAMA, "delta": LlamaShape(64), "target": WIDE, "roles": RESIDUAL, "head_size": 16}
    return parametrize(build, **{**given, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"delta": LLAMA}, "no dimension changes from base to delta"),
        ({"delta": LlamaShape(64, depth=3)}, "base and delta differ in more than width, for example in layers.2"),
        ({"target": LLAMA}, r"target=LlamaShape\(width=32.* has the shapes of base=.*Family\(.*\)\.at\(base\)"),
        ({"target": replace(WIDE, vocab_size=33)}, r"embed\.weight is 33x80 here and 31x32 at the base.*change it in"),
        ({"target": replace(WIDE, kv_heads=5)}, r"layers\.0\.attn\.wk\.weight is 80x80 here and 16x32 at the base"),
        ({"table": "mu"}, r"parametrization\.table=mu is unknown"),
        ({"roles": {"*.wx.weight": "hidden"}}, r"roles has the pattern \*\.wx\.weight, which matches no parameter"),
        ({"roles": {"*.wo.*": "hidden", "*.wo.weight": "hidden"}}, r"roles .* both match layers\.0\.attn\.wo\.weight"),
        ({"roles": {"*.wo.weight": "attention"}}, r"table mup has no rule for role attention of layers\.0\.attn\.wo"),
        ({"roles": {"*.wo.weight": Role("hidden", 2)}}, r"fan_in=2, but its shape 32x32 has dimensions 0 to 1"),
        ({"sites": {"output": "head"}}, "sites names head for output, where the model already has a Multiplier"),
        ({"sites": {"logits": "head"}}, "the model multiplies at site logits, which table mup does not have"),
        ({"head_size": None}, "site attention_logits is placed, and its value needs the head size"),
        ({"base_fan_in": {"*.w9.*": 3.0}}, r"base_fan_in has the pattern \*\.w9\.\*, which matches no parameter"),
        ({"base_fan_in": {"*.w1.*": 0.0}}, r"base_fan_in\['\*\.w1\.\*'\]=0\.0 must be a finite number above 0"),
        ({"base_fan_in": {"*.w1.*": 3.0, "*.w?.weight": 3.0}}, r"base_fan_in .* both match layers\.0\.mlp\.w1\.weight"),
        ({"decay": Decay("horizon")}, "decay=horizon needs"),
        ({"decay": "fxied"}, "decay=fxied is unknown; known decays: table, fixed,"),
        ({"decay": None}, r"decay=None must be the name of a decay, or a mutune\.Decay"),
        (
            {"decay": Decay("horizon", num_steps=10), "hyperparameters": {"weight_decay": 0.2}},
            r"weight_decay=0\.2 is not",
        ),
        ({"hyperparameters": {"decay_timescale": 0.2}}, r"decay_timescale=0\.2 is read by .*decay=horizon alone"),
        ({"hyperparameters": None}, "hyperparameters=None must be a dict"),
        ({"hyperparameters": {"lr": 0.1}}, r"hyperparameters\.lr is unknown; known: learning_rate"),
        (
            {"hyperparameters": {"learning_rate": "0.1"}},
            r"hyperparameters\.learning_rate='0\.1' must be a finite number",
        ),
        ({"table": None}, "table=None must be the name of a table; for example table='mup'"),
        ({"head_size": 0}, "head_size=0 must be a finite number above 0; for example head_size=64"),
        ({"head_size": "16"}, "head_size='16' must be a finite number above 0"),
        (
            {"head_size": lambda shape: shape.heads},
            r"head_size\(LlamaShape\(.*raised AttributeError: .*; it must return",
        ),
        ({"depth": 2}, "depth=2 must be a function of the shape; for example depth=lambda shape: 4"),
        ({"depth": lambda shape: 0}, r"depth\(LlamaShape\(.*=0 must be a finite number above 0"),
        ({"base": None}, r"build\(None\) raised AttributeError: .*; it must make a model at every shape"),
        ({"target": "64"}, r"build\('64'\) raised AttributeError"),
        ({"roles": ["*.wo.weight"]}, r"roles=\['\*\.wo\.weight'\] must be a dict; for example roles={"),
        ({"roles": {3: "hidden"}}, "roles has the key 3, which is no name"),
        ({"roles": {"*.wo.weight": None}}, r"roles\['\*\.wo\.weight'\]=None must name a row of the table"),
        ({"roles": {"*.wo.weight": Role("hidden", (1, 1))}}, r"fan_in=\(1, 1\), which must be a dimension or several"),
        ({"roles": {"*.wo.weight": Role("hidden", True)}}, "fan_in=True, which must be a dimension or several"),
        ({"sites": None}, "sites=None must be a dict; for example sites={'output': 'lm_head'}"),
        ({"sites": {"output": ["head"]}}, r"sites\['output'\]=\['head'\] must be the name of a module"),
        ({"base_fan_in": [3.0]}, r"base_fan_in=\[3\.0\] must be a dict"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(changed: dict[str, Any], message: str) -> None:
    refused(message, lambda: llama_result(**changed))


def test_what_is_no_model_or_none_of_the_plans_shape_is_refused() -> None:
    result = llama_result()
    model, narrow = result.build(seed=0), build(replace(WIDE, width=64))
    parameters: Any = model.parameters()
    for use in (result.place, result.optimizer, result.optimizer_groups, partial(result.initialise, seed=0)):
        refused("the model given is a generator; give the nn.Module itself", partial(use, parameters))
    before = [parameter.clone() for parameter in narrow.parameters()]
    refused(r"embed\.weight is 31x64, and the plan is for 31x80; build", lambda: result.initialise(narrow, seed=0))
    assert all(map(torch.equal, before, narrow.parameters()))
    model.get_parameter("embed.weight").requires_grad_(False)
    result.place(model)  # what is frozen after training keeps its multipliers


def test_an_optimizer_option_that_the_plan_sets_is_refused_and_any_other_is_passed_on() -> None:
    result = llama_result()
    model = result.build(seed=0)
    for option, key in (("lr", "learning_rate"), ("weight_decay", "weight_decay"), ("eps", "adam_eps")):
        refused(
            rf"optimizer has {option}=0\.5, which the plan sets .*hyperparameters={{'{key}': 0\.5}}",
            lambda: result.optimizer(model, **{option: 0.5}),  # type: ignore[arg-type]  # noqa: B023
        )
    assert result.optimizer(model, amsgrad=True, betas=(0.5, 0.9)).defaults["amsgrad"]
    bad: Any = "adamw"
    refused("optimizer 'adamw' must be a class of optimizers", lambda: result.optimizer(model, bad))


def test_rates_are_set_on_an_optimizer_of_a_plan_only() -> None:
    model = llama_result().build(seed=0)
    refused("a group without peak_lr", lambda: mutune.set_rates(torch.optim.AdamW(model.parameters()), 0.5))


def test_a_multiplier_names_its_site() -> None:
    bad: Any = 2.0
    refused(r"Multiplier\(2\.0\) must name its site; for example Multiplier\('output'\)", lambda: Multiplier(bad))


def test_what_is_close_to_a_refused_argument_is_taken() -> None:
    wanted = llama_result(hyperparameters=replace(BaseHyperparameters(), learning_rate=0.25), decay=Decay("fixed"))
    named = llama_result(hyperparameters={"learning_rate": np.float32(0.25)}, decay="fixed")
    assert named.plan == wanted.plan != llama_result(decay="fixed").plan
    assert named.hyperparameters == wanted.hyperparameters
    axis = llama_result(roles={**RESIDUAL, "*.w1.weight": Role("hidden", 1)}, head_size=lambda shape: shape.head_size)
    assert axis.plan == llama_result().plan
    deep = llama_result(depth=lambda shape: shape.depth, head_size=16.0)
    assert deep.plan == llama_result().plan


class Extra(nn.Sequential):
    """A linear model with something beside it."""

    def __init__(self, width: int, make: Callable[[int], nn.Module | nn.Parameter]) -> None:
        super().__init__(nn.Linear(4, width), Multiplier("output"), nn.Linear(width, 1))
        extra = make(width)
        if isinstance(extra, nn.Module):
            self.add_module("extra", extra)
        else:
            self.extra = extra


def with_extra(make: Callable[[int], nn.Module | nn.Parameter], **options: Any) -> Parametrized:
    return parametrize(lambda width: Extra(width, make), base=8, delta=16, target=32, **options)


@pytest.mark.parametrize("table", ["mup", "mup_table3", "btlm", "sp"])
@pytest.mark.parametrize(("role", "start"), [("gain", 1.0), (Role("bias"), 0.0)])
def test_a_scalar_is_a_gain_or_a_bias_that_no_width_scales(table: str, role: Role | str, start: float) -> None:
    untied = {"roles": {"extra": role, "2.weight": "output"}, "hyperparameters": {"learning_rate": 0.25}}
    result = with_extra(lambda width: nn.Parameter(torch.tensor(3.0)), table=table, **untied)
    row = result.plan.parameters["extra"]
    assert (row.width_mult, row.peak_lr, row.weight_decay) == (1.0, 0.25, 0.0)
    model = result.build(seed=0)
    assert model.get_parameter("extra").item() == start
    mutune.audit(model, result.optimizer(model), result.plan, at_init=True)


def test_a_scalar_without_a_role_or_with_that_of_a_matrix_is_asked_about() -> None:
    roles: list[dict[str, Role | str]] = [{}, {"extra": "hidden"}, {"extra": Role("gain", 0)}]
    for named in roles:
        make = partial(with_extra, lambda width: nn.Parameter(torch.tensor(1.0)), roles=named)
        refused(r'extra.* a scalar.*for example roles={"extra": Role\("gain"\)}\.$', make)


def test_a_layer_without_a_shape_is_refused_and_one_that_has_found_it_is_not() -> None:
    refused(r"extra\.weight has no shape before .*as in nn\.Linear", lambda: with_extra(lambda w: nn.LazyLinear(w)))

    def run_once(width: int) -> nn.Module:
        layer = nn.LazyLinear(width)
        layer(torch.zeros(1, width))
        return layer

    rows = with_extra(run_once, roles={"2.weight": "output", "extra.weight": "hidden"}).plan.parameters
    assert rows["extra.weight"].shape == "32x32"


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_empty_tensor_is_refused_only_where_its_inputs_are_counted() -> None:
    def empty(width: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(0))

    refused(r"extra of shape 0 has a fan-in of 0; .*requires_grad_", lambda: with_extra(empty, roles={"extra": "bias"}))
    frozen = with_extra(lambda width: nn.Parameter(torch.zeros(0), requires_grad=False))
    assert "extra" not in frozen.plan.parameters
    refused(r"0\.weight of shape 0x4 has a fan-in of 0", lambda: parametrize(linear, base=8, delta=16, target=0))
    assert with_extra(lambda width: nn.Linear(0, width, bias=False)).plan.parameters["extra.weight"].shape == "32x0"


def linear(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), Multiplier("output"), nn.Linear(width, 1))


@pytest.mark.parametrize("build", [None, linear(8)])
def test_what_is_not_a_builder_is_refused(build: Any) -> None:
    refused("build is a .* and must be a function from shape to a fresh model", lambda: Family(build, 8, 16))


def test_a_table_that_lacks_a_role_names_the_tensor() -> None:
    mup = get_table("mup")
    lacking = replace(mup, rules={role: rule for role, rule in mup.rules.items() if role != "gain"})
    refused(r"has no rule for role gain of layers\.0\.attn_norm\.weight", lambda: llama_result(table=lacking))


@pytest.mark.parametrize("family", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adamax])
def test_an_optimizer_of_another_family_is_refused(family: type[torch.optim.Optimizer]) -> None:
    result = llama_result()
    model = result.build(seed=0)
    refused(f"optimizer {family.__name__} is not of the family of table mup", lambda: result.optimizer(model, family))


def test_adam_is_taken_without_decay_alone() -> None:
    result = llama_result()
    refused("couples weight decay", lambda: result.optimizer(result.build(seed=0), torch.optim.Adam))
    undecayed = llama_result(hyperparameters=BaseHyperparameters(weight_decay=0.0))
    assert type(undecayed.optimizer(undecayed.build(seed=0), torch.optim.Adam)) is torch.optim.Adam


@pytest.mark.parametrize(
    ("sites", "hyper", "message"),
    [
        (
            {"embedding": "embed"},
            HYPER,
            r"at site output by α_out / m, and .* for it; put mutune\.Multiplier\('output'\).*'head'}\.$",
        ),
        (
            {"embedding": "embed"},
            PLAIN,
            r"sites={'output': 'head'}, or, untied, take table=mup_table3, which needs none\.$",
        ),
        (
            {"output": "head"},
            HYPER,
            r"at site embedding by α_emb, .*take hyperparameters\.embedding_multiplier=1 in place of \d.*"
            r"sites={'embedding': 'embed'}\.$",
        ),
        (
            {"output": "head"},
            replace(PLAIN, attention_multiplier=2.0),
            r"site attention_logits by α_attn / d_head, .*take hyperparameters\.attention_multiplier=1 in place of 2,",
        ),
        ({"output": "haed"}, PLAIN, r"sites\['output'\] has the pattern haed, which matches no module"),
    ],
)
def test_a_multiplier_without_a_place_is_refused(
    sites: dict[str, str], hyper: BaseHyperparameters, message: str
) -> None:
    refused(message, lambda: Family(Bare, 16, 32, sites=sites).at(64, "mup", hyper))


class Branches(nn.Module):
    """Blocks of the named branches."""

    def __init__(self, width: int, *branches: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(width, width) for name in branches}) for _ in range(2)
        )
        self.head = nn.Linear(width, 13)


@pytest.mark.parametrize(
    ("branches", "sites", "missing"),
    [
        (["self_attn", "mlp"], ["mlp"], "attn"),
        (["self_attn", "mlp"], ["attn"], "mlp"),
        (["self_attn", "mlp"], [], "attn"),
        (["mixer"], [], "mlp"),
        (["self_attn"], [], "attn"),
        (["self_attn", "mlp"], ["attn", "mlp"], None),
        (["mixer"], ["mlp"], None),
        (["mixer"], ["attn"], None),
        (["self_attn"], ["attn"], None),
        (["mixer", "mlp"], ["mlp"], None),
    ],
)
def test_completep_needs_places_on_the_branches_that_there_are(
    branches: list[str], sites: list[str], missing: str | None
) -> None:
    modules = dict(zip(["attn", "mlp"], [branches[0], branches[-1]], strict=True))
    named = {"output": "head"} | {f"residual.{site}": f"layers.?.{modules[site]}" for site in sites}
    family: Family[int] = Family(lambda width: Branches(width, *branches), 16, 32, sites=named)
    if missing is None:
        assert {s for s in family.at(64, "completep", PLAIN).plan.multipliers if "residual" in s} == named.keys() - {
            "output"
        }
    else:
        refused(rf"multiplies at site residual\.{missing}", lambda: family.at(64, "completep", PLAIN))


def test_the_attention_scale_may_be_left_to_the_model_and_is_recorded() -> None:
    result = Family(Bare, 16, 32, sites={"output": "head"}).at(64, "mup", PLAIN)
    assert result.unplaced == ("attention_logits",)


def test_two_sites_on_one_module_are_refused() -> None:
    result = Family(Bare, 16, 32, sites={"output": "head", "embedding": "head"}).at(64, "mup", HYPER)
    refused("head already multiplies at site output", lambda: result.build(seed=0))


def test_a_site_on_a_container_that_is_never_called_is_refused() -> None:
    result = Family(Bare, 16, 32, sites={"output": "head", "residual.mlp": "layers"}).at(64, "mup", PLAIN)
    refused("layers, named for site residual.mlp, is a container", lambda: result.build(seed=0))


def test_two_outputs_are_asked_about() -> None:
    def two(width: int) -> nn.Module:
        return nn.ModuleDict({"one": nn.Linear(width, 3), "two": nn.Linear(width, 5)})

    refused(r"one\.weight and two\.weight both look like the output", lambda: Family(two, 16, 32))
    named = Family(two, 16, 32, roles={"*.weight": "output"})
    assert [spec.role for spec in named.specs(64)] == ["output", "bias", "output", "bias"]


def test_two_parameters_in_one_memory_are_refused() -> None:
    def shared(width: int) -> nn.Module:
        embed, head = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        head.weight = nn.Parameter(embed.weight.data)
        return nn.ModuleDict({"embed": embed, "head": head})

    refused(r"embed\.weight and head\.weight share memory", lambda: Family(shared, 16, 32))


# ---------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("wrapped", "bare"),
    [
        ("h.0.attn.weight", "h.0.attn.weight"),
        ("module.h.0.attn.weight", "h.0.attn.weight"),
        ("_orig_mod.module.h.0._orig_mod.attn.weight", "h.0.attn.weight"),
        ("h.0._checkpoint_wrapped_module._fsdp_wrapped_module.attn.weight", "h.0.attn.weight"),
        ("module.h.0.attn.parametrizations.weight.original", "h.0.attn.weight"),
        ("parametrizations.weight.original", "weight"),
        ("h.0.attn.parametrizations.weight.original1", "h.0.attn.parametrizations.weight.original1"),
        ("submodule.weight", "submodule.weight"),
    ],
)
def test_canonical_names(wrapped: str, bare: str) -> None:
    assert canonical_name(wrapped) == bare


def test_the_front_offers_what_a_user_needs() -> None:
    assert mutune.parametrize is parametrize
    assert mutune.Family is Family
    assert mutune.Multiplier is Multiplier
    assert re.search("pattern", str(Family.__doc__))


def test_a_head_size_that_grows_needs_a_place_for_the_attention_scale() -> None:
    def family(head_size: Callable[[int], int]) -> Family[int]:
        return Family(Bare, 16, 32, sites={"output": "head"}, head_size=head_size)

    refused(r"the head size grows with the model, \[16, 64\]", lambda: family(lambda width: width).at(64, "mup", PLAIN))
    assert family(lambda width: 16).at(64, "mup", PLAIN).unplaced == ("attention_logits",)


@pytest.mark.parametrize("roles", [{}, {"head.weight": "output"}, {"embed.weight": "output"}])
def test_a_tied_tensor_is_both_ends_whatever_its_role_is_called(roles: dict[str, Role | str]) -> None:
    family = Family(lambda n: Bare(n, tied=True), 16, 32, roles=roles, sites={"output": "head"})
    assert by_name(family.specs(64))["embed.weight"].sites == ("embedding", "output")
    refused("gives embedding and output their own rules, and embed.weight is both", lambda: family.at(64, "mup_table3"))


def test_a_multiplier_of_what_is_not_trained_is_refused() -> None:
    def frozen(width: int) -> nn.Module:
        model = Bare(width)
        model.embed.requires_grad_(False)
        return model

    family = Family(frozen, 16, 32, sites={"output": "head", "embedding": "embed"})
    refused("multiplies at site embedding, and no trained tensor stands there", lambda: family.at(64, "mup", HYPER))


def test_a_model_that_looks_at_numbers_as_it_is_built_is_built_on_the_cpu() -> None:
    class Stochastic(Bare):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.rates = [rate.item() for rate in torch.linspace(0, 0.1, 2)]

    def plan(build: Callable[[int], nn.Module]) -> Any:
        return Family(build, 16, 32, sites={"output": "head"}).at(64, "mup", PLAIN).plan

    assert plan(Stochastic) == plan(Bare)


def test_a_builder_that_raises_at_one_shape_is_refused_with_the_shape() -> None:
    def narrow(width: int) -> nn.Module:
        if width > 32:
            raise ValueError("no room")
        return Bare(width)

    family = Family(narrow, 16, 32, sites={"output": "head"})
    refused(r"build\(64\) raised ValueError: no room", lambda: family.at(64, "mup", PLAIN))
    refused(r"build\(99\) raised ValueError: no room", lambda: Family(narrow, 99, 16))


def test_a_placement_for_untied_models_needs_an_output_of_its_own() -> None:
    class Tied(Bare):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            del self.head

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.embed(ids), self.embed.weight)

    refused(
        "table mup_table3 gives the output its own rule, and the model has no output matrix",
        lambda: Family(Tied, 16, 32).at(64, "mup_table3", PLAIN),
    )


def test_a_builder_of_something_else_is_refused() -> None:
    build_nothing: Any = lambda width: None  # noqa: E731
    refused(r"build\(shape\) returned a NoneType", lambda: Family(build_nothing, 16, 32))
    refused("a model without trainable parameters", lambda: Family(lambda width: nn.ReLU(), 16, 32))
