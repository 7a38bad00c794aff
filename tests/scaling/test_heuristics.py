"""Rules of thumb at values that can be checked by hand or elsewhere."""

import pytest

from mutune.model.alibi import alibi_slopes
from mutune.scaling.heuristics import (
    critical_batch,
    steepest_alibi_slope,
    tokens_at_critical_batch,
)


def test_the_critical_batch_is_the_published_one_where_tokens_are_twenty_per_parameter() -> None:
    assert critical_batch(20e6) == pytest.approx(93.2 * 512)
    assert critical_batch(20e9) == pytest.approx(93.2 * 512 * 1000**0.47)


@pytest.mark.parametrize("num_steps", [100, 1525, 159_636])
def test_a_run_at_its_critical_batch_has_the_asked_steps(num_steps: int) -> None:
    tokens = tokens_at_critical_batch(num_steps)
    assert tokens / critical_batch(tokens) == pytest.approx(num_steps)


def test_the_steepest_slope_is_the_decoder_s() -> None:
    for heads in range(1, 130):
        assert steepest_alibi_slope(heads) == max(alibi_slopes(heads))
        assert min(alibi_slopes(heads)) == 2**-8
