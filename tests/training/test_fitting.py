"""The largest micro-batch on the present device: searched by arithmetic, kept by measurement."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from mutune.training.config import RECOMPUTED, ParallelConfig
from mutune.training.fitting import Fit, advice_here, fit_table, search, stage_bytes
from mutune.training.peak import apart
from tests.training.test_quote import btlm


def device(per_sequence: int, asked: list[int], limit: int) -> Callable[[int], int | None]:
    """One whose steps take so much, and that runs out of memory at `limit`."""

    def measure(sequences: int) -> int | None:
        asked.append(sequences)
        need = 100 + per_sequence * sequences
        return need if need <= limit else None

    return measure


@pytest.mark.parametrize("limit", [1000, 10**6])  # where memory runs out: as soon as it is not free, or not at all
@pytest.mark.parametrize("really", [5, 8, 10, 13, 20])
def test_what_is_found_was_measured_to_fit_whatever_the_estimate_said(really: int, limit: int) -> None:
    asked: list[int] = []
    found, took = search(1000, 1000, lambda n: 100 + 10 * n, device(really, asked, limit))
    assert found in asked
    assert took == 100 + really * found <= 1000
    best = 900 // really
    assert found >= 0.85 * best
    assert len(asked) <= 6


def test_a_share_that_fits_whole_is_tried_once() -> None:
    asked: list[int] = []
    assert search(16, 1000, lambda n: 100 + 10 * n, device(11, asked, 1000)) == (16, 276)
    assert asked == [16]


def test_where_the_estimate_allows_none_one_is_tried_all_the_same() -> None:
    asked: list[int] = []
    assert search(16, 105, lambda n: 130 * n, device(5, asked, 105)) == (1, 105)
    assert search(16, 90, lambda n: 10 * n, device(5, asked, 90)) == (0, 0)


def test_what_needs_far_more_than_is_free_is_not_tried() -> None:
    asked: list[int] = []
    assert search(16, 105, lambda n: 140 * n, device(5, asked, 105)) == (0, 0)
    assert not asked


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def greedy() -> int:
    import torch

    return len(torch.empty(2**60, dtype=torch.uint8))


def wrong() -> None:
    raise ValueError("something else")


def test_a_process_that_memory_ends_is_no_number_and_ends_nothing_else() -> None:
    assert apart(killed) is None
    assert apart(greedy) is None
    with pytest.raises(ValueError, match="something else"):
        apart(wrong)


def test_the_words_say_what_to_set_or_that_nothing_fits() -> None:
    fits, tight, none = Fit(16, 16, 10, 11, 2**30), Fit(3, 9, 10, 11, 2**30), Fit(0, 9, 2**31, 0, 2**30)
    assert fit_table([fits, tight]).endswith("set        parallel.micro_sequences=[16,3]")
    said = fit_table([fits, none], "advice     less")
    assert "not one sequence fits into the 1.00 GiB that are free: about 2.00 GiB are needed" in said
    assert "set " not in said
    assert said.endswith("\nadvice     less")


def test_the_advice_for_this_device_fits_by_its_estimate_and_is_less_than_what_failed() -> None:
    spec, now = btlm(), ParallelConfig()

    def failed(have: int, way: ParallelConfig) -> list[Fit]:
        return [Fit(0, 9, stage_bytes(spec, way, i, 1, "cpu"), 0, have) for i in range(2)]

    ways = {recomputed: replace(now, activation_checkpointing=recomputed) for recomputed in RECOMPUTED}
    needs = {name: max(fit.estimated for fit in failed(0, way)) for name, way in ways.items()}
    for name in ("selective", "full"):
        said = advice_here(spec, now, "cpu", failed(needs[name], now))
        assert f"with parallel.activation_checkpointing={name}, or contexts of at most " in said
        assert "torchrun" not in said  # whose processes would share the memory
    measured_worse = advice_here(spec, now, "cpu", failed(10 * needs["none"], now))
    assert "with parallel.activation_checkpointing=selective, " in measured_worse
    assert measured_worse.endswith("contexts of at most 1,024 in target.stages, at the transfer")  # stage 1 has 2,048
    assert "take a smaller target.model" in advice_here(spec, now, "cpu", failed(2**30, now))
