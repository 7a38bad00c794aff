"""What noise alone, bounds that contradict each other, and losses in another unit do to a verdict: nothing untrue."""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.anyone import Asked, from_runs
from mutune.certificate.dependence import chance_of_none
from mutune.certificate.drift import EFFECTIVE, extrapolate
from mutune.certificate.points import AXES
from mutune.certificate.table import to_tables
from mutune.certificate.valleys import fit_valleys

WIDTHS = (64, 128, 256, 512)


def ladder(
    seed: int, *, rise: float = 0.05, noise: float = 0.003, drift: float = 0.0, seeds: int = 3, unit: float = 1.0
) -> pd.DataFrame:
    """Five rates an octave apart around 2^-8 at four widths: loss 3 + 2w^-0.3 + rise·z² + noise."""
    draw = np.random.default_rng(seed)
    rows = []
    for width in WIDTHS:
        optimum = -7.8 + drift * np.log2(width / WIDTHS[0])
        for own in range(seeds):
            for rate in range(-10, -5):
                loss = 3 + 2 * width**-0.3 + rise * (rate - optimum) ** 2 + draw.normal(0, noise)
                rows.append((width, 2.0**rate, unit * loss, own))
    return pd.DataFrame(rows, columns=["width", "lr", "loss", "seed"])


def verdicts(count: int, **keys: Any) -> Counter[str]:
    tables = [to_tables(ladder(seed, **keys), "runs=x") for seed in range(count)]
    return Counter(from_runs(table, Asked(), "x")["verdict"] for table in tables)


@pytest.mark.parametrize("seeds", [1, 3])
def test_noise_alone_is_not_certified_whatever_it_looks_like(seeds: int) -> None:
    assert verdicts(12, rise=0.0, noise=0.01, seeds=seeds) == {"NOT CERTIFIED": 12}


def test_valleys_that_the_noise_hides_are_no_drift() -> None:
    found = verdicts(12, noise=0.3)
    assert found["NO-GO"] + found["GO"] <= 1


def test_clear_valleys_are_judged_as_before() -> None:
    assert verdicts(6) == {"GO": 6}
    assert verdicts(6, drift=-1.0) == {"NO-GO": 6}


def test_the_chance_is_what_it_says_where_nothing_depends_on_the_rate_and_nil_where_it_does() -> None:
    def chance(frame: pd.DataFrame) -> float:
        return chance_of_none(to_tables(frame, "runs=x")[""].points)

    for seeds in (1, 3):
        none = np.array([chance(ladder(seed, rise=0.0, seeds=seeds)) for seed in range(200)])
        assert 0.03 <= np.mean(none < 0.1) <= 0.16
        assert np.mean(none < 0.01) <= 0.03
        assert chance(ladder(0, seeds=seeds)) < 0.002  # as little as so many shuffles can tell
    assert chance(ladder(0, seeds=1)[:3]) == 0.0  # nothing to test by


def test_bounds_that_contradict_the_rest_do_not_make_it_certain() -> None:
    for seed in range(12):
        points = to_tables(ladder(seed, rise=0.0, noise=0.01), "runs=x")[""].points
        valleys = fit_valleys(points)
        drift = extrapolate(valleys, 0, {**dict.fromkeys(AXES, 1.0), "width": 1024.0})
        if drift is None:
            continue
        low, _, high = drift.quantiles(drift.target)
        assert high - low > 1.0
        assert 1 / np.sum(drift.weights**2) >= EFFECTIVE


def test_optima_are_not_sought_octaves_beyond_what_was_tried() -> None:
    for seed in range(12):
        valleys = fit_valleys(to_tables(ladder(seed, rise=0.0, noise=0.01), "runs=x")[""].points)
        assert np.all(np.abs(valleys.optima + 8) < 12)


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6])
def test_a_loss_in_another_unit_is_judged_alike(unit: float) -> None:
    for seed in range(3):
        plain, other = (
            from_runs(to_tables(ladder(seed, noise=0.02, unit=u), "runs=x"), Asked(), "x") for u in (1.0, unit)
        )
        assert plain["verdict"] == other["verdict"]
        assert plain["drift"]["interval"] == pytest.approx(other["drift"]["interval"], abs=1e-3)
        assert other["regret"]["transferred"] == pytest.approx(unit * plain["regret"]["transferred"], rel=1e-3)


def test_a_rate_far_off_is_corrected_all_the_way() -> None:
    data = from_runs(to_tables(ladder(0), "runs=x"), Asked(learning_rate=1e9), "x")
    assert np.log2(data["regret"]["recommended_learning_rate"]) == pytest.approx(-7.8, abs=0.3)
