"""The guard's rules on made-up records, its memory, and what its policies decide."""

import json
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest

from mutune.data.windows import Skip
from mutune.errors import Refusal
from mutune.training.alarms import KINDS, Alarm, GuardConfig
from mutune.training.guard import Action, Guard, rank_fields
from mutune.training.guard_rules import RULES

CONFIG = GuardConfig()
CLIP, BETA2 = 1.0, 0.95


def guard_with(config: GuardConfig = CONFIG, **keywords: Any) -> Guard:
    return Guard(config, clip_norm=CLIP, beta2=BETA2, **keywords)


def record_at(step: int, **fields: Any) -> dict[str, Any]:
    """A step of a run whose loss falls, with the noise of small batches."""
    draw = random.Random(step)
    usual = {
        "step": step,
        "tokens": 64 * step,
        "loss": 4.0 + 3.0 * math.exp(-step / 60) + draw.gauss(0.0, 0.1),
        "lr": 0.01,
        "grad_norm": 0.5 * math.exp(draw.gauss(0.0, 0.1)),
        "diverged": False,
    }
    return usual | fields


def heard(guard: Guard, records: Iterable[dict[str, Any]]) -> list[tuple[int, str, str]]:
    return [(alarm.step, alarm.name, alarm.where) for record in records for alarm in guard.observe(record)]


def clean(first: int, last: int) -> list[dict[str, Any]]:
    return [record_at(step) for step in range(first, last + 1)]


# -------------------------------------------------------------------------------------------------------- loss and norm
def test_a_falling_noisy_loss_is_no_alarm() -> None:
    assert heard(guard_with(), clean(1, 3000)) == []


def test_one_high_loss_is_a_spike_and_what_is_usual_stays_what_it_was() -> None:
    guard = guard_with()
    records = [*clean(1, 99), record_at(100, loss=6.5), *clean(101, 120), record_at(121, loss=6.5)]
    assert heard(guard, records) == [(100, "loss_spike", "")]  # and the same again within the window is not repeated
    assert heard(guard, [*clean(122, 199), record_at(200, loss=6.5)]) == [(200, "loss_spike", "")]


def test_spikes_are_left_out_of_what_is_usual() -> None:
    """Every fifth loss is a spike, too few in a row for a level."""
    guard = guard_with()
    heard(guard, clean(1, 199))
    records = [record_at(step, loss=6.5) if step % 5 == 0 else record_at(step) for step in range(200, 400)]
    assert {name for _, name, _ in heard(guard, records)} == {"loss_spike"}
    assert max(guard.state["loss"]) < 5.0


def test_losses_that_stay_a_little_higher_are_a_level_whose_onset_is_the_first_of_them() -> None:
    guard = guard_with()
    heard(guard, clean(1, 299))
    found: list[Alarm] = []
    for step in range(300, 320):
        usual = record_at(step)
        found += guard.observe(usual | {"loss": usual["loss"] + 0.35})
    (alarm,) = found
    assert (alarm.name, 298 <= alarm.onset <= 302, alarm.step <= 312) == ("loss_level", True, True)


def test_before_it_knows_what_is_usual_only_what_is_not_finite_counts() -> None:
    guard = guard_with()
    assert heard(guard, [record_at(step, loss=float(step)) for step in range(1, CONFIG.after + 1)]) == []
    assert heard(guard, [record_at(33, loss=math.nan)]) == [(33, "not_finite", "loss")]


def test_a_loss_that_is_not_finite_is_named_every_time() -> None:
    guard = guard_with()
    bad = [record_at(1, grad_norm=math.inf), record_at(2, grad_norm=math.nan)]
    assert heard(guard, bad) == [(1, "not_finite", "grad_norm"), (2, "not_finite", "grad_norm")]


def test_a_gradient_norm_ten_times_the_usual_is_a_spike() -> None:
    assert heard(guard_with(), [*clean(1, 99), record_at(100, grad_norm=5.0)]) == [(100, "grad_spike", "")]


@pytest.mark.parametrize(
    ("sequences", "named"), [(1, []), (4, ["loss_spike", "grad_spike"]), (64, ["loss_spike", "grad_spike"])]
)
def test_what_one_odd_sequence_of_a_small_batch_does_is_no_alarm(sequences: int, named: list[str]) -> None:
    """As a row of underscores does in real text: its loss 1.7 times the usual, its gradient 18 times."""
    guard = guard_with()
    heard(guard, [record_at(step, context_length=64 / sequences) for step in range(1, 200)])
    odd = {"loss": 4.1 * (1 + 0.7 / sequences), "grad_norm": 0.5 * 18 / math.sqrt(sequences)}
    whole = {"loss": 4.1 * 1.7, "grad_norm": 0.5 * 18}
    assert heard(guard, [record_at(200, context_length=64 / sequences, **odd)]) == []
    found = heard(guard, [record_at(201, context_length=64 / sequences, **whole)])
    assert [name for _, name, _ in found] == named


def test_gradient_norms_that_grow_slowly_are_named_once_they_are_many_times_the_lowest() -> None:
    slow = [record_at(step, grad_norm=0.1 * math.exp(step / 400)) for step in range(1, 1200)]
    names = heard(guard_with(), slow)
    assert [name for _, name, _ in names] == ["grad_growth"]
    assert names[0][0] > 400 * math.log(CONFIG.grad_growth)


def test_another_context_has_another_usual_loss() -> None:
    guard = guard_with()
    heard(guard, [record_at(step, context_length=16) for step in range(1, 200)])
    longer = [record_at(step, context_length=64, tokens=64 * 199 + 64 * (step - 199)) for step in range(200, 260)]
    assert heard(guard, [record | {"loss": record["loss"] + 3.0} for record in longer]) == []


# ------------------------------------------------------------------------------------------------------------- the band
def test_a_smoothed_loss_outside_the_predicted_band_is_named_with_its_side() -> None:
    guard = guard_with(band=lambda step: (3.0, 5.0) if step > 50 else None, band_steps=10)
    level = [record_at(step, loss=7.0 if step < 40 else 4.5) for step in range(1, 100)]
    assert [name for _, name, _ in heard(guard, level) if name == "outside_band"] == []
    above = [record_at(step, loss=5.5) for step in range(100, 120)]
    assert (114, "outside_band", "above") in heard(guard, above)
    below = [record_at(step, loss=2.0) for step in range(120, 140)]
    assert "below" in [where for _, name, where in heard(guard, below) if name == "outside_band"]


# --------------------------------------------------------------------------------------------------------------- probes
def second_moments(norms: list[float], clip: float) -> list[float]:
    """What Adam's second moments sum to after each of these gradient norms, clipped."""
    sums = [0.0]
    for norm in norms:
        sums.append(BETA2 * sums[-1] + (1 - BETA2) * min(norm, clip) ** 2)
    return sums[1:]


@pytest.mark.parametrize(("clip", "named"), [(CLIP, []), (math.inf, [(20, "gradient_seen", "")])])
def test_adam_s_second_moment_says_whether_gradients_are_clipped(clip: float, named: list[Any]) -> None:
    norms = [3.0 if step == 17 else 0.5 for step in range(1, 41)]
    sums = second_moments(norms, clip)
    records = [record_at(step, grad_norm=norms[step - 1]) for step in range(1, 41)]
    for step in range(10, 41, 10):
        records[step - 1]["second_moment"] = sums[step - 1]
    assert [found for found in heard(guard_with(), records) if found[1] == "gradient_seen"] == named


def test_a_run_whose_guard_starts_in_the_middle_takes_the_first_moment_as_it_is() -> None:
    records = [record_at(step, grad_norm=0.5) for step in range(501, 521)]
    records[9]["second_moment"] = 7.0
    records[19]["second_moment"] = 0.95**10 * 7.0 + (1 - 0.95**10) * 0.25
    assert heard(guard_with(), records) == []


def test_a_moment_that_was_named_is_what_the_next_one_follows_from() -> None:
    records = [record_at(step, grad_norm=0.5) for step in range(1, 201)]
    usual, off = second_moments([0.5] * 200, CLIP), [9.0]
    for _ in range(100):
        off.append(BETA2 * off[-1] + (1 - BETA2) * 0.25)
    for step in range(10, 201, 10):
        records[step - 1]["second_moment"] = usual[step - 1] if step < 100 else off[step - 100]
    assert heard(guard_with(), records) == [(100, "gradient_seen", "")]


def test_a_role_s_update_ratio_is_judged_per_rate_of_the_schedule() -> None:
    guard = guard_with()
    rates = [0.01 * 2.0 ** (step / 10 - 20) for step in range(1, 201)]  # doubled from each probe to the next
    records = [record_at(step, lr=rates[step - 1]) for step in range(1, 201)]
    for step in range(10, 201, 10):
        records[step - 1]["update_ratio.hidden"] = 2.0 * rates[step - 1] * (8.0 if step == 200 else 1.0)
    assert heard(guard, records) == [(200, "update_ratio", "hidden")]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"moved": 9.0, "moved_tensor": "h.0.mlp.c_fc.weight"}, ("rewritten", "h.0.mlp.c_fc.weight")),
        ({"attention_logit_max": 130.0}, ("attention_logits", "")),
        ({"output_logit_max": 130.0}, ("output_logits", "")),
        ({"eps_share.hidden": 0.9}, ("eps_dominates", "hidden")),
        ({"frozen": "h.0.attn head 3"}, ("frozen", "h.0.attn head 3")),
        ({"dead_heads": "h.0.attn head 3"}, ("dead_head", "h.0.attn head 3")),
        ({"dtype.products": "bfloat16"}, ("dtype", "products")),
        ({"data_fingerprint": "b"}, ("data_changed", "")),
        ({"differs.data_fingerprint": "b at rank 1"}, ("data_changed", "data_fingerprint of ranks")),
        ({"differs.dtype.products": "bfloat16 at rank 1"}, ("dtype", "dtype.products of ranks")),
    ],
)
def test_a_probe_s_field_past_its_bound_is_named(fields: dict[str, Any], named: tuple[str, str]) -> None:
    guard = guard_with()
    usual = {"moved": 0.9, "moved_tensor": "wte.weight", "attention_logit_max": 60.0, "output_logit_max": 60.0}
    usual |= {"eps_share.hidden": 0.1, "dtype.products": "float32", "data_fingerprint": "a"}
    assert heard(guard, [record_at(step, **usual) for step in range(1, 50)]) == []
    assert heard(guard, [record_at(50, **(usual | fields))]) == [(50, *named)]


def test_logits_that_double_on_the_way_to_their_bound_are_named_before_it() -> None:
    guard = guard_with()
    values = {10 * i: 8.0 * 1.25**i for i in range(1, 11)}
    records = [
        record_at(step, **({"attention_logit_max": values[step]} if step in values else {})) for step in range(1, 101)
    ]
    (found,) = heard(guard, records)
    assert found[1:] == ("attention_logits", "growth")
    assert 25.0 < values[found[0]] < 50.0


def test_number_formats_that_are_wrong_from_the_start_are_named_where_they_are_known() -> None:
    from_the_first = {"data_fingerprint": "a", "differs.data_fingerprint": "b at rank 1"}
    assert heard(guard_with(), [record_at(1, **from_the_first)])[0][1] == "data_changed"
    wrong = {"dtype.products": "bfloat16", "dtype.parameters": "bfloat16"}
    assert heard(guard_with(), [record_at(1, **wrong)]) == []
    assert heard(guard_with(dtypes={"products": "float32"}), [record_at(1, **wrong)]) == [(1, "dtype", "products")]


# ---------------------------------------------------------------------------------------------------------------- ranks
def ranks_at(step: int, ranks: int, shift: float = 0.0) -> dict[str, Any]:
    draw = random.Random(f"ranks {step}")
    losses = [4.0 + draw.gauss(0.0, 0.1) for _ in range(ranks)]
    losses[-1] += shift
    return record_at(step, **rank_fields(losses))


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_ranks_that_differ_by_their_batches_are_no_alarm(ranks: int) -> None:
    assert heard(guard_with(), [ranks_at(step, ranks) for step in range(1, 2000)]) == []


@pytest.mark.parametrize("ranks", [2, 4, 8, 64])
def test_a_rank_far_from_the_others_is_named(ranks: int) -> None:
    records = [ranks_at(step, ranks, shift=3.0 if step == 100 else 0.0) for step in range(1, 101)]
    assert heard(guard_with(), records) == [(100, "rank_differs", f"rank {ranks - 1}")]


@pytest.mark.parametrize("ranks", [4, 8, 64])
def test_a_rank_that_is_always_a_little_off_is_named_within_20_steps(ranks: int) -> None:
    records = [ranks_at(step, ranks, shift=0.6 if step >= 100 else 0.0) for step in range(1, 121)]
    assert {(name, where) for _, name, where in heard(guard_with(), records)} == {("rank_differs", f"rank {ranks - 1}")}


def test_the_rank_whose_loss_is_not_finite_is_named() -> None:
    found = heard(guard_with(), [record_at(1, loss=math.nan, **rank_fields([4.0, 4.1, math.nan, 3.9]))])
    assert found == [(1, "not_finite", "rank 2")]


# --------------------------------------------------------------------------------------------------------------- memory
@pytest.mark.parametrize("stop", [5, 40, 64, 100, 131])
def test_a_guard_that_resumes_says_what_one_that_never_stopped_says(stop: int) -> None:
    records = [ranks_at(step, 4) | {"attention_logit_max": 1.0 + step / 3} for step in range(1, 301)]
    for step in (90, 130, 131, 132, 133, 260):
        records[step - 1]["loss"] += 2.5
    whole, first, second = guard_with(), guard_with(), guard_with()
    expected = heard(whole, records)
    assert len(expected) > 3
    before = heard(first, records[:stop])
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert before + heard(second, records[stop:]) == expected
    assert second.state_dict() == whole.state_dict()


def test_what_is_saved_is_not_what_goes_on_changing() -> None:
    guard = guard_with()
    heard(guard, clean(1, 50))
    saved = guard.state_dict()
    copied = json.loads(json.dumps(saved))
    heard(guard, clean(51, 100))
    assert saved == copied


# ------------------------------------------------------------------------------------------------------------ decisions
def alarm(name: str, step: int = 500, onset: int = 495) -> Alarm:
    return Alarm(name, step, 9.0, 1.0, onset)


@pytest.mark.parametrize(
    ("policy", "name", "do"),
    [
        ("warn", "not_finite", "warn"),
        ("warn", "rewritten", "warn"),
        ("pause", "loss_spike", "warn"),
        ("pause", "loss_level", "pause"),
        ("pause", "dtype", "pause"),
        ("rollback", "loss_spike", "warn"),
        ("rollback", "loss_level", "rollback"),
        ("rollback", "dtype", "pause"),
    ],
)
def test_a_policy_does_no_more_than_it_allows_and_the_alarm_calls_for(policy: str, name: str, do: str) -> None:
    action = guard_with(replace(CONFIG, policy=policy)).decide([alarm(name)])
    assert action.do == do
    assert KINDS[name].advice in action.sentence


def test_the_gravest_of_several_alarms_decides() -> None:
    guard = guard_with(replace(CONFIG, policy="rollback"))
    assert guard.decide([alarm("loss_spike"), alarm("loss_level")]).do == "rollback"
    assert guard.decide([alarm("loss_level"), alarm("dtype"), alarm("loss_spike")]).do == "pause"
    assert guard.decide([]) == Action()


def test_a_rollback_skips_the_batches_from_before_the_onset_to_the_alarm() -> None:
    guard = guard_with(replace(CONFIG, policy="rollback", skip_before=2))
    action = guard.decide([alarm("loss_spike", onset=400), alarm("loss_level", step=500, onset=495)])
    # record 495 is of batch 494; two more before it, up to batch 499
    assert action.skips == (Skip(from_step=492, num_skipped=8),)
    assert action.before == 492
    assert "goes back to a checkpoint of step 492 or before, and leaves out 8 batches" in action.sentence


def test_rollbacks_that_do_not_help_end_in_a_pause() -> None:
    guard = guard_with(replace(CONFIG, policy="rollback", max_rollbacks=2))
    guard.rollbacks = 100, 1400
    again = guard.decide([alarm("loss_level", 1500, 1495)])
    assert again.skips == (Skip(1492, 16),)  # the first is long ago, and the second doubles what is skipped
    guard.rollbacks = 100, 1400, 1490
    action = guard.decide([alarm("loss_level", 1500, 1495)])
    assert action.do == "pause"
    assert "other batches do not cure it" in action.sentence


def test_a_rollback_over_the_end_of_a_stage_counts_once() -> None:
    guard = guard_with(replace(CONFIG, policy="rollback", max_rollbacks=2))
    action = guard.decide([alarm("loss_level", 101, 99)], stage_start=100)
    assert action.skips == (Skip(96, 4), Skip(100, 1))
    guard.skips, guard.rollbacks = action.skips, (action.skips[0].from_step,)
    assert guard.decide([alarm("loss_level", 101, 99)], stage_start=100).skips == (Skip(96, 8), Skip(100, 2))


@pytest.mark.parametrize(
    "change",
    [
        *({key: 5} for key in ("loss", "grad", "smooth", "rank_run", "ratios", "logits", "dtypes", "told", "skips")),
        *({key: [1]} for key in ("tokens", "loss_sum", "outside", "ratios")),
        *({key: "a"} for key in ("stage", "moment", "grad_low", "loss_onset")),
        {"skips": [[1]]},
        {"skips": [[1, 0]]},
        {"rollbacks": ["a"]},
        {"rollbacks": 5},
    ],
)
def test_a_memory_that_is_none_is_refused(change: dict[str, Any]) -> None:
    guard = guard_with(CONFIG)
    with pytest.raises(ValueError, match=f"guard.{next(iter(change))}|skips"):
        guard.load_state_dict(guard.state_dict() | change)


def test_what_a_checkpoint_does_not_say_begins_anew() -> None:
    guard, other = guard_with(CONFIG), guard_with(CONFIG)
    guard.skips, guard.rollbacks = (Skip(3, 4),), (3,)
    said = guard.state_dict()
    assert other.load_state_dict(said) == []
    assert (other.skips, other.rollbacks, other.state) == (guard.skips, guard.rollbacks, guard.state)
    del said["loss"], said["rollbacks"]
    assert other.load_state_dict(said) == ["loss"]
    assert (other.rollbacks, other.state) == ((3,), guard.state)


# ------------------------------------------------------------------------------------------------------------ the table
def test_every_alarm_can_be_raised_and_every_rule_raises_one_of_the_table() -> None:
    assert len(RULES) == len(set(RULES))
    for name, kind in KINDS.items():
        words = str(alarm(name))
        assert kind.means in words
        assert "Advice: " in words
        assert kind.calls_for in ("warn", "pause", "rollback")


def test_an_alarm_is_plain_data_also_where_a_number_is_not_finite() -> None:
    data = Alarm("not_finite", 3, math.nan, "a finite number", 3, "loss").as_dict()
    assert json.loads(json.dumps(data, allow_nan=False))["value"] == "nan"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GuardConfig(policy="stop"), "guard.policy=stop is unknown; known: warn, pause, rollback."),
        (
            lambda: GuardConfig(every=-1),
            "guard.every=-1 must be a whole number at least 0; for example guard.every=10.",
        ),
        (lambda: GuardConfig(after=65), "guard.after=65 must be at most guard.window=64; for example guard.after=16."),
        (lambda: GuardConfig(loss_spike=0.0), "guard.loss_spike=0.0 must be a finite number above 0"),
        (lambda: GuardConfig(grad_spike=1.0), "guard.grad_spike=1.0 must be a finite number above 1"),
        (lambda: GuardConfig(eps_share=1.0), "guard.eps_share=1.0 must be a finite number above 0 and below 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(make: Callable[[], GuardConfig], said: str) -> None:
    with pytest.raises(Refusal) as refused:
        make()
    assert str(refused.value).startswith(said)
