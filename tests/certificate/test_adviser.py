"""The adviser: each rule from both sides of its threshold, and every cure really applied."""

import math
import random
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from mutune.certificate.adviser import (
    MAX_SHOWN,
    RULES,
    SEVERITIES,
    SWEEP,
    TARGET_RULES,
    Advice,
    advice_lines,
    advise,
    settings_of,
)
from mutune.certificate.config import Provenance, TransferFile
from mutune.certificate.planned import plan_ladder
from mutune.compose import compose
from mutune.config import SweepConfig, TransferConfig
from mutune.model.shape import ModelConfig, tensor_specs
from mutune.scaling.arithmetic import parameter_count
from mutune.scaling.heuristics import critical_batch, tokens_at_critical_batch
from mutune.scaling.horizon import power_lines_timescale
from mutune.training.config import RunSpec, total_tokens

#: A proxy and a target about which there is nothing to say: width 256 → 1,024, 50 million → 1 billion tokens.
PROXY = (
    "model.width=256",
    "model.head_size=32",
    "hyperparameters.weight_decay=0.04",
    "run={context_length: 256, batch_sequences: 128, num_steps: 1600}",
)
TARGET = (
    "target=small",
    "target.model.width=1024",
    "target.model.head_size=32",
    "target.stages=[{context_length: 256, batch_sequences: 512, num_steps: 7860}]",
    "ladder.widths=[128]",
)
PARAMETERS = parameter_count(tensor_specs(ModelConfig(width=256, head_size=32), 1024))
TARGET_PARAMETERS = parameter_count(tensor_specs(ModelConfig(width=1024, head_size=32), 1024))


@dataclass(frozen=True)
class Words:
    """A proxy and a target as words of two command lines."""

    sweep: tuple[str, ...] = ()
    transfer: tuple[str, ...] = ()

    def after(self, *cures: str) -> "Words":
        """The same with cures applied."""
        words: dict[bool, list[str]] = {True: [], False: []}
        for cure in cures:
            words[cure.startswith(SWEEP)] += settings_of(cure)
        return Words((*self.sweep, *words[True]), (*self.transfer, *words[False]))

    def advice(self) -> list[Advice]:
        """What the adviser says."""
        proxy, target, widths = runs(self.sweep, self.transfer)
        return advise(proxy, target, {"width": max(widths)}, widths)

    def names(self) -> set[tuple[str, str]]:
        """Its axes and severities."""
        return {(advice.axis, advice.severity) for advice in self.advice()}


@cache
def proxy_of(words: tuple[str, ...]) -> RunSpec:
    return compose("sweep", SweepConfig, ["study=test", *words]).spec()


@cache
def asked_of(words: tuple[str, ...]) -> TransferConfig:
    return compose("transfer", TransferConfig, words)


@cache
def runs(sweep: tuple[str, ...], transfer: tuple[str, ...]) -> tuple[RunSpec, RunSpec, tuple[int, ...]]:
    """Proxy, target and the ladder's widths, as the two commands make them."""
    proxy, config = proxy_of(sweep), asked_of(transfer)
    target = TransferFile(
        provenance=Provenance("test", "test"),
        parametrization=proxy.parametrization,
        base=proxy.base,
        hyperparameters=config.hyperparameters.apply(proxy.hyperparameters),
        schedule=proxy.schedule,
        data=proxy.data,
        tokenizer=proxy.tokenizer,
        target=config.target,
        verdict="GO",
    ).spec(0)
    widths = config.ladder.widths or [width for width in (128,) if width > proxy.model.width]
    return proxy, target, (proxy.model.width, *widths)


def at(*words: str) -> Words:
    """The pair about which there is nothing to say, with these words of either command line."""
    of_transfer = [word for word in words if word.startswith(("target", "ladder"))]
    return Words((*PROXY, *(word for word in words if word not in of_transfer)), (*TARGET, *of_transfer))


def stages(context: int, sequences: int, steps: int) -> str:
    return f"target.stages=[{{context_length: {context}, batch_sequences: {sequences}, num_steps: {steps}}}]"


def decay_at(ratio: float) -> str:
    """The weight decay at which the target's timescale is `ratio` times its optimum."""
    tokens, rate = 256 * 512 * 7860, SweepConfig().hyperparameters.learning_rate
    return (
        f"hyperparameters.weight_decay={1 / (ratio * power_lines_timescale(tokens / TARGET_PARAMETERS) * rate * 7860)}"
    )


#: Sequences of 256 tokens at which 1,600 steps are a run at its critical batch, rounded up.
CRITICAL = math.ceil(tokens_at_critical_batch(1600) / 1600 / 256)
#: Sequences of 256 tokens, 2,000 steps: B = 2·B_crit(2000·B), where a batch begins to be too large; rounded down.
TOO_LARGE = int((2 * critical_batch(1.0) * 2000**0.47) ** (1 / 0.53) / 256)
FULL = math.ceil(20 * PARAMETERS / (256 * 128))  # steps of the proxy at 20 tokens per parameter
OVERTRAINED = stages(256, 512, math.ceil(90 * TARGET_PARAMETERS / (256 * 512)))
LEAST = math.ceil(5 * TARGET_PARAMETERS / (256 * 512))  # steps of the target at 5 tokens per parameter
HORIZON = ("parametrization.decay=horizon", "hyperparameters.weight_decay=0.1")  # the default, which is not read
COMPLETEP = ("parametrization=completep", "target.model.depth=32")

#: Axis, severity, the last pair at which the rule is silent, the first at which it is not.
CASES = [
    ("depth", "stop", at("target.model.depth=8"), at("target.model.depth=9")),
    ("depth", "stop", at("model.depth=8"), at("model.depth=9")),
    ("depth", "stop", at(*COMPLETEP), at("target.model.depth=32")),
    ("depth", "care", at("target.model.depth=4"), at("target.model.depth=5")),
    ("depth", "care", at(*COMPLETEP, "model.depth=4"), at(*COMPLETEP, "model.depth=3")),
    ("depth", "care", at(*COMPLETEP, "target.model.depth=3", "model.depth=3"), at(*COMPLETEP, "model.depth=3")),
    ("tokens", "stop", at(stages(256, 512, 30_000)), at(stages(256, 512, 30_001))),
    ("table", "stop", at("parametrization=sp"), at("parametrization=sp", "target.model.width=1056")),
    (
        "table",
        "stop",
        at("parametrization=sp", "target.model.width=1056", "ladder.widths=[264]"),
        at("parametrization=sp", "target.model.width=1056", "ladder.widths=[263]"),
    ),
    ("width", "care", at(), at("model.width=224")),
    ("width", "care", at("model.width=128", "target.model.width=512"), at("model.width=96", "target.model.width=512")),
    ("width", "care", at("target.model.width=4096"), at("model.width=224", "target.model.width=4096")),
    ("ladder", "care", at("target.model.width=1024"), at("target.model.width=1056")),
    (
        "ladder",
        "care",
        at("target.model.width=2048", "ladder.widths=[512]"),
        at("target.model.width=2048", "ladder.widths=[480]"),
    ),
    ("head size", "care", at(), at("target.model.head_size=64")),
    ("head size", "care", at(), at("model.head_size=16")),
    (
        "batch",
        "care",
        at(f"run.batch_sequences={CRITICAL}", stages(256, 4096, 7860)),
        at(f"run.batch_sequences={CRITICAL - 1}", stages(256, 4096, 7860)),
    ),
    ("batch", "care", at(), at(stages(256, 513, 7860))),
    (
        "tokens per parameter",
        "care",
        at(f"run.num_steps={FULL}", OVERTRAINED),
        at(f"run.num_steps={FULL - 1}", OVERTRAINED),
    ),
    ("vocabulary", "care", at("target.tokenizer={vocab_size: 4096}"), at("target.tokenizer={vocab_size: 4097}")),
    (
        "vocabulary",
        "care",
        at("tokenizer.vocab_size=1028", "target.tokenizer={kind: bytes}"),
        at("target.tokenizer={kind: gpt2}"),
    ),
    (
        "vocabulary",
        "care",
        at("tokenizer.vocab_size=1028", "target.tokenizer={kind: bytes}"),
        at("tokenizer.vocab_size=1029", "target.tokenizer={kind: bytes}"),
    ),
    ("steps", "care", at("run.num_steps=1525"), at("run.num_steps=1524")),
    (
        "steps",
        "care",
        at("run.num_steps=1000", stages(256, 512, 4000)),
        at("run.num_steps=999", stages(256, 512, 4000)),
    ),
    ("schedule", "care", at("target.schedule={kind: linear}"), at("target.schedule={kind: cosine}")),
    ("schedule", "care", at("schedule=wsd"), at("schedule=wsd", "target.schedule={kind: linear}")),
    (
        "schedule's end",
        "care",
        at("target.schedule={kind: linear, end_ratio: 0.049}"),
        at("target.schedule={kind: linear, end_ratio: 0.05}"),
    ),
    (
        "schedule's end",
        "care",
        at("schedule=constant", "schedule.end_ratio=0.1", "target.schedule={kind: constant}"),
        at("schedule.end_ratio=0.1", "target.schedule={kind: linear}"),
    ),
    (
        "schedule's end",
        "care",
        at("schedule.end_ratio=0.1", "target.schedule={kind: cosine}"),
        at("schedule.end_ratio=0.1", "schedule=cosine", "target.schedule={kind: cosine}"),
    ),
    (
        "warm-up",  # by tokens
        "care",
        at("target.schedule={kind: linear, warmup_steps: 5}"),
        at("target.schedule={kind: linear, warmup_steps: 4}"),
    ),
    (
        "warm-up",  # by share
        "care",
        at("target.schedule={kind: linear, warmup_steps: 5}", stages(256, 128, 400)),
        at("target.schedule={kind: linear, warmup_steps: 4}", stages(256, 128, 400)),
    ),
    (
        "warm-up",  # of the study's own schedule
        "care",
        at("schedule.warmup_steps=100", stages(256, 32, 160_000)),
        at("schedule.warmup_steps=100", stages(256, 31, 160_000)),
    ),
    ("ALiBi spectrum", "note", at("model.width=96"), at("model.width=64")),
    (
        "ALiBi spectrum",
        "note",
        at("model.width=64", "model.positions=learned", "target.model.positions=learned"),
        at("model.width=64"),
    ),
    ("ladder's heads", "note", at("ladder.widths=[128,512]"), at("ladder.widths=[128,192,512]")),
    ("ladder's heads", "note", at("model.width=192", "ladder.widths=[96,384]"), at("model.width=192")),
    (
        "ladder's heads",
        "note",
        at("ladder.widths=[192]", "model.positions=learned", "target.model.positions=learned"),
        at("ladder.widths=[192]"),
    ),
    ("decay timescale", "care", at(decay_at(1.99)), at(decay_at(2.01))),
    ("decay timescale", "care", at(decay_at(0.51)), at(decay_at(0.49))),
    ("decay timescale", "care", at(), at("hyperparameters.weight_decay=0.0")),
    (
        "decay timescale",
        "care",
        at("parametrization.decay=independent", "hyperparameters.weight_decay=0.0006"),
        at("parametrization.decay=independent", "hyperparameters.weight_decay=0.04"),
    ),
    (
        "decay timescale",
        "care",
        at(*HORIZON, "hyperparameters.decay_timescale=0.2"),
        at(*HORIZON, "hyperparameters.decay_timescale=0.02"),
    ),
    (
        "decay timescale",
        "care",
        at(stages(256, 669_000, 3)),
        at(stages(256, 669_000, 4)),
    ),  # shorter than a step: silent
    (
        "decay timescale",  # about 1.1 at the best, at 0.97 tokens per parameter
        "care",
        at("hyperparameters.weight_decay=0.0", stages(256, 1, 195_000)),
        at("hyperparameters.weight_decay=0.0", stages(256, 1, 300_000)),
    ),
    ("target's batch", "care", at(stages(256, TOO_LARGE, 2000)), at(stages(256, TOO_LARGE + 1, 2000))),
    (
        "target's batch",
        "care",
        at(stages(100_000, 1, 10)),
        at(stages(100_000, 2, 10)),
    ),
    ("target's tokens per parameter", "note", at(stages(256, 512, LEAST)), at(stages(256, 512, LEAST - 1))),
]
FIRED = [pytest.param(axis, severity, fires, id=f"{axis}-{i}") for i, (axis, severity, _, fires) in enumerate(CASES)]


def test_there_is_nothing_to_say_about_a_good_pair() -> None:
    assert at().advice() == []


@pytest.mark.parametrize(
    ("axis", "severity", "silent", "fires"), CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)]
)
def test_a_rule_fires_beyond_its_threshold_and_not_at_it(axis: str, severity: str, silent: Words, fires: Words) -> None:
    assert (axis, severity) not in silent.names()
    assert (axis, severity) in fires.names()


def test_every_rule_is_among_these_cases() -> None:
    rules = {(rule.axis, rule.severity) for rule in (*RULES, *TARGET_RULES)}
    assert rules == {(axis, severity) for axis, severity, _, _ in CASES}


@pytest.mark.parametrize(("axis", "severity", "words"), FIRED)
def test_a_cure_cures(axis: str, severity: str, words: Words) -> None:
    found = next(advice for advice in words.advice() if (advice.axis, advice.severity) == (axis, severity))
    assert settings_of(found.cure)
    assert (axis, severity) not in words.after(found.cure).names()


@pytest.mark.parametrize(("axis", "severity", "words"), FIRED)
def test_a_finding_has_both_values_and_a_source(axis: str, severity: str, words: Words) -> None:
    found = next(advice for advice in words.advice() if (advice.axis, advice.severity) == (axis, severity))
    both = "the target" in found.finding and "proxy" in found.finding
    assert both or found.axis in {rule.axis for rule in TARGET_RULES}
    assert found.source
    assert found.severity in SEVERITIES


def test_a_finding_states_the_two_values_and_the_threshold() -> None:
    found = at("run.num_steps=1524").advice()
    assert found[0].finding == (
        "1,524 at the proxy, 7,860 at the target; a proxy should have 1,525 (a quarter of the target's, at most 1,525)"
    )
    assert found[0].cure == "at the sweep: run.num_steps=1525"


def test_a_cure_names_no_key_that_nothing_reads() -> None:
    tokens = at("target.tokenizer={kind: gpt2, vocab_size: 9999}").advice()
    assert "at the sweep: tokenizer.kind=gpt2" in {advice.cure for advice in tokens}
    schedules = at("schedule=wsd", "schedule.decay_fraction=0.1", "target.schedule={kind: linear}").advice()
    assert [advice.cure for advice in schedules] == ["at the sweep: schedule.kind=linear"]


@pytest.mark.parametrize("seed", range(6))
def test_any_pair_s_cures_compose_and_cure_each_its_own(seed: int) -> None:
    draw = random.Random(seed)
    head, target_head = draw.choice([8, 16, 24, 64]), draw.choice([16, 40, 64])
    pair = Words(
        (
            f"model={{width: {head * draw.randint(1, 9)}, head_size: {head}, depth: {draw.randint(1, 9)}}}",
            *draw.choice([(), ("model.ffn_width=77",), ("model.num_heads=1",)]),
            f"parametrization.table={draw.choice(['mup', 'sp', 'btlm', 'completep'])}",
            f"schedule={draw.choice(['linear', 'cosine', 'wsd', 'constant'])}",
            f"schedule.end_ratio={draw.choice([0.0, 0.1])}",
            f"tokenizer={draw.choice(['bpe', 'gpt2', 'bytes'])}",
            f"run={{context_length: {draw.choice([64, 2048])}, batch_sequences: {2 ** draw.randint(0, 9)}, "
            f"num_steps: {10 ** draw.randint(1, 6)}}}",
        ),
        (
            "target=small",
            f"target.model={{width: {target_head * draw.randint(1, 99)}, head_size: {target_head}, "
            f"depth: {draw.randint(1, 40)}}}",
            f"target.tokenizer={draw.choice(['null', '{kind: gpt2}', '{vocab_size: 9999}'])}",
            f"target.schedule={draw.choice(['null', '{kind: linear, warmup_steps: 2}', '{kind: wsd}'])}",
            stages(draw.choice([64, 2048]), 2 ** draw.randint(0, 13), 10 ** draw.randint(1, 6)),
        ),
    )
    advice = pair.advice()
    assert advice
    for each in advice:
        assert settings_of(each.cure), each
        assert (each.axis, each.severity) not in pair.after(each.cure).names(), each


def test_all_cures_for_the_3b_target_together_leave_nothing_but_the_ladder_to_widen() -> None:
    pair = Words(("+sweep=proxy",), ("target=btlm_3b",))
    cured = pair.after(*(advice.cure for advice in pair.advice()))
    (left,) = cured.advice()
    assert left.axis == "ladder"
    done = cured.after(left.cure)
    assert done.advice() == []
    proxy, target, _ = runs(done.sweep, done.transfer)
    asked = asked_of(done.transfer)
    assert len(plan_ladder(proxy, target, asked.ladder, asked, Path("x"), "cpu", "hash").rungs) > 1


def test_a_target_made_longer_by_its_cure_is_settled_by_the_next_ones() -> None:
    pair = Words(("+sweep=proxy",), ("target=small",))
    for _ in range(3):
        pair = pair.after(*(advice.cure for advice in pair.advice()))
    assert pair.advice() == []


def test_what_the_default_proxy_is_told_about_the_3b_target() -> None:
    pair = Words(("+sweep=proxy",), ("target=btlm_3b",))
    assert [(advice.severity, advice.axis) for advice in pair.advice()] == [
        ("stop", "depth"),
        ("stop", "tokens"),
        ("care", "decay timescale"),
        ("care", "width"),
        ("care", "head size"),
        ("care", "batch"),
        ("care", "tokens per parameter"),
        ("care", "vocabulary"),
        ("care", "steps"),
        ("note", "ALiBi spectrum"),
    ]


def test_the_default_proxy_and_the_small_target_get_notes_only() -> None:
    assert {advice.severity for advice in Words(("+sweep=proxy",), ("target=small",)).advice()} == {"note"}


def test_without_a_proxy_only_the_target_is_looked_at() -> None:
    _, target, _ = runs(*vars(at(stages(256, 512, LEAST - 1), "schedule=cosine")).values())
    assert [advice.axis for advice in advise(None, target)] == ["target's tokens per parameter"]


def test_a_ladder_over_tokens_counts_as_measured() -> None:
    pair = at(stages(256, 512, 30_001))
    proxy, target, _ = runs(pair.sweep, pair.transfer)
    enough = total_tokens(target.stages) / 75
    assert "tokens" in {advice.axis for advice in advise(proxy, target, {"tokens": enough - 1})}
    assert "tokens" not in {advice.axis for advice in advise(proxy, target, {"tokens": enough})}


def test_a_wider_ladder_keeps_its_other_axes() -> None:
    pair = at("target.model.width=1056")
    proxy, target, _ = runs(pair.sweep, pair.transfer)
    (found,) = advise(proxy, target, {"tokens": 1.0, "width": 256.0})
    assert found.cure == "at the transfer: 'ladder.axes=[width,tokens]' 'ladder.widths=[512]'"
    ladder = asked_of((*pair.transfer, *settings_of(found.cure))).ladder
    assert ladder.chosen_axes == ["width", "tokens"]


def test_lines_are_the_most_severe_findings_and_every_cure_by_place() -> None:
    pair = Words(("+sweep=proxy",), ("target=btlm_3b",))
    advice = pair.advice()
    lines = advice_lines(advice)
    assert [line.split()[0] for line in lines[:MAX_SHOWN]] == ["stop"] * 2 + ["care"] * 6
    assert lines[MAX_SHOWN].strip() == "and 2 more: steps, ALiBi spectrum"
    assert [line.split(": ")[0] for line in lines[MAX_SHOWN + 1 :]] == [
        "cure       at the sweep",
        "cure       at the transfer",
    ]
    words = shlex.split(lines[-2].partition(": ")[2])
    assert len(words) == len({word.partition("=")[0] for word in words})  # every key once
    together = Words((*pair.sweep, *words), (*pair.transfer, *shlex.split(lines[-1].partition(": ")[2])))
    assert together.names() == {("ladder", "care")}
    assert advice_lines([]) == []


def test_of_two_cures_for_one_key_the_line_has_that_of_the_more_severe() -> None:
    cures = [Advice("a", "care", "", "at the sweep: k=1", "s"), Advice("b", "note", "", "at the sweep: k=2 l=3", "s")]
    assert advice_lines(cures)[-1] == "cure       at the sweep: k=1 l=3"
