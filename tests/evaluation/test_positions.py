"""Loss by position: its windows lie in one document each, its bins and errors are those of the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mutune.errors import Refusal
from mutune.evaluation.positions import (
    DocumentWindows,
    document_windows,
    loss_by_position,
    mean_loss,
    position_bins,
    token_losses,
)
from mutune.model.shape import ModelConfig
from tests.training.tiny import VOCAB, tiny_decoder, tiny_plan

SHAPE = ModelConfig(width=16, depth=1, head_size=16)


class Known(nn.Module):
    """Gives the token 0 the probability 2^-position, and the rest of it to the token 1."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, ids_NT: torch.Tensor) -> torch.Tensor:
        zero_T = 2.0 ** -torch.arange(1, ids_NT.shape[1] + 1)
        return torch.stack([zero_T, 1 - zero_T], dim=-1).log().expand(*ids_NT.shape, 2)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6), context=st.integers(1, 40))
def test_every_window_lies_in_its_document_and_scores_no_token_twice(lengths: list[int], context: int) -> None:
    ends = np.cumsum(lengths).astype(np.uint64)
    tokens = np.arange(int(ends[-1]), dtype=np.uint16)
    if max(lengths) <= context:
        with pytest.raises(Refusal, match=f"context_length={context} is more than any held-out document has"):
            document_windows(tokens, ends, context)
        return
    drawn = document_windows(tokens, ends, context)
    assert drawn.windows.shape[1] == context + 1
    assert len(drawn.windows) == sum((length - 1) // context for length in lengths)
    for window, document in zip(drawn.windows, drawn.documents, strict=True):
        assert ends[document] - lengths[document] <= window[0]
        assert window[-1] < ends[document]
        assert np.array_equal(window, np.arange(window[0], window[0] + context + 1))
    targets = drawn.windows[:, 1:]
    assert len(np.unique(targets)) == targets.size


def test_fewer_windows_are_evenly_spaced() -> None:
    drawn = document_windows(np.arange(101, dtype=np.uint16), np.array([101], dtype=np.uint64), 10, num_windows=4)
    assert drawn.windows[:, 0].tolist() == [0, 20, 50, 70]


def test_the_bins_end_before_the_powers_of_two() -> None:
    assert list(position_bins(8)) == [(0, 0), (1, 1), (2, 3), (4, 7)]
    assert list(position_bins(11)) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 10)]
    assert list(position_bins(1)) == [(0, 0)]


def test_the_loss_at_a_position_is_that_of_its_target() -> None:
    drawn = DocumentWindows(np.zeros((3, 9), dtype=np.int64), np.arange(3))
    losses = [row.loss / math.log(2) for row in loss_by_position(Known(), drawn)]
    assert losses == pytest.approx([1, 2, 3.5, 6.5], rel=1e-5)


def test_the_mean_over_positions_is_the_models_own_loss() -> None:
    model = tiny_decoder(SHAPE, tiny_plan(SHAPE))
    windows = np.random.default_rng(0).integers(VOCAB, size=(700, 25))  # more than one forward pass
    losses = token_losses(model, windows)
    ids = torch.from_numpy(windows)
    assert losses.shape == (700, 24)
    assert losses.mean() == pytest.approx(model.loss(ids[:, :-1], ids[:, 1:]).item(), rel=1e-6)
    ours = token_losses(model, windows[:3], lambda ids_NT: model(ids_NT) * 0)
    assert ours == pytest.approx(math.log(VOCAB), rel=1e-6)


def test_a_later_token_changes_no_loss_before_it() -> None:
    model = tiny_decoder(SHAPE, tiny_plan(SHAPE))
    windows = np.random.default_rng(0).integers(VOCAB, size=(2, 17))
    changed = windows.copy()
    changed[:, 12] = (changed[:, 12] + 1) % VOCAB
    before, after = token_losses(model, windows), token_losses(model, changed)
    assert np.array_equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).all()


def test_the_error_is_that_of_a_sample_of_documents() -> None:
    """Of windows alike within a document, more windows say nothing more; of one window each it is the usual one."""
    values = np.random.default_rng(1).normal(size=20)
    alone = mean_loss(values[:, None], np.arange(20), 0, 0)
    assert alone.error == pytest.approx(values.std(ddof=1) / math.sqrt(20))
    alike = mean_loss(np.repeat(values, 9)[:, None], np.repeat(np.arange(20), 9), 0, 0)
    assert (alike.loss, alike.error) == pytest.approx((alone.loss, alone.error))
    assert math.isnan(mean_loss(values[:, None], np.zeros(20, dtype=np.int64), 0, 0).error)


def test_the_error_covers_the_truth_as_often_as_it_says() -> None:
    draw, inside = np.random.default_rng(2), 0
    whose = np.repeat(np.arange(30), 5)
    for _ in range(400):
        losses = draw.normal(size=30)[whose] + draw.normal(size=(4, 150))
        row = mean_loss(losses.T, whose, 0, 3)
        inside += abs(row.loss) < 1.96 * row.error
    assert 0.91 < inside / 400 < 0.97
