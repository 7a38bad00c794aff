"""Laws of tokens and batch: golden numbers, what each is conditional on, and how much they disagree."""

import math
from dataclasses import replace

import pytest

from mutune.compose import build
from mutune.config import TransferConfig
from mutune.errors import Refusal
from mutune.scaling.horizon import (
    BATCH,
    LAWS,
    NAMES,
    OWN_ERROR,
    RATE,
    TIMESCALE,
    HorizonConfig,
    Scale,
    axis_priors,
    decay_table,
    expected_shift,
    power_lines_timescale,
    shifts,
    timescale,
)

PROXY = Scale(tokens=2**20, batch=2**10, parameters=2**16)
LONGER = replace(PROXY, tokens=2**23)  # 8 times the tokens, at the same batch
BROADER = replace(PROXY, batch=2**12)  # 4 times the batch, at the same tokens


def by_law(config: HorizonConfig, quantity: str, target: Scale) -> dict[str, float]:
    return {shift.law.name: shift.octaves for shift in shifts(config, quantity, PROXY, target)}


def test_each_law_of_the_rate_says_its_own_over_eight_times_the_tokens() -> None:
    rates = by_law(HorizonConfig(), RATE, LONGER)
    assert rates["horizon_lr"] == pytest.approx(-0.96)  # 8^-0.32
    assert rates["completed_p"] == -1.5  # 8^-1/2
    assert rates["sqrt_batch"] == 0.0
    assert rates["step_law"] == pytest.approx(3 * (0.307 - 0.571 / 2))  # its batch did not move along


def test_a_law_that_does_not_speak_of_an_axis_says_so() -> None:
    silent = {s.law.name: s.silent_on for s in shifts(HorizonConfig(), RATE, PROXY, replace(LONGER, batch=2**12))}
    assert silent == {"horizon_lr": ("batch",), "sqrt_batch": ("tokens",), "completed_p": (), "step_law": ()}
    assert not any(s.silent_on for s in shifts(HorizonConfig(), RATE, PROXY, PROXY))


def test_the_step_law_has_its_published_exponent_where_the_batch_moves_as_it_asks() -> None:
    along = replace(LONGER, batch=PROXY.batch * 8**0.571)
    assert by_law(HorizonConfig(), RATE, along)["step_law"] == pytest.approx(3 * 0.307)
    assert by_law(HorizonConfig(), BATCH, LONGER) == pytest.approx({"step_law": 3 * 0.571, "power_lines": 3 * 0.383})


def test_every_law_of_the_rate_that_speaks_of_the_batch_says_two_octaves_of_it_are_one_of_the_rate() -> None:
    rates = by_law(HorizonConfig(), RATE, BROADER)
    assert {rates[name] for name in ("sqrt_batch", "completed_p", "step_law")} == {1.0}


def test_completed_p_does_not_move_at_constant_steps() -> None:
    assert by_law(HorizonConfig(), RATE, replace(PROXY, tokens=2**24, batch=2**14))["completed_p"] == 0.0


def test_the_rate_does_not_move_with_parameters_which_are_the_table_s() -> None:
    assert set(by_law(HorizonConfig(), RATE, replace(PROXY, parameters=2**20)).values()) == {0.0}


def test_the_disagreement_of_the_laws_is_in_the_prior() -> None:
    tokens, batch = axis_priors(HorizonConfig())
    assert (tokens.axis, batch.axis) == ("tokens", "batch")
    assert tokens.laws == pytest.approx({"horizon_lr": -0.32, "completed_p": -0.5, "step_law": 0.0215})
    assert tokens.mean == pytest.approx((-0.32 - 0.5 + 0.0215) / 3)
    assert tokens.sd > 0.26  # signs differ
    assert (batch.mean, batch.sd) == (0.5, OWN_ERROR["batch"])  # all say √B, so what is left is its own error


def test_one_law_alone_has_its_own_error_and_beta_is_the_user_s() -> None:
    (prior,) = axis_priors(HorizonConfig(laws=["horizon_lr"], beta=0.2))
    assert (prior.axis, prior.mean, prior.sd) == ("tokens", -0.2, OWN_ERROR["tokens"])


def test_a_measured_axis_has_no_prior_and_no_law_gives_none() -> None:
    assert [prior.axis for prior in axis_priors(HorizonConfig(), measured=["tokens"])] == ["batch"]
    assert axis_priors(HorizonConfig(laws=[])) == []
    assert axis_priors(HorizonConfig(laws=["power_lines", "constant_tau"])) == []  # they speak of decay alone


def test_the_expected_shift_adds_the_axes() -> None:
    priors = axis_priors(HorizonConfig())
    tokens, batch = priors
    mean, sd = expected_shift(priors, PROXY, replace(LONGER, batch=2**12))
    assert mean == pytest.approx(3 * tokens.mean + 2 * batch.mean)
    assert sd == pytest.approx(math.hypot(3 * tokens.sd, 2 * batch.sd))
    assert expected_shift(priors, PROXY, PROXY) == (0.0, 0.0)
    assert expected_shift([], PROXY, LONGER) == (0.0, 0.0)


@pytest.mark.parametrize(("tpp", "tau"), [(1, 1.084), (20, 0.22356), (80, 0.10767), (200, 0.06643), (1000, 0.02845)])
def test_the_timescale_of_power_lines_is_the_published_one(tpp: float, tau: float) -> None:
    assert power_lines_timescale(tpp) == pytest.approx(tau, rel=2e-4)


def test_the_relative_power_lines_are_the_absolute_ones() -> None:
    target = replace(LONGER, parameters=2**17)
    absolute = [power_lines_timescale(scale.tokens / scale.parameters) for scale in (PROXY, target)]
    assert by_law(HorizonConfig(), TIMESCALE, target)["power_lines"] == pytest.approx(
        math.log2(absolute[1] / absolute[0])
    )


def test_a_decay_that_did_not_move_is_eight_times_too_strong_for_a_constant_timescale() -> None:
    rows = decay_table(HorizonConfig(), PROXY, LONGER, proxy_rate_decay=0.01 * 0.1, target_rate=0.005, target_decay=0.2)
    given, constant = rows[0], next(row for row in rows if row.law == "constant_tau")
    assert (given.law, given.weight_decay, given.octaves) == ("given", pytest.approx(0.2), pytest.approx(0.0))
    assert given.timescale == pytest.approx(1 / (0.001 * 8 * 1024))
    assert constant.timescale == pytest.approx(timescale(0.001, 1024))
    assert constant.weight_decay == pytest.approx(0.2 / 8)
    assert constant.octaves == pytest.approx(-3.0)
    lines = next(row for row in rows if row.law == "power_lines")
    assert lines.octaves == pytest.approx(-3 * (1 - 0.527))  # λ ∝ D^(0.527 - 1)
    assert [row.law for row in rows] == ["given", "constant_tau", "completed_p", "power_lines"]


def test_without_weight_decay_there_is_no_timescale_to_compare() -> None:
    assert decay_table(HorizonConfig(), PROXY, LONGER, proxy_rate_decay=0.0, target_rate=0.01, target_decay=0.0) == []


def test_every_law_names_its_source_and_what_it_assumes_and_says_something() -> None:
    for law in LAWS:
        assert "arXiv:" in law.source
        assert law.assumes
        assert any(slope is not None for slope in law.slopes.values())
    assert len({(law.name, law.quantity) for law in LAWS}) == len(LAWS)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"laws": ["horizon"]}, "horizon.laws=horizon is unknown; known laws: horizon_lr, sqrt_batch, completed_p,"),
        ({"laws": ["step_law", "step_law"]}, "repeats a law; for example horizon.laws=[step_law]."),
        ({"beta": -0.1}, "horizon.beta=-0.1 must be a finite number at least 0 and at most 1; for example"),
        ({"laws": ["step_law"], "beta": 0.2}, "horizon.beta=0.2 belongs to the law horizon_lr"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: dict[str, object], sentence: str) -> None:
    with pytest.raises(Refusal) as refused:
        build(TransferConfig, {"horizon": keys})
    assert sentence in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"laws": []},
        {"laws": ["step_law"]},
        {"beta": 0.2},
        {"laws": ["horizon_lr"], "beta": 0.0},
        {"laws": [*NAMES]},
    ],
)
def test_close_correct_cases_are_taken(keys: dict[str, object]) -> None:
    assert build(TransferConfig, {"horizon": keys}).horizon == HorizonConfig(**keys)  # type: ignore[arg-type]
