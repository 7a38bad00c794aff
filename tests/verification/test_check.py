"""The coordinate check: right tables pass, wrong ones are caught and named, and the command keeps its contract."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import llama
from mutune import Family
from mutune.model.shape import ModelConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.plan import kind
from mutune.parametrization.roles import Role
from mutune.parametrization.rules import BTLM, MUP, MUP_TABLE3, MUP_TABLE9, SP, Table, completep
from mutune.verification.check import as_words, coordinate_check
from mutune.verification.coordinates import Probe, measure
from mutune.verification.places import Coordinate, tensor_places
from mutune.verification.subjects import DecoderSubject, Text
from mutune.verification.verdict import DEPTH, WIDTH, Judgement, slopes
from tests import doors
from tests.test_refusals import refuse
from tests.verification.mutants import DEEP, EVERY_ROLE, HYPER, VOCAB, Mutant, judged, mutants

#: A check for impatient tests; the full one is `make soak`'s.
QUICK: dict[str, Any] = {"widths": (64, 128, 256), "text": Text(context_length=32)}


def said(judgement: Judgement) -> str:
    return judgement.findings[0].diagnosis if judgement.findings else "nothing"


@pytest.mark.parametrize("table", [MUP, MUP_TABLE3, MUP_TABLE9], ids=lambda table: table.name)
def test_a_right_table_passes_over_width(table: Table) -> None:
    judgement = judged(table, **QUICK)
    assert judgement.passed, said(judgement)
    assert {slope.quantity for slope, _ in judgement.judged} == {"activation", "update", "weight_update", "gradient"}


def test_completep_passes_over_depth_and_its_neighbours_do_not() -> None:
    right, text = completep(), Text(context_length=32)
    assert judged(right, DEPTH, text=text).passed
    inside = [role for role, rule in right.rules.items() if rule.eps_depth]
    slow = {role: replace(right.rules[role], lr_depth=-1.0) for role in inside}
    lazy = judged(replace(right, rules={**right.rules, **slow}), DEPTH, text=text)
    assert "the learning rate of h.*." in said(lazy)
    assert "scales as m_L^-1.00, an exponent of about -1 too many" in said(lazy)
    half = completep(0.5)
    fast = {role: replace(half.rules[role], lr_depth=0.0) for role in inside}
    assert not judged(replace(half, rules={**half.rules, **fast}), DEPTH, text=text).passed
    assert not judged(MUP, DEPTH, text=text).passed


def named(what: str) -> Mutant:
    (found,) = [mutant for mutant in mutants(MUP) if mutant.what == what]
    return found


@pytest.mark.parametrize(
    ("what", "diagnosis"),
    [
        ("embedding.std +0.5", "the initial std of wte.weight scales as m^+0.50, an exponent of about +0.5 too many"),
        ("hidden.std +0.5", "the initial std of h.*.attn.c_attn.weight scales as m^+0.00, an exponent of about +0.5"),
        ("hidden.lr +0.5", "the learning rate of h.*.mlp.c_proj.weight scales as m^-1.00, an exponent"),
        ("embedding.lr -0.5", "the learning rate of wte.weight scales as m^-0.50, an exponent of about -0.5 too many"),
        ("gain.lr +0.5", ".weight scales as m^+0.50, an exponent of about +0.5 too many"),
        ("hidden.eps +0.5", "its ε scales as m^-0.50 and must follow the gradient"),
        ("site output.width -0.5", "the output multiplier scales as m^-1.50"),
        ("site attention_logits.width +0.5", "the attention scale, or the query and key before it, have +0.5 too many"),
    ],
)
def test_a_wrong_exponent_is_caught_and_named(what: str, diagnosis: str) -> None:
    judgement = judged(named(what).table, **QUICK)
    causes = [finding.diagnosis for finding in judgement.findings if not finding.consequence]
    if what == "hidden.lr +0.5":  # hidden matrices and those that write into the stream have roles of their own
        assert any("learning rate of h.*" in cause for cause in causes), causes
    else:
        assert any(diagnosis in cause for cause in causes), causes


def test_every_table_gives_at_least_forty_mutants_in_all() -> None:
    assert len(list(mutants(MUP))) >= 40
    assert len({mutant.what for mutant in mutants(completep())}) == len(list(mutants(completep())))


def test_sp_fails_and_every_unscaled_rule_is_named() -> None:
    causes = " ".join(f.diagnosis for f in judged(SP, **QUICK).findings if not f.consequence)
    for tensor in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        assert f"the initial std of h.*.{tensor}.weight scales as m^+0.00, an exponent of about +0.5" in causes
    assert "the output multiplier scales as m^+0.00" in causes


def test_a_slope_is_the_exponent_that_was_written() -> None:
    written = [
        Coordinate(size, seed, 0, "activation", "x", 0, (1 + seed) * size**exponent)
        for seed, exponent in enumerate((0.4, 0.6))
        for size in (16, 32, 128)
    ]
    (slope,) = slopes(written)
    assert slope.mean == pytest.approx(0.5)
    assert slope.half_width == pytest.approx(12.71 * math.sqrt(0.02) / math.sqrt(2))


def test_a_coordinate_that_is_not_finite_or_zero_at_one_size_has_no_power_and_one_of_zeros_is_left_out() -> None:
    def at(value: float, place: str) -> list[Coordinate]:
        return [Coordinate(size, 0, 0, "activation", place, 0, v) for size, v in ((16, 1.0), (32, value))]

    assert slopes(at(math.inf, "x"))[0].mean == math.inf
    assert slopes(at(math.nan, "x"))[0].mean == math.inf
    assert slopes(at(0.0, "x"))[0].mean == -math.inf
    assert slopes([Coordinate(size, 0, 0, "activation", "x", 0, 0.0) for size in (16, 32)]) == []


def test_a_place_that_some_size_does_not_have_is_left_out() -> None:
    """Over depth: a layer unlike the others that only a deep model has."""
    found = [Coordinate(size, 0, 0, "activation", "h.*", 0, 1.0) for size in (2, 4, 8)]
    found += [Coordinate(size, 0, 0, "activation", "h.3", 1, 1.0) for size in (4, 8)]
    assert [slope.place for slope in slopes(found)] == ["h.*"]


def test_the_probe_sees_a_head_that_is_no_module_and_attention() -> None:
    """A tied head is a plain call, and its change is counted as the logits feel it."""
    subject = DecoderSubject(WIDTH, replace(EVERY_ROLE, tied=True), MUP, HYPER, vocab_size=31)
    model, plan = subject.make(64, 0)
    ids = torch.arange(24).reshape(2, 12) % 31
    probe = Probe(model)
    probe.take(ids)
    with torch.no_grad():
        dict(model.named_parameters())["wte.weight"].add_(0.5)
    after = probe.take(ids)
    assert after.products["wte.weight"] == pytest.approx(0.5, rel=1e-5)
    assert after.products["output"] > 0
    assert after.head_size == 16
    assert [name for name in after.outputs if name.endswith("attention_logits")]
    assert plan.multipliers["output"].value == 0.5


def test_measuring_leaves_no_hook_behind_and_is_repeatable() -> None:
    subject = DecoderSubject(WIDTH, DEEP, MUP, HYPER, vocab_size=1024)
    text = Text(context_length=16, batch_sequences=2, steps=(1, 2))
    assert measure(subject, 64, 0, text) == measure(subject, 64, 0, text)
    model, _ = subject.make(64, 0)
    Probe(model).take(text.probe)
    assert not any(isinstance(m, nn.Module) and m._forward_hooks for m in model.modules())


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_command_leaves_numbers_figures_and_a_verdict(tmp_path: Path) -> None:
    done = doors.run("check", "widths=[64,128,256]", "seeds=2", "model.depth=2", f"out={tmp_path}")
    folder = tmp_path / "checks" / "mup"
    assert "verdict    PASS: table mup over width 64-256" in done.stdout
    assert "\nnext       search its base hyperparameters" in done.stdout
    assert json.loads((folder / "verdict.json").read_text()) == {"verdict": "PASS", "findings": []}
    rows = rows_of(folder / "slopes-width.csv")
    assert {"quantity", "place", "step", "mean", "half_width", "low", "high", "passed"} <= set(rows[0])
    assert {row["passed"] for row in rows} == {"True"}
    assert (folder / "figures" / "coordinates-width.png").stat().st_size > 10_000
    assert {int(row["size"]) for row in rows_of(folder / "coordinates-width.csv")} == {64, 128, 256}
    refused = doors.run("check", "widths=[64,128,512]", "seeds=2", "model.depth=2", f"out={tmp_path}", expect=2)
    assert "config.widths" in refused.stderr or "widths" in refused.stderr
    assert "overwrite=true" in refused.stderr


def test_a_wrong_table_exits_with_one_and_says_what_is_wrong(tmp_path: Path) -> None:
    arguments = ["parametrization=sp", "widths=[64,128,256]", "seeds=1", "model.depth=1", f"out={tmp_path}"]
    done = doors.run("check", *arguments, expect=1)
    assert "likely cause   at init, h.*.attn.c_attn scales as width^+0." in done.stdout
    assert "verdict    FAIL: table sp over width 64-256" in done.stdout
    assert "Traceback" not in done.stderr
    verdict = json.loads((tmp_path / "checks" / "sp" / "verdict.json").read_text())
    assert verdict["verdict"] == "FAIL"
    assert verdict["findings"][0]["place"] == "h.*.attn.c_attn"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["widths=[128]"],
            "widths=[128] must be 3 or more different sizes of which the largest is at least 4 times",
        ),
        (["widths=[128,320]"], "widths=[128, 320] must be 3 or more different sizes"),
        (["widths=[]"], "widths=[] and depths=[] leave nothing to check"),
        (["widths=[40,80,160]"], "does not divide model.width=40"),
        (["widths=[0,64,128]"], "widths=0 must be a whole number at least 1"),
        (["seeds=0"], "seeds=0 must be"),
        (["run.num_steps=0"], "run.num_steps=0 must be"),
        (["parametrization=mup_table3"], "and wte.weight is both; untie them (model.tied=false)"),
        (["parametrization.decay=horizon"], "needs a run's length, which a check has not"),
        (["parametrization.table=mop"], "parametrization.table=mop is unknown"),
        (
            ["family=examples.llama"],
            "family=examples.llama must be module:name; for example family=examples.llama:family.",
        ),
        (["family=examples.nothing:family"], "family=examples.nothing:family cannot be loaded"),
        (["family=examples.llama:build"], "family=examples.llama:build is a function; it must be a mutune.Family"),
        (["shapes=examples.llama:at_depth"], "shapes=examples.llama:at_depth is read with a family"),
        (["family=examples.llama:deep", "shapes=examples.llama:at"], "shapes=examples.llama:at cannot be loaded"),
        (["family=examples.llama:family", "tokenizer=gpt2"], "choose another tokenizer, for example tokenizer=bytes"),
        (["family=examples.llama:family", "depths=[1,2,4]"], "has one kind of shape; set widths=[] or depths=[]"),
        (["name=a/b"], "name=a/b must be a plain folder name"),
        (["run.context_length=100000000"], "does not fit into"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refuse("check", arguments, tmp_path / "runs", capsys)


def test_a_users_own_family_is_checked_in_a_notebook_and_on_the_command_line(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"training": Text(context_length=32), "seeds": 1}
    right = coordinate_check(llama.family, [64, 128, 256], **quick)
    assert right.passed, said(right)
    assert not coordinate_check(llama.family, [64, 128, 256], table="sp", **quick).passed
    arguments = ["family=examples.llama:family", "widths=[64,128,256]", "seeds=1", "run.context_length=32"]
    done = doors.run("check", *arguments, f"out={tmp_path}")
    assert "verdict    PASS: table mup over width 64-256" in done.stdout
    assert (tmp_path / "checks" / "examples.llama.family-mup" / "verdict.json").exists()


def test_a_users_own_family_is_checked_over_depth(tmp_path: Path) -> None:
    quick: dict[str, Any] = {"axis": DEPTH, "shapes": llama.at_depth, "training": Text(context_length=32), "seeds": 1}
    right = coordinate_check(llama.deep, [2, 4, 8], table="completep", **quick)
    assert right.passed, said(right)
    assert not coordinate_check(llama.deep, [2, 4, 8], table="mup", **quick).passed
    names = ["family=examples.llama:deep", "shapes=examples.llama:at_depth", "widths=[]", "depths=[2,4,8]"]
    small = ["parametrization=completep", "seeds=1", "run.context_length=32"]
    done = doors.run("check", *names, *small, f"out={tmp_path}")
    assert "verdict    PASS: table completep over depth 2-8" in done.stdout


def test_a_forgotten_multiplier_of_a_users_model_is_seen_by_its_slopes() -> None:
    """The model is built as if it had the multiplier, and its forward pass does not use it."""

    class Forgets(llama.Llama):
        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self.scale_embedding(self.embed(ids_BT))
            for layer in self.layers:
                x_BTD = layer(x_BTD)
            return self.head(self.norm(x_BTD))

    shape = llama.LlamaShape
    family: Family[int] = Family(lambda width: Forgets(shape(width, vocab_size=1024)), base=32, delta=64, head_size=16)
    judgement = coordinate_check(family, [64, 128, 256], training=Text(context_length=32), seeds=1)
    assert "the output multiplier scales as m^-1.00" in " ".join(f.diagnosis for f in judgement.findings)
    assert not judgement.passed


def plain_mlp(width: int, depth: int = 2) -> nn.Module:
    hidden = [layer for _ in range(depth) for layer in (nn.Linear(width, width, bias=False), nn.ReLU())]
    return nn.Sequential(nn.Embedding(1024, width), *hidden, nn.Linear(width, 1024, bias=False))


class Residual(nn.Module):
    """Blocks that are plain Sequentials."""

    def __init__(self, width: int, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 1024)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(ids_BT)
        for layer in self.layers:
            x_BTD = x_BTD + layer(x_BTD)
        return self.head(self.norm(x_BTD))


ENDS = {"output": "head", "embedding": "embed"}


def test_layers_of_a_sequential_that_differ_have_places_of_their_own_and_repeated_blocks_one() -> None:
    mlp: Family[int] = Family(plain_mlp, 32, 64, sites={"output": "5", "embedding": "0"})
    assert tensor_places(mlp.plan(128)) == {
        "0.weight": "0.weight",
        "1.weight": "1.weight",
        "3.weight": "1.weight",
        "5.weight": "5.weight",
    }
    places = tensor_places(Family(Residual, 32, 64, sites=ENDS).plan(128))
    names = ("layers.*.0.weight", "layers.*.1.weight", "layers.*.1.bias", "layers.*.3.weight", "layers.*.3.bias")
    for block in ("0", "1"):
        assert [places[name.replace("*", block)] for name in names] == list(names)
    plan = DecoderSubject(WIDTH, EVERY_ROLE, MUP, HYPER, VOCAB).plan(64)
    assert tensor_places(plan) == {name: kind(name) for name in plan.parameters}


def test_names_that_no_index_tells_apart_keep_all_of_theirs() -> None:
    def crossed(width: int) -> nn.Module:
        return nn.ModuleList(
            nn.ModuleList([nn.Linear(a * width, b * width, bias=False), nn.Linear(b * width, a * width, bias=False)])
            for a, b in ((1, 2), (2, 1))
        )

    places = tensor_places(Family(crossed, 32, 64).plan(64, "sp"))
    assert places == {"0.0.weight": "0.0.weight", "1.1.weight": "0.0.weight"} | dict.fromkeys(
        ["0.1.weight", "1.0.weight"], "0.1.weight"
    )


def test_the_blocks_of_a_users_model_may_be_sequentials() -> None:
    """Gains and matrices in one place would be judged as one of the two."""

    def check(roles: Mapping[str, Role]) -> Judgement:
        family: Family[int] = Family(Residual, 32, 64, roles=roles, sites=ENDS)
        return coordinate_check(family, [64, 128, 256], training=Text(context_length=32), seeds=1)

    right, wrong = check({}), check({"layers.?.3.weight": Role("input", fan_in=0)})
    assert right.passed, said(right)
    assert said(wrong).startswith("at init, layers.*.3 scales as width^+0.")
    assert "the initial std of layers.*.3.weight scales as m^+0.00, an exponent of about +0.5 too many" in said(wrong)


class Conditioned(nn.Module):
    """Each block has two inputs of a fixed size: what modulates it (adaLN), and a depthwise convolution's kernel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(1024, width)
        self.condition = nn.Buffer(torch.randn(1024, 8, generator=torch.Generator().manual_seed(0)))
        self.blocks = nn.ModuleList(ConditionedBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.scale_output = Multiplier("output")
        self.head = nn.Linear(width, 1024, bias=False)

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        x_BTD = self.embed(ids_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.condition[ids_BT])
        return self.head(self.scale_output(self.norm(x_BTD)))


class ConditionedBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(8, 2 * width)
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width, bias=False)
        self.up = nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x_BTD: torch.Tensor, condition_BTC: torch.Tensor) -> torch.Tensor:
        scale_BTD, shift_BTD = self.modulation(condition_BTC).chunk(2, dim=-1)
        mixed_BTD = self.norm(x_BTD) * (1.0 + scale_BTD) + shift_BTD
        mixed_BTD = self.conv(mixed_BTD.mT)[..., : x_BTD.shape[1]].mT
        return x_BTD + self.down(torch.relu(self.up(mixed_BTD)))


@pytest.mark.parametrize("table", ["mup", "mup_table9", "completep"])
def test_the_epsilon_of_a_blocks_inputs_follows_their_gradient(table: str) -> None:
    """Also where the embedding's rule has moved with its multiplier, which these do not have."""

    def check(roles: Mapping[str, str]) -> Judgement:
        family: Family[int] = Family(
            Conditioned, 32, 64, roles=roles, sites={"embedding": "embed", "residual.mlp": "blocks.?.down"}
        )
        quick: dict[str, Any] = {"training": Text(context_length=32), "seeds": 1}
        return coordinate_check(family, [64, 128, 256], table=table, hyperparameters=strong, **quick)

    strong = BaseHyperparameters(learning_rate=2**-7, init_std=0.25, embedding_multiplier=4.0)
    right, wrong = check({}), check({"blocks.?.modulation.weight": "hidden", "blocks.?.conv.weight": "hidden"})
    assert right.passed, said(right)
    assert {finding.slope.place for finding in wrong.findings} == {"blocks.*.modulation.weight", "blocks.*.conv.weight"}
    assert all("its ε scales as m^+0.00 and must follow the gradient" in f.diagnosis for f in wrong.findings)


@pytest.mark.parametrize("rate", [1e30, 1e-30, 1e-60])
def test_a_check_in_which_nothing_moves_or_everything_breaks_does_not_pass(rate: float) -> None:
    wild = replace(HYPER, learning_rate=rate)
    judgement = judged(MUP, hyperparameters=wild, model=ModelConfig(width=32, depth=1), **QUICK)
    assert not judgement.passed
    assert judgement.findings or "not judged     no update was seen" in "\n".join(as_words(judgement))


@pytest.mark.parametrize("table", ["mup", "mup_table9"])
def test_a_multiplier_may_stand_after_the_head_or_be_hung_below_a_module(table: str) -> None:
    class After(llama.Llama):
        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self.scale_embedding(self.embed(ids_BT))
            for layer in self.layers:
                x_BTD = layer(x_BTD)
            return self.scale_output(self.head(self.norm(x_BTD)))

    class Bare(llama.Llama):
        def __init__(self, shape: llama.LlamaShape) -> None:
            super().__init__(shape)
            del self.scale_output, self.scale_embedding

        def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
            x_BTD = self.embed(ids_BT)
            for layer in self.layers:
                x_BTD = layer(x_BTD)
            return self.head(self.norm(x_BTD))

    def shape(width: int) -> llama.LlamaShape:
        return llama.LlamaShape(width, vocab_size=1024, kv_heads=width // 32)

    sites = {"output": "head", "embedding": "embed"}
    after: Family[int] = Family(lambda width: After(shape(width)), base=32, delta=64, head_size=16)
    hung: Family[int] = Family(lambda width: Bare(shape(width)), base=32, delta=64, head_size=16, sites=sites)
    for family in (after, hung):
        judgement = coordinate_check(family, [64, 128, 256], table=table, training=Text(context_length=32), seeds=1)
        assert judgement.passed, said(judgement)


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    done = doors.run("check", "dry_run=true", f"out={tmp_path / 'runs'}")
    assert "widths     [128, 256, 512]" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_family_without_a_place_for_the_embedding_is_told_the_key_that_needs_none(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from mutune import Family\nfrom torch import nn\n\n"
        "def build(width):\n"
        "    return nn.Sequential(nn.Embedding(257, width), nn.Linear(width, width), nn.Linear(width, 257))\n\n"
        "family = Family(build, base=32, delta=64, sites={'output': '2'}, roles={'1.weight': 'hidden'})\n"
    )
    asked = ["family=mine:family", "tokenizer=bytes", "dry_run=true", f"out={tmp_path / 'runs'}"]
    refusal = doors.run_apart("check", *asked, cwd=tmp_path, expect=2).stderr
    assert "take hyperparameters.embedding_multiplier=1 in place of 12.5" in refusal
    doors.run_apart("check", *asked, "hyperparameters.embedding_multiplier=1", cwd=tmp_path)


def test_btlm_passes_over_width_without_a_word_about_its_unscaled_epsilon() -> None:
    judgement = judged(BTLM, model=ModelConfig(width=32, depth=2), **QUICK)
    assert judgement.passed, said(judgement)
    assert not [slope for slope, _ in judgement.judged if slope.quantity == "gradient"]


def test_the_check_holds_at_other_multipliers_too() -> None:
    plain = BaseHyperparameters(learning_rate=2**-8, init_std=0.11, embedding_multiplier=2.5, output_multiplier=1.3)
    judgement = judged(MUP, hyperparameters=plain, seed=3, **QUICK)
    assert judgement.passed, said(judgement)
