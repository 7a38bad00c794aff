"""The loop: its records, its arithmetic, and when it stops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.training.loop import Heldout, evaluate
from tests.training.tiny import (
    BASE,
    HYPER,
    VOCAB,
    same_parameters,
    tiny_batches,
    tiny_decoder,
    tiny_optimizer,
    tiny_plan,
    tiny_train,
    with_rate,
)

SHAPE = ModelConfig(width=32, depth=2, head_size=16)


def fresh(dtype: torch.dtype = torch.float32, rate: float = HYPER.learning_rate) -> tuple[Decoder, torch.optim.AdamW]:
    plan = tiny_plan(SHAPE, hyperparameters=with_rate(rate))
    model = tiny_decoder(SHAPE, plan, dtype=dtype)
    return model, tiny_optimizer(model, plan)


def values(model: Decoder) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ----------------------------------------------------------------------------------------------------------- arithmetic
@pytest.mark.parametrize("micro_sequences", [1, 2, 3, 5])
def test_accumulated_gradients_equal_those_of_the_whole_batch(micro_sequences: int) -> None:
    plan = tiny_plan(SHAPE, hyperparameters=replace(HYPER, adam_eps=1e-6))  # well above the rounding of a gradient of 0
    whole, split = (tiny_decoder(SHAPE, plan, dtype=torch.float64) for _ in range(2))
    whole_optimizer, split_optimizer = tiny_optimizer(whole, plan), tiny_optimizer(split, plan)
    batch = tiny_batches(sequences=8)
    expected = tiny_train(whole, whole_optimizer, 5, batch=batch)
    records = tiny_train(split, split_optimizer, 5, batch=batch, micro_sequences=micro_sequences)
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in records] == pytest.approx([r[key] for r in expected], rel=1e-10)
    for name, value in values(whole).items():
        torch.testing.assert_close(values(split)[name], value, rtol=0, atol=1e-10, msg=name)


def test_the_update_is_clipped_to_the_norm_and_the_record_keeps_the_one_before() -> None:
    model, _ = fresh(torch.float64)
    before = values(model)
    sgd = torch.optim.SGD([{"params": list(model.parameters()), "lr": 1.0, "peak_lr": 1.0}])
    (record,) = tiny_train(model, sgd, 1, rate=lambda step: 0.5, clip_norm=0.125)
    squares = sum((value - before[name]).square().sum().item() for name, value in values(model).items())
    assert record["grad_norm"] > 0.25
    assert math.sqrt(squares) == pytest.approx(0.5 * 0.125, rel=1e-4)


def test_a_gradient_below_the_bound_is_not_touched() -> None:
    model, _ = fresh(torch.float64)
    before = values(model)
    sgd = torch.optim.SGD([{"params": list(model.parameters()), "lr": 1.0, "peak_lr": 1.0}])
    (record,) = tiny_train(model, sgd, 1, rate=lambda step: 0.5, clip_norm=1e6)
    squares = sum((value - before[name]).square().sum().item() for name, value in values(model).items())
    assert math.sqrt(squares) == pytest.approx(0.5 * record["grad_norm"], rel=1e-12)


def test_the_loss_of_a_record_is_the_one_before_its_update() -> None:
    model, optimizer = fresh(torch.float64)
    ids_BT = torch.from_numpy(tiny_batches()(0))
    with torch.no_grad():
        expected = model.loss(ids_BT[:, :-1], ids_BT[:, 1:]).item()
    assert tiny_train(model, optimizer, 1)[0]["loss"] == pytest.approx(expected, rel=1e-14)


def test_a_rate_of_zero_leaves_every_parameter_alone() -> None:
    model, optimizer = fresh()
    before = values(model)
    tiny_train(model, optimizer, 3, rate=lambda step: 0.0)
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


# -------------------------------------------------------------------------------------------------------------- records
def test_records_have_exactly_the_documented_fields() -> None:
    model, optimizer = fresh()
    records = tiny_train(model, optimizer, 4, rate=lambda step: 0.25 * step)
    assert [list(record) for record in records] == [["step", "tokens", "loss", "lr", "grad_norm", "diverged"]] * 4
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert {record["tokens"] for record in records} == {4 * 12}
    assert [record["lr"] for record in records] == [0.0, 0.005, 0.01, 0.015]  # the base rate of the update just done
    assert not any(record["diverged"] for record in records)


def test_a_run_that_starts_later_reads_later_batches_and_rates() -> None:
    model, optimizer = fresh()
    asked: list[tuple[str, int]] = []

    def batch(step: int) -> np.ndarray:
        asked.append(("batch", step))
        return tiny_batches()(step)

    def rate(step: int) -> float:
        asked.append(("rate", step))
        return 0.5

    records = tiny_train(model, optimizer, 9, start_step=7, batch=batch, rate=rate)
    assert [record["step"] for record in records] == [8, 9]
    assert sorted(asked) == [("batch", 7), ("batch", 8), ("rate", 7), ("rate", 8)]


def test_the_losses_of_a_fixed_run_are_the_recorded_ones() -> None:
    """A change here changes every result: bump it knowingly, and say so in docs/log.md."""
    model, optimizer = fresh(torch.float64)
    losses = [record["loss"] for record in tiny_train(model, optimizer, 22)]
    assert losses[0::3] == pytest.approx(
        [3.98119041, 2.96950255, 2.22951996, 1.51075413, 1.18406064, 1.57676105, 1.02738335, 1.15790706], rel=1e-5
    )


# ------------------------------------------------------------------------------------------------------- when it stops
def test_an_absurd_learning_rate_ends_the_run_as_diverged() -> None:
    model, optimizer = fresh(rate=1e3)
    records = tiny_train(model, optimizer, 50, loss_bound=2 * math.log(VOCAB))
    assert len(records) < 50
    assert [record["diverged"] for record in records] == [False] * (len(records) - 1) + [True]


def test_a_high_loss_is_forgiven_during_warm_up_and_ends_the_run_after_it() -> None:
    model, optimizer = fresh()
    records = tiny_train(model, optimizer, 50, loss_bound=0.01, warmup_steps=4)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert [record["diverged"] for record in records] == [False, False, False, False, True]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_without_an_update(bad: float) -> None:
    model, optimizer = fresh()
    with torch.no_grad():
        model.ln_f.bias[0] = bad
    before = values(model)
    (record,) = tiny_train(model, optimizer, 50)
    assert record["diverged"]
    assert not math.isfinite(record["loss"])
    assert all(
        torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0)) for name, value in values(model).items()
    )
    assert not optimizer.state


def test_a_gradient_that_is_not_finite_ends_the_run_without_an_update() -> None:
    model, optimizer = fresh()
    model.get_parameter("h.0.attn.c_proj.weight").register_hook(lambda gradient: gradient * math.inf)
    before = values(model)
    (record,) = tiny_train(model, optimizer, 50)
    assert record["diverged"]
    assert math.isfinite(record["loss"])
    assert all(torch.equal(value, before[name]) for name, value in values(model).items())


# ----------------------------------------------------------------------------------------------------------- evaluation
def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens() -> None:
    model = Decoder(BASE, 4, dict.fromkeys(tiny_plan(BASE).multipliers, 1.0))
    with torch.no_grad():
        model.wte.weight.zero_()  # all four tokens are equally likely: ln 4 nats, two bits
    heldout = Heldout(windows=np.array([[0, 1, 2], [1, 2, 3]]), token_bytes=np.array([100, 1, 2, 4]))
    record = evaluate(model, heldout)
    assert record["heldout_loss"] == pytest.approx(math.log(4), rel=1e-6)
    assert record["heldout_bits_per_byte"] == pytest.approx(4 * 2 / (1 + 2 + 2 + 4), rel=1e-6)  # nothing for the 0


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_the_held_out_loss_is_the_mean_over_tokens_whatever_the_chunk(chunk: int) -> None:
    model, _ = fresh(torch.float64)
    windows = np.random.default_rng(0).integers(VOCAB, size=(10, 13))
    token_bytes = np.arange(1, VOCAB + 1)
    record = evaluate(model, Heldout(windows, token_bytes, chunk))
    ids_BT = torch.from_numpy(windows)
    with torch.no_grad():
        nats = -model(ids_BT[:, :-1]).log_softmax(-1).gather(-1, ids_BT[:, 1:, None]).sum().item()
    assert record["heldout_loss"] == pytest.approx(nats / 120, rel=1e-12)
    assert record["heldout_bits_per_byte"] == pytest.approx(
        nats / math.log(2) / token_bytes[windows[:, 1:]].sum(), rel=1e-12
    )


def test_evaluation_leaves_no_trace_in_training() -> None:
    watched, watched_optimizer = fresh()
    alone, alone_optimizer = fresh()
    heldout = Heldout(np.random.default_rng(0).integers(VOCAB, size=(3, 9)), np.ones(VOCAB))
    tiny_train(watched, watched_optimizer, 3)
    evaluate(watched, heldout)
    tiny_train(watched, watched_optimizer, 6, start_step=3)
    tiny_train(alone, alone_optimizer, 6)
    assert same_parameters(watched, alone)


def test_the_smallest_wide_run_beats_chance() -> None:
    plan = tiny_plan(replace(SHAPE, width=64))
    model = tiny_decoder(replace(SHAPE, width=64), plan)
    assert tiny_train(model, tiny_optimizer(model, plan), 50)[-1]["loss"] < 0.7 * math.log(VOCAB)
