"""Loss by position: every number of the table and the figure, from values that can be computed by hand."""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mutune.errors import Refusal
from mutune.reporting.positions import (
    load_positions,
    plot_loss_by_position,
    plot_position_differences,
    position_differences,
    position_means,
)

HEADER = "arm,context,seed,first,last,loss,error\n"
#: Losses of seeds 0 and 1 in the bins 0, 1 and 2-3.
LOSSES = {"control": [(5.0, 4.0, 3.0), (5.0, 4.2, 3.2)], "switched": [(5.5, 4.0, 2.5), (5.25, 4.1, 3.0)]}


@pytest.fixture
def losses(tmp_path: Path) -> pd.DataFrame:
    bins, contexts = ((0, 0), (1, 1), (2, 3)), {"control": 2, "switched": 4}
    lines = [
        f"{arm},{contexts[arm]},{seed},{first},{last},{loss},0.5"
        for arm, seeds in LOSSES.items()
        for seed, values in enumerate(seeds)
        for (first, last), loss in zip(bins, values, strict=True)
    ]
    (tmp_path / "losses.csv").write_text(HEADER + "\n".join(lines[::-1]))
    return load_positions(tmp_path / "losses.csv")


def test_a_mean_is_over_seeds_with_their_range(losses: pd.DataFrame) -> None:
    means = position_means(losses)
    assert means.arm.tolist() == ["control"] * 3 + ["switched"] * 3
    assert means.loss.tolist() == pytest.approx([5, 4.1, 3.1, 5.375, 4.05, 2.75])
    assert (means.low.tolist()[2], means.high.tolist()[2], means.error.tolist()[2]) == (3.0, 3.2, 0.5)
    assert means.seen.tolist()[:3] == pytest.approx([1, 2, 12**0.5])


def test_a_difference_is_within_a_seed_and_has_a_sign_where_seeds_agree(losses: pd.DataFrame) -> None:
    found = position_differences(losses)
    assert found.difference.tolist() == pytest.approx([0.375, -0.05, -0.35])
    assert found.low.tolist() == pytest.approx([0.25, -0.1, -0.5])
    assert found.high.tolist() == pytest.approx([0.5, 0.0, -0.2])
    assert found.spread.tolist() == pytest.approx([0.125 * 2**0.5, 0.05 * 2**0.5, 0.15 * 2**0.5])
    assert found.sign.tolist() == [1, 0, -1]


def test_the_figure_shows_the_frame(losses: pd.DataFrame) -> None:
    above, below = Figure().subplots(2, 1)
    means, differences = position_means(losses), position_differences(losses)
    plot_loss_by_position(means, above)
    plot_position_differences(differences, below)
    lines = {str(line.get_label()): line for line in above.get_lines()}
    control = means[means.arm == "control"]
    assert list(lines["control: trained to 2"].get_ydata()) == control.loss.tolist()
    assert list(lines["control: trained to 2"].get_xdata()) == control.seen.tolist()
    assert [text.get_text() for text in above.texts] == ["context 2 "]  # of the arm that ends before the last position
    assert list(below.get_lines()[-1].get_ydata()) == differences.difference.tolist()
    assert list(below.get_xticks()) == [1, 2, 4]


def test_what_is_not_there_is_named_with_what_makes_it(tmp_path: Path) -> None:
    made = "make them with: python -m pytest -m soak tests/evaluation/test_context_switch.py"
    with pytest.raises(Refusal, match=f"none.csv holds no losses by position; {made}"):
        load_positions(tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("arm,seed\ncontrol,0\n")
    with pytest.raises(Refusal, match=f"other.csv has no column context; {made}"):
        load_positions(tmp_path / "other.csv")
