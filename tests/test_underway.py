"""Which checkpoints of a run stay while it is under way."""

import pytest

from mutune.config import TrainConfig
from mutune.training.alarms import GuardConfig
from mutune.underway import _kept


@pytest.mark.parametrize("window", [16, 64])
@pytest.mark.parametrize("every", [1, 5, 10, 16, 31, 32, 33, 63, 64, 65, 100, 200])
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_one_that_is_older_than_two_windows_is_always_there_and_few_are_besides(
    window: int, every: int, keep: int
) -> None:
    kept = _kept(TrainConfig(keep_checkpoints=keep, guard=GuardConfig(window=window, after=8)), [], [])
    steps = list[int]()
    for step in range(every, 1500, every):
        steps = [*steps, step]
        steps = sorted(set(kept(steps)) & set(steps))
        assert step in steps
        if step - 2 * window >= every:
            assert min(steps) <= step - 2 * window
            assert max(s for s in steps if s <= step - 2 * window) > step - 4 * window - 2 * every
        assert len(steps) <= keep + 4


def test_ends_of_stages_and_what_was_asked_for_stay() -> None:
    kept = _kept(TrainConfig(keep_checkpoints=1), [500], [300])
    assert {300, 500, 600, 900} <= set(kept([*range(100, 1100, 100)]))
