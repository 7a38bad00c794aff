"""Leaders by their mean over seeds."""

import math

from mutune.search.confirm import choose
from mutune.training.result import RunResult


def runs(*losses: float) -> list[RunResult]:
    return [RunResult(loss, math.isinf(loss), None if math.isinf(loss) else 3.0, 10, 1.0) for loss in losses]


def test_the_lowest_mean_wins_and_not_the_lowest_single_loss() -> None:
    found = choose({0: runs(3.00, 3.20, 3.21), 1: runs(3.05, 3.04, 3.06)}, {0: 0.01, 1: 0.02})
    assert [row.trial for row in found] == [1, 0]
    assert found[0].mean < found[1].mean
    assert [row.tied for row in found] == [True, False]
    assert found[0].standard_error == found[1].standard_error > 0


def test_among_those_that_nothing_tells_apart_the_lower_rate_wins() -> None:
    losses = {0: runs(3.00, 3.10, 3.05), 1: runs(3.02, 3.09, 3.06), 2: runs(3.5, 3.6, 3.55)}
    assert [row.trial for row in choose(losses, {0: 0.02, 1: 0.01, 2: 0.001})] == [1, 0, 2]


def test_a_leader_that_diverges_by_another_seed_is_left_out() -> None:
    found = choose({0: runs(2.9, math.inf), 1: runs(3.0, 3.1)}, {0: 0.01, 1: 0.02})
    assert [row.trial for row in found] == [1]


def test_where_all_diverge_by_another_seed_none_is_left() -> None:
    assert choose({0: runs(2.9, math.inf), 1: runs(3.0, math.inf)}, {0: 0.01, 1: 0.02}) == []
