"""The posterior over power laws: what it recovers, what it does not hang on, and each of its hypotheses at work."""

import math

import numpy as np
import pytest

from mutune.scaling import power_law
from mutune.scaling.power_law import EXPONENTS, Forecast, forecast

SIZES = [32.0 * 2**k for k in range(6)]
PAST = 64.0 * 2**5


def curve(size: float, floor: float = 2.0, fall: float = 2.0, exponent: float = 0.5) -> float:
    return floor + fall * (size / 32) ** -exponent


def of_curve(error: float = 0.002, size: float = PAST, **law: float) -> Forecast:
    return forecast(SIZES, [curve(s, **law) for s in SIZES], error, 6, size, error)


def half_width(said: Forecast) -> float:
    return 0.5 * (said.quantile(0.95) - said.quantile(0.05))


@pytest.mark.parametrize("exponent", [0.1, 0.2, 0.35, 0.5, 0.77, 1.0, 1.5])
@pytest.mark.parametrize("floor", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("error", [1e-4, 1e-3, 1e-2])
def test_an_exact_curve_is_continued(exponent: float, floor: float, error: float) -> None:
    said = of_curve(error, exponent=exponent, floor=floor)
    off = abs(said.quantile(0.5) - curve(PAST, floor, 2.0, exponent))
    assert off < max(0.5 * half_width(said), 0.002)  # exponents between two of the grid are no worse
    assert half_width(said) < 12 * error + 0.007  # the grid resolves 0.3 % at best


def test_it_finds_exponent_and_floor() -> None:
    said = of_curve(5e-4)
    assert said.exponent == pytest.approx(0.5, abs=0.03)
    assert said.floor == pytest.approx(2.0, abs=0.03)


def test_the_unit_of_the_size_and_the_order_do_not_matter() -> None:
    losses = [curve(s) for s in SIZES]
    said = forecast(SIZES, losses, 0.01, 6, PAST, 0.01)
    scaled = forecast([s / 7 for s in SIZES][::-1], losses[::-1], 0.01, 6, PAST / 7, 0.01)
    for probability in (0.05, 0.5, 0.95):
        assert scaled.quantile(probability) == pytest.approx(said.quantile(probability), abs=1e-6)


def test_one_rung_that_is_off_does_not_drag_the_rest() -> None:
    losses = [curve(s) for s in SIZES]
    for rung in range(1, 5):
        off = [loss + (0.05 if i == rung else 0.0) for i, loss in enumerate(losses)]  # 25 standard errors
        said = forecast(SIZES, off, 0.002, 6, PAST, 0.002)
        assert said.quantile(0.5) == pytest.approx(curve(PAST), abs=0.02)


def test_no_prediction_falls_below_a_floor_of_zero() -> None:
    said = of_curve(0.02, floor=0.0, fall=4.0, exponent=0.3)
    assert said.floor >= 0.0
    assert said.quantile(0.05) > 0.9 * curve(PAST, 0.0, 4.0, 0.3)


def test_a_curve_without_a_floor_is_known_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    law = {"floor": 0.0, "fall": 5.0, "exponent": 0.2}
    said = of_curve(0.005, **law)
    monkeypatch.setattr(power_law, "NO_FLOOR_PROBABILITY", 1e-30)
    assert said.floor < 0.5 * of_curve(0.005, **law).floor
    assert half_width(said) < 0.7 * half_width(of_curve(0.005, **law))


def test_a_bend_within_the_ladder_widens_the_interval() -> None:
    bent = [curve(min(s, 256.0)) - 0.05 * max(0.0, math.log2(s / 256)) for s in SIZES]
    assert half_width(forecast(SIZES, bent, 0.002, 6, PAST, 0.002)) > 3 * half_width(of_curve())


def test_the_run_s_own_noise_is_in_its_interval() -> None:
    losses = [curve(s) for s in SIZES]
    inside = forecast(SIZES, losses, 0.01, 6, 256.0, 1e-4)
    assert half_width(forecast(SIZES, losses, 0.01, 6, 256.0, 0.03)) > half_width(inside) + 0.02


def test_residuals_beyond_a_poorly_known_noise_are_read_as_noise_and_not_as_a_wandering() -> None:
    losses = [curve(s) + 0.01 * (-1) ** i for i, s in enumerate(SIZES)]
    few, many = (half_width(forecast(SIZES, losses, 0.005, freedom, PAST, 0.005)) for freedom in (5, 1000))
    assert few < 0.9 * many


def test_the_wandering_has_the_covariance_of_its_integral() -> None:
    x = np.array([0.0, 0.7, 2.0, 3.5])
    grid = np.linspace(0.0, 3.5, 3501)
    for a in (5, 20, 39):
        k = EXPONENTS[a] * math.log(2.0)
        # ∫ W d(2^-αx) up to x = ∫ (e^-ks - e^-kx) dW_s, up to its sign
        weight = np.where(grid < x[:, None], np.exp(-k * grid) - np.exp(-k * x[:, None]), 0.0)
        numeric = np.trapezoid(weight[:, None] * weight[None], grid, axis=-1)
        np.testing.assert_allclose(power_law._wandering(x)[a], numeric, atol=1e-5)


def test_the_quantiles_are_those_of_the_mixture() -> None:
    said = Forecast(np.array([0.5, 0.5]), np.array([0.0, 10.0]), np.array([1.0, 1.0]), 0.5, 0.0)
    assert said.quantile(0.25) == pytest.approx(0.0, abs=1e-6)
    assert said.quantile(0.75) == pytest.approx(10.0, abs=1e-6)
    normal = Forecast(np.array([1.0]), np.array([3.0]), np.array([2.0]), 0.5, 0.0)
    assert normal.quantile(0.95) == pytest.approx(3.0 + 2.0 * 1.6448536, abs=1e-5)


def test_many_rungs_are_no_trouble() -> None:
    sizes = [32 * 2 ** (k / 10) for k in range(60)]
    said = forecast(sizes, [curve(s) for s in sizes], 0.002, 60, 4096.0, 0.002)
    assert said.quantile(0.5) == pytest.approx(curve(4096.0), abs=0.01)
