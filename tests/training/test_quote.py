"""What a run costs on named hardware, and the largest micro-batch that fits it."""

from dataclasses import replace

import pytest

from mutune.certificate.config import TargetConfig
from mutune.compose import compose
from mutune.config import TransferConfig
from mutune.data.config import DataConfig
from mutune.errors import Refusal
from mutune.model.shape import BaseConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.scaling.hardware import ACCELERATORS
from mutune.training.config import ParallelConfig, RunSpec
from mutune.training.quote import (
    balanced,
    estimate,
    lacking,
    largest,
    largest_table,
    largest_that_fits,
    machine,
    quote,
    quote_table,
    setting,
)
from mutune.training.schedule import ScheduleConfig

PER_TOKEN = 17_883_724_800, 23_923_522_560  # FLOPs, at contexts 2,048 and 8,192
HEAD = 6 * 50_257 * 2_560  # of those, for the logits, which nothing computes again
EIGHT = machine("h100-sxm", dtype="bfloat16", gpus=8, mfu=0.5)


def btlm(dtype: str = "bfloat16") -> RunSpec:
    target: TargetConfig = compose("transfer", TransferConfig, ["target=btlm_3b", f"target.loop.dtype={dtype}"]).target
    assert target.tokenizer is not None
    return RunSpec(
        model=target.model,
        data=DataConfig(),
        tokenizer=target.tokenizer,
        parametrization=ParametrizationConfig(table="btlm"),
        base=BaseConfig(width=256, depth=32, ffn_width=682.6),
        hyperparameters=BaseHyperparameters(),
        schedule=target.schedule or ScheduleConfig(),
        stages=target.run_stages(),
        loop=target.loop,
    )


def test_btlm_on_eight_h100s_takes_its_flops_over_what_they_do() -> None:
    first, second = quote(btlm(), ParallelConfig(), EIGHT)
    per_second = 8 * 0.5 * ACCELERATORS["h100-sxm"].bf16_flops
    assert first.tokens_per_second == pytest.approx(per_second / PER_TOKEN[0])
    assert second.tokens_per_second == pytest.approx(per_second / PER_TOKEN[1])
    assert (first.price.tokens, second.price.tokens) == (470_785_720_320, 156_928_573_440)
    assert first.seconds + second.seconds == pytest.approx(1.21736865e22 / per_second, rel=5e-9)


def test_the_words_have_steps_days_money_and_every_component() -> None:
    lines = quote_table(btlm(), ParallelConfig(activation_checkpointing="full"), EIGHT).splitlines()
    again = sum(s.tokens * (f - HEAD) / 3 for s, f in zip(btlm().stages, PER_TOKEN, strict=True))
    hours = (1.21736865e22 + again) / (0.5 * ACCELERATORS["h100-sxm"].bf16_flops) / 3600
    days, money = hours / 24 / 8, 2.5 * hours
    assert lines[-3].endswith(" USD; 24% of it for blocks that are computed again")
    assert lines[-1] == f"costs      159,636 steps, {days:.1f} days, {hours:,.1f} GPU hours, {money:,.2f} USD"
    assert lines[0].startswith("hardware   8 × h100-sxm: 989.4 TFLOP/s in bfloat16 and 80 GB each, 2.50 USD per hour;")
    parts = [line for line in lines if line.startswith(" " * 11)]
    columns = [[float(line.split()[-2 + i].replace(",", "")) for line in parts[:-1]] for i in (0, 1)]
    for numbers in columns:
        assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.06)
    assert parts[-1].split()[-2:] == ["yes", "yes"]


def test_selective_recomputation_costs_no_flops_to_speak_of_and_full_those_of_the_blocks_once_more() -> None:
    none, selective, full = (
        quote(btlm(), ParallelConfig(activation_checkpointing=kind), EIGHT)[0].seconds
        for kind in ("none", "selective", "full")
    )
    assert selective == none
    assert full / none == pytest.approx(1 + (PER_TOKEN[0] - HEAD) / 3 / PER_TOKEN[0])


def test_float32_is_priced_by_the_peak_of_float32() -> None:
    slow = machine("h100-sxm", dtype="float32", gpus=8, mfu=0.5)
    ratio = (
        quote(btlm("float32"), ParallelConfig(), slow)[0].seconds / quote(btlm(), ParallelConfig(), EIGHT)[0].seconds
    )
    assert ratio == pytest.approx(989.4 / 67)


def test_what_is_set_by_hand_replaces_the_table() -> None:
    on = machine("h100-sxm", dtype="bfloat16", gpus=1, mfu=0.4, peak_flops=1e15, memory_gb=64, gpu_hour=7)
    assert (on.peak_flops, on.memory_bytes, on.gpu_hour, on.flops) == (1e15, 64e9, 7, 4e14)


def test_a_run_that_does_not_fit_is_told_what_would_help() -> None:
    spec, lone = btlm(), replace(EIGHT, gpus=1)
    said = lacking(spec, ParallelConfig(), lone)
    assert said is not None
    assert "hardware=h100-sxm has 73.6 GB to fill and stage 2 needs" in said
    assert "parallel.activation_checkpointing=selective" in said
    assert lacking(spec, ParallelConfig(activation_checkpointing="full"), EIGHT) is None


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("memory_gb", [2, 12, 20, 70])
def test_where_not_one_sequence_fits_each_advice_is_enough(memory_gb: float, gpus: int) -> None:
    on, now = replace(EIGHT, gpus=gpus, memory_bytes=memory_gb * 1e9), ParallelConfig(replicas=gpus, reshard=False)
    spec = btlm()
    said = largest_table(spec, now, on).splitlines()[-1]
    if "take a smaller target.model, at the transfer" in said:
        leanest = ParallelConfig(activation_checkpointing="full")
        assert not all(largest_that_fits(spec, leanest, replace(on, gpus=480)))
        assert memory_gb == 2
        return
    advised = said.removeprefix("advice     one would fit, by estimate, with ").split(", or ")
    assert len(advised) >= 1
    for each in advised:
        stages, keys = spec.stages, dict(word.split("=") for word in each.split() if "=" in word)
        if "contexts" in each:
            longest = int(each.split()[4].replace(",", ""))
            stages = tuple(replace(stage, context_length=min(stage.context_length, longest)) for stage in stages)
        way = replace(
            now,
            reshard="parallel.reshard" in keys,
            replicas=int(keys.get("parallel.replicas", now.replicas)),
            activation_checkpointing=keys.get("parallel.activation_checkpointing", "none"),
        )
        given = replace(on, gpus=int(keys.get("gpus", gpus)))
        assert all(largest_that_fits(replace(spec, stages=stages), way, given)), each


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_the_largest_micro_batch_fits_and_one_more_does_not(recomputed: str) -> None:
    spec, parallel = btlm(), ParallelConfig(activation_checkpointing=recomputed)
    for stage, found in enumerate(largest_that_fits(spec, parallel, EIGHT)):
        share = spec.stages[stage].batch_sequences // 8
        assert 1 <= found < share
        assert estimate(spec, parallel, stage, found, 8) <= EIGHT.usable_bytes
        passes = -(-share // found)
        fewer = -(-share // (passes - 1))  # the least that would need one pass less
        assert estimate(spec, parallel, stage, fewer, 8) > EIGHT.usable_bytes


@pytest.mark.parametrize("most", range(21))
def test_halving_finds_what_counting_finds(most: int) -> None:
    asked: list[int] = []
    assert largest(20, lambda n: asked.append(n) or n <= most) == most  # type: ignore[func-returns-value]
    assert len(asked) <= 5


def test_parts_are_of_equal_size() -> None:
    assert [balanced(n, 20) for n in (1, 7, 9, 10, 19, 20)] == [1, 7, 7, 10, 10, 20]


@pytest.mark.parametrize(
    ("found", "shares", "value"),
    [
        ([8], [240], "8"),
        ([8, 2], [240, 60], "[8,2]"),
        ([16, 4], [16, 4], "16"),  # both take all they have
        ([5, 4], [16, 4], "5"),
        ([4, 5], [16, 20], "[4,5]"),
        ([4, 4], [16, 20], "4"),
    ],
)
def test_what_is_to_be_set_is_one_number_where_that_does_for_every_stage(
    found: list[int], shares: list[int], value: str
) -> None:
    assert setting(found, shares) == f"parallel.micro_sequences={value}"


def test_each_stage_is_priced_with_its_own_sequences() -> None:
    full = ParallelConfig(activation_checkpointing="full")
    found = largest_that_fits(btlm(), full, EIGHT)
    own = replace(full, micro_sequences=tuple(found))
    both = quote(btlm(), own, EIGHT)
    assert [stage.sequences for stage in both] == found
    for number, stage in enumerate(both):
        alone = quote(btlm(), replace(full, micro_sequences=stage.sequences), EIGHT)[number]
        assert stage == alone
    assert both[0].sequences > both[1].sequences
    assert lacking(btlm(), own, EIGHT) is None
    assert lacking(btlm(), replace(full, micro_sequences=both[0].sequences), EIGHT) is not None


def test_a_batch_that_cannot_be_spread_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^gpus=512 is more than the 480 sequences of a step; for example gpus=480\.$"):
        quote(btlm(), ParallelConfig(), replace(EIGHT, gpus=512))
    with pytest.raises(Refusal, match=r"^parallel\.replicas=3 does not divide gpus=8"):
        quote(btlm(), ParallelConfig(replicas=3), EIGHT)
