"""Loss by position, of runs that switched to a longer context and of their controls: frames, then plots.

A table of such losses has one row for each arm, seed and bin of positions: `arm`, `context` (the longest that the run
was trained at), `seed`, `first`, `last` (the bin's positions), `loss` (nats per token) and `error`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mutune.errors import Refusal

COLUMNS = ("arm", "context", "seed", "first", "last", "loss", "error")
COLOURS = {"switched": "#D55E00", "control": "#0072B2"}
GREY, DARK = "0.55", "0.25"
FIRST_SHOWN = 2  # position at which a loss is within the axes
LINEAR = 0.01  # nats, within which differences are on a linear axis
HOW = "make them with: python -m pytest -m soak tests/evaluation/test_context_switch.py"


def load_positions(path: Path) -> pd.DataFrame:
    """The table in a CSV file, with `seen`: the tokens that a position of the bin has seen, their geometric mean.

    Raises:
        Refusal: there is no such file; what makes it is named.
    """
    try:
        frame = pd.read_csv(path)
    except OSError:
        raise Refusal(f"{path} holds no losses by position; {HOW}") from None
    if missing := [name for name in COLUMNS if name not in frame]:
        raise Refusal(f"{path} has no column {missing[0]}; {HOW}")
    return frame.assign(seen=np.sqrt((frame["first"] + 1) * (frame["last"] + 1)))


def position_means(losses: pd.DataFrame) -> pd.DataFrame:
    """A row for each arm and bin: the mean over seeds, `low` and `high` of them, and the mean `error`."""
    keys = ["arm", "context", "first", "last", "seen"]
    told = {"loss": ("loss", "mean"), "low": ("loss", "min"), "high": ("loss", "max"), "error": ("error", "mean")}
    return losses.groupby(keys, as_index=False).agg(**told).sort_values(["arm", "first"], ignore_index=True)


def position_differences(losses: pd.DataFrame) -> pd.DataFrame:
    """A row for each bin: the switched arm's loss minus its control's of the same seed.

    `difference` is the mean over seeds, `low` and `high` are the least and the greatest, `spread` is their standard
    deviation (NaN of one seed), and `sign` is -1 or 1 where the seeds agree on it, else 0.
    """
    keys = ["seed", "first", "last", "seen"]
    arms = losses.pivot_table(index=keys, columns="arm", values="loss")
    apart = (arms["switched"] - arms["control"]).rename("difference").reset_index()
    found = apart.groupby(keys[1:], as_index=False)["difference"].agg(["mean", "min", "max", "std"])
    found.columns = pd.Index([*keys[1:], "difference", "low", "high", "spread"])
    agreed = np.where(found.low > 0, 1, np.where(found.high < 0, -1, 0))
    return found.assign(sign=agreed).sort_values("first", ignore_index=True)


def plot_loss_by_position(means: pd.DataFrame, axes: Axes) -> None:
    """Loss over the tokens seen: a line for each arm, a band for the range of its seeds.

    The first positions, at which little can be known, lie above the axes.
    """
    for arm, rows in means.groupby("arm", sort=False):
        colour, context = COLOURS.get(str(arm), DARK), int(rows["context"].iloc[0])
        style: dict[str, Any] = {"color": colour, "linewidth": 2, "marker": "o", "markersize": 4}
        axes.plot(rows.seen, rows.loss, label=f"{arm}: trained to {context:,}", **style)
        axes.fill_between(rows.seen, rows.low, rows.high, color=colour, alpha=0.2, linewidth=0)
    for text, context in _contexts(means):
        axes.axvline(context, color=GREY, linestyle="--", linewidth=1)
        axes.text(
            context, 0.98, text, color=DARK, fontsize="small", ha="right", va="top",
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    _position_axis(axes, means)
    shown = means[means["first"] >= FIRST_SHOWN]
    margin = 0.1 * (shown.high.max() - shown.low.min())
    axes.set_ylim(shown.low.min() - margin, shown.high.max() + margin)
    axes.set_ylabel("held-out loss (nats per token)")
    axes.legend(frameon=False)


def plot_position_differences(differences: pd.DataFrame, axes: Axes) -> None:
    """The switched arm's loss minus its control's: the mean over seeds, and a bar from the least to the greatest.

    The axis is linear within a hundredth of a nat, and logarithmic outside.
    """
    colour = COLOURS["switched"]
    axes.axhline(0.0, color=GREY, linewidth=0.8)
    axes.vlines(differences.seen, differences.low, differences.high, color=colour, linewidth=6, alpha=0.35)
    axes.plot(differences.seen, differences.difference, "o", color=colour, markersize=5)
    _position_axis(axes, differences)
    axes.set_yscale("symlog", linthresh=LINEAR)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("switched - control")


def _contexts(means: pd.DataFrame) -> Iterator[tuple[str, int]]:
    """The contexts that are shorter than the positions go, with their labels."""
    longest = means["last"].max() + 1
    return ((f"context {c:,} ", int(c)) for c in sorted(means.context.unique()) if c < longest)


def _position_axis(axes: Axes, frame: pd.DataFrame) -> None:
    axes.set_xscale("log", base=2)
    ends = sorted({int(last) + 1 for last in frame["last"]})
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, ends))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0.9, 1.1 * ends[-1])
    axes.set_xlabel("tokens seen (log scale)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
