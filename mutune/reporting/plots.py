"""Frames → pictures. Each function draws one frame of `mutune.reporting.frames` into an `Axes` it is given.

They read no file, fit nothing and set no global style. Colours: widths on viridis without its pale end, tables from the
Okabe-Ito palette; both are told apart by colour-blind readers and differ in brightness too.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from mutune.reporting.frames import loss_window, mean_valleys

HELDOUT_LABEL = "held-out loss (nats per token)"
TABLE_NAMES = {"mup": "μP", "sp": "SP", "btlm": "BTLM", "completep": "CompleteP"}
TABLE_COLOURS = {"mup": "#0072B2", "sp": "#D55E00", "btlm": "#009E73", "completep": "#CC79A7"}
TABLE_MARKERS = {"mup": "o", "sp": "s", "btlm": "^", "completep": "D"}
RED, GREY, DARK = "#B2182B", "0.55", "0.25"
LEGEND_COLUMNS = 4
MOST_TICKS = 9
BEST = "lowest loss"
WITHIN, OUTSIDE = "within its bounds", "out of bounds, with its exponent"
START = 0.05  # of a run's tokens, whose losses may leave the axes
FLAT = 3.0  # times the rest's range that the losses of the start are above its lowest, from which on they do
_BELOW = 0.45  # inches from an axis down to its legend: tick labels and the axis's own label lie between
_EDGE_MARKERS = {"low": "<", "high": ">"}
_DODGE = 0.11  # octaves between the marks of neighbouring widths at the top of a valley plot


def plot_history(history: pd.DataFrame, axes: Axes) -> None:
    """Every trial's held-out loss in the order of the trials, and the best so far; diverged ones at the top edge."""
    low, high = loss_window(history.value, history.diverged)
    fine = history[~history.diverged & (history.value <= high)]
    axes.plot(fine.trial, fine.value, "o", color=GREY, markersize=4, label="trial")
    best: dict[str, Any] = {"drawstyle": "steps-post", "color": TABLE_COLOURS["mup"], "linewidth": 2}
    axes.plot(history.trial, history.best, label="best so far", **best)
    _mark_above(axes, history, "trial", high)
    axes.set_ylim(low, high)
    axes.set_xlabel("trial")
    axes.set_ylabel(HELDOUT_LABEL)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    _legend_below(axes)
    _tidy(axes)


def plot_slice(runs: pd.DataFrame, name: str, axes: Axes, *, log: bool) -> PathCollection:
    """One searched quantity against the held-out loss, coloured by trial; the best finished run is ringed.

    Args:
        runs: rows of `load_runs`; unfinished ones are not drawn.
        name: the column on the x axis.
        log: a logarithmic axis.

    Returns:
        The points, for a colour bar.
    """
    over = runs[runs.finished | runs.diverged].sort_values("trial")
    low, high = loss_window(over.value, over.diverged)
    fine = over[~over.diverged & (over.value <= high)]
    if name == "learning_rate" and log:
        _octave_axis(axes, math.log2(over[name].min()), math.log2(over[name].max()))
    elif log:
        _log_axis(axes)
    points = axes.scatter(fine[name], fine.value, c=fine.trial.astype(float), cmap="cividis_r", s=22)
    best = fine.nsmallest(1, "value")
    ring: dict[str, Any] = {"color": RED, "fillstyle": "none", "markersize": 10, "markeredgewidth": 1.6}
    axes.plot(best[name], best.value, "o", label=BEST, **ring)
    _mark_above(axes, over, name, high)
    axes.set_ylim(low, high)
    axes.set_xlabel(name.replace("_", " "))
    axes.set_ylabel(HELDOUT_LABEL)
    _tidy(axes)
    return points


def plot_valleys(
    valleys: pd.DataFrame,
    optima: pd.DataFrame,
    axes: Axes,
    *,
    window: tuple[float, float] | None = None,
    legend: bool = True,
) -> None:
    """Loss over learning rate, a colour per width: seeds as faint points, their mean as a line, optima as stars.

    What lies above the window is marked at its top edge: a cross where a run diverged, else a triangle.

    Args:
        valleys: rows of one table.
        optima: rows of `optima` for the same table. One at the edge of the rates is a hollow triangle that
            points to where the optimum lies.
        window: lowest and highest loss shown; None chooses them with `loss_window`.
    """
    low, high = window or loss_window(valleys.loss, valleys.diverged)
    means = mean_valleys(valleys)
    widths = sorted(valleys.width.unique())
    for index, (width, colour) in enumerate(zip(widths, width_colours(widths), strict=True)):
        line, points = means[means.width == width], valleys[valleys.width == width]
        axes.plot(line.learning_rate, line.loss, color=colour, linewidth=2, label=f"width {width}", zorder=3)
        seen = points[~points.diverged]
        axes.plot(seen.learning_rate, seen.loss, "o", color=colour, markersize=4.5, alpha=0.45, markeredgewidth=0)
        dodge = 2.0 ** (_DODGE * (index - (len(widths) - 1) / 2))
        shifted = line.assign(learning_rate=line.learning_rate * dodge, value=line.loss)
        _mark_above(axes, shifted, "learning_rate", high, colour)
        for optimum in optima[optima.width == width].to_dict("records"):
            _mark_optimum(axes, optimum["learning_rate"], optimum["loss"], optimum["edge"], colour)
    axes.set_ylim(low, high)
    _octave_axis(axes, valleys.log2_lr.min(), valleys.log2_lr.max())
    axes.set_xlabel("base learning rate (log scale, in octaves)")
    axes.set_ylabel(HELDOUT_LABEL)
    _tidy(axes)
    if legend:
        _legend_below(axes, legend_entries([axes]))


def legend_entries(panels: Sequence[Axes]) -> dict[str, Artist]:
    """Label → artist of valley plots that share their colours: the widths, then the marks that occur in any panel."""
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    widths = sorted((label for label in lines if label.startswith("width ")), key=lambda label: int(label.split()[1]))
    return {label: lines[label] for label in [*widths, *MARKS] if label in lines}


def plot_drift(offsets: pd.DataFrame, axes: Axes) -> None:
    """The optimum's distance from that of the narrowest width, over widths: a line per table, bars for intervals.

    The band of half an octave either way is what a practical search cannot tell apart. Hollow triangles are bounds.
    """
    axes.axhspan(-0.5, 0.5, facecolor="0.92", zorder=0, label="±½ octave")
    axes.axhline(0.0, color=GREY, linewidth=0.8, zorder=1)
    axes.set_xscale("log", base=2)
    for table, rows in offsets.groupby("table"):
        colour = TABLE_COLOURS.get(str(table), "black")
        style: dict[str, Any] = {"color": colour, "marker": TABLE_MARKERS.get(str(table), "o"), "markersize": 8}
        axes.plot(rows.width, rows.octaves, linewidth=2, label=table_name(str(table)), zorder=3, **style)
        axes.vlines(rows.width, rows.low, rows.high, color=colour, linewidth=6, alpha=0.35)
        for edge, marker in (("low", "v"), ("high", "^")):
            bound = rows[rows.edge == edge]
            style |= {"marker": marker, "markerfacecolor": "white", "markersize": 9}
            axes.plot(bound.width, bound.octaves, linestyle="none", zorder=4, **style)
    axes.plot([], [], color=DARK, linewidth=5, alpha=0.35, label="90 % interval")
    if offsets.edge.notna().any():
        axes.plot([], [], "v", color=DARK, markerfacecolor="white", markersize=8, label=_EDGE)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -1.0), max(high, 1.0))
    _width_axis(axes, sorted(offsets.width.unique()))
    axes.set_xlabel("width")
    base = " or ".join(map(str, sorted(offsets.base_width.unique())))
    axes.set_ylabel(f"optimum relative to width {base}\n(octaves of learning rate)")
    _legend_below(axes)
    _tidy(axes)


def plot_optima(rungs: pd.DataFrame, axes: Axes, *, axis: str, rate: float) -> None:
    """The optima of rungs along one axis, with their 90 % intervals, over the transferred rate.

    Args:
        rungs: rows of `frames.certified`.
        axis: the column that is on the x axis.
        rate: log2 of the transferred rate.
    """
    rungs = rungs.sort_values(axis)
    _rate_band(axes, rate)
    bar: dict[str, Any] = {"color": TABLE_COLOURS["mup"], "linewidth": 6, "alpha": 0.35}
    axes.vlines(rungs[axis], rungs.low, rungs.high, label="90 % interval", **bar)
    line: dict[str, Any] = {"color": TABLE_COLOURS["mup"], "linewidth": 1.4, "markersize": 7, "zorder": 3}
    axes.plot(rungs[axis], rungs.optimum, "o-", label="fitted optimum", **line)
    for edge, marker in (("low", "v"), ("high", "^")):
        bound = rungs[rungs.edge == edge]
        style: dict[str, Any] = {"color": TABLE_COLOURS["mup"], "markerfacecolor": "white", "markersize": 9}
        axes.plot(bound[axis], bound.optimum, marker, zorder=4, label=_EDGE if len(bound) else None, **style)
    axes.set_xscale("log", base=2)
    _width_axis(axes, sorted(rungs[axis].unique()))
    if axis == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _count(float(f"{tokens:.3g}"))))
    axes.set_xlabel(axis)
    axes.set_ylabel("best base learning rate (log2)")
    _tidy(axes)


def plot_target(target: dict[str, Any], axes: Axes) -> None:
    """The target's expected optimum with its 90 % interval; `target` is that of `frames.certified`."""
    _rate_band(axes, target["rate"])
    axes.vlines([0], target["low"], target["high"], color=TABLE_COLOURS["sp"], linewidth=6, alpha=0.35)
    axes.plot([0], [target["optimum"]], "D", color=TABLE_COLOURS["sp"], markersize=8)
    axes.set_xlim(-1, 1)
    axes.xaxis.set_major_locator(NullLocator())
    axes.set_xlabel("target")
    _tidy(axes)


def _rate_band(axes: Axes, rate: float) -> None:
    axes.axhspan(rate - 0.5, rate + 0.5, facecolor="0.92", zorder=0, label="±½ octave")
    axes.axhline(rate, color=GREY, linewidth=1, linestyle="--", zorder=1, label="transferred rate")


def plot_loss_curves(curves: pd.DataFrame, axes: Axes, *, by: str = "width", log: bool = False) -> None:
    """Smoothed training loss over tokens, one line per run and one colour per value of `by`; held-out loss as dots.

    Args:
        curves: rows of `frames.curves`.
        by: the column that colours and names the lines.
        log: a logarithmic token axis.
    """
    values, window = sorted(curves[by].unique()), int(curves.window.iloc[0])
    smoothing = f"training loss, mean of {window} steps" if window > 1 else "training loss"
    single = curves.run.nunique() == 1
    colours = [TABLE_COLOURS["mup"]] if single else width_colours(values)
    for value, colour in zip(values, colours, strict=True):
        label = smoothing if single else f"{by.replace('_', ' ')} {value:.4g}"
        dots = TABLE_COLOURS["sp"] if single else colour
        for _, run in curves[curves[by] == value].groupby("run"):
            axes.plot(run.tokens, run.smooth_loss, color=colour, linewidth=1.4, label=label)
            label = "_nolegend_"
            told = run[run.heldout_loss.notna()]
            axes.plot(told.tokens, told.heldout_loss, "o", color=dots, markeredgecolor="white", markersize=6, zorder=4)
    if curves.heldout_loss.notna().any():
        axes.plot([], [], "o", color=TABLE_COLOURS["sp"] if single else DARK, label="held-out loss")
    if log:
        axes.set_xscale("log")
    else:
        _token_axis(axes)
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)" if single else f"{smoothing}\n(nats per token)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=LEGEND_COLUMNS, frameon=False)
    _tidy(axes)


def look_past_the_start(curves: pd.DataFrame, axes: Axes) -> None:
    """Let the first losses of a run leave the axes at the top, where the rest would be flat at the bottom.

    Args:
        curves: rows of `frames.curves`, of one run.
    """
    later = curves[curves.tokens > START * curves.tokens.max()]
    shown = pd.concat([later.smooth_loss, later.heldout_loss]).dropna()
    low, high = float(shown.min()), float(shown.max())
    if not math.isfinite(high - low):  # also where there is none
        return
    if curves.smooth_loss.max() - low > FLAT * (high - low) > 0:
        axes.set_ylim(low - 0.1 * (high - low), high + 0.4 * (high - low))


def plot_band(band: pd.DataFrame, outside: pd.DataFrame, axes: Axes) -> None:
    """The band that one run's smoothed training loss was foretold in, and in red where it lies outside.

    Args:
        band: rows of `frames.band`. outside: those of `frames.outside`.
    """
    style: dict[str, Any] = {"facecolor": "0.8", "edgecolor": "0.55", "linewidth": 0.8, "zorder": 1}
    axes.fill_between(band.tokens, band.low, band.high, label="foretold band", **style)
    axes.plot(band.tokens, band["median"], color=GREY, linewidth=0.8, linestyle="--", zorder=1.5)
    if outside.smooth_loss.notna().any():
        red: dict[str, Any] = {"color": RED, "linewidth": 2.2, "zorder": 3}
        axes.plot(outside.tokens, outside.smooth_loss, label="outside it", **red)


def plot_learning_rate(records: pd.DataFrame, axes: Axes) -> None:
    """The base learning rate of one run over tokens."""
    axes.plot(records.tokens, records.lr, color=DARK, linewidth=1.4)
    axes.set_ylim(bottom=0.0)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    _token_axis(axes)
    axes.set_xlabel("tokens")
    axes.set_ylabel("base\nlearning rate")
    _tidy(axes)


def plot_context_switches(switches: pd.DataFrame, panels: Sequence[Axes]) -> None:
    """A dashed line through the panels where the context length changes, named in the first one."""
    for row in switches.to_dict("records"):
        for axes in panels:
            axes.axvline(row["tokens"], color=GREY, linestyle="--", linewidth=1)
        panels[0].text(
            row["tokens"], 0.98, f" context {row['before']} → {row['after']} ", color=DARK, fontsize="small",
            transform=panels[0].get_xaxis_transform(), ha="right", va="top",
        )  # fmt: skip


def table_name(table: str) -> str:
    """How a parametrization is written: μP for `mup`."""
    return TABLE_NAMES.get(table, table)


def width_colours(widths: Sequence[Any]) -> list[tuple[float, ...]]:
    """One colour per width, dark to light, without viridis's pale end."""
    top = 0.82
    return [colormaps["viridis"](top * i / max(1, len(widths) - 1)) for i in range(len(widths))]


_OPTIMUM, _EDGE = "fitted optimum", "optimum at the edge or beyond"
_DIVERGED, _ABOVE = "diverged", "above the plot"
MARKS = (_OPTIMUM, _EDGE, _ABOVE, _DIVERGED)


def _mark_optimum(axes: Axes, rate: float, loss: float, edge: Any, colour: Any) -> None:
    style: dict[str, Any] = {"marker": "*", "markersize": 15, "markeredgecolor": "white", "markeredgewidth": 0.7}
    if isinstance(edge, str):
        style = {"marker": _EDGE_MARKERS[edge], "markersize": 10, "markerfacecolor": "white", "markeredgewidth": 1.8}
    axes.plot([rate], [loss], color=colour, zorder=6, **style)
    _sample(axes, _EDGE if isinstance(edge, str) else _OPTIMUM, **style)


def _mark_above(axes: Axes, points: pd.DataFrame, x: str, high: float, colour: Any = None) -> None:
    """Mark points above `high`, and every diverged one, at the top edge."""
    for label, marker, default, rows in (
        (_DIVERGED, "x", RED, points[points.diverged]),
        (_ABOVE, "^", GREY, points[~points.diverged & (points.value > high)]),
    ):
        if rows.empty:
            continue
        style: dict[str, Any] = {"marker": marker, "markersize": 7, "markeredgewidth": 2 if marker == "x" else 0}
        style |= {"linestyle": "none", "transform": axes.get_xaxis_transform(), "zorder": 5 + (marker == "x")}
        axes.plot(rows[x], [0.97] * len(rows), color=colour or default, **style)
        _sample(
            axes,
            label,
            color=DARK if colour else default,
            marker=marker,
            markersize=7,
            markeredgewidth=style["markeredgewidth"],
        )


def _sample(axes: Axes, label: str, **style: Any) -> None:
    """An entry of the legend for a kind of mark, once."""
    if label not in [line.get_label() for line in axes.get_lines()]:
        axes.plot([], [], label=label, **{"linestyle": "none", "color": DARK, **style})


def _octave_axis(axes: Axes, lowest: float, highest: float) -> None:
    """A log2 axis with a tick at each power of two, or each second one where they are many."""
    axes.set_xscale("log", base=2)
    first, last = math.ceil(lowest - 1e-6), math.floor(highest + 1e-6)
    step = 1 if last - first <= 8 else 2
    axes.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(first, last + 1, step)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: rf"$2^{{{math.log2(rate):.0f}}}$"))
    axes.xaxis.set_minor_locator(NullLocator())


def _log_axis(axes: Axes) -> None:
    """A log10 axis with plain numbers at 1, 2 and 5."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _width_axis(axes: Axes, widths: Sequence[int]) -> None:
    shown = widths[:: 1 + len(widths) // MOST_TICKS]
    axes.xaxis.set_major_locator(FixedLocator(list(map(float, shown))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda width, _: f"{width:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _token_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: _count(tokens)))


def _count(number: float) -> str:
    """120000 → 120K."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"


def plot_coordinates(lines: pd.DataFrame, axes: Axes, *, axis: str, title: str) -> None:
    """Coordinates of one quantity over size, relative to the smallest; what is out of bounds is red and named.

    Args:
        lines: rows of `frames.check_lines` of one quantity.
        axis: `width` or `depth`.
    """
    sizes = sorted(lines["size"].unique())
    axes.axhline(1.0, color=DARK, linewidth=0.8, linestyle=":")
    failed = []
    for place, line in lines.groupby("place", sort=False):
        passed = bool(line.passed.iloc[0])
        style: dict[str, Any] = (
            {"color": GREY, "linewidth": 1.2, "alpha": 0.8} if passed else {"color": RED, "linewidth": 2}
        )
        style |= {"label": WITHIN if passed else OUTSIDE, "zorder": 2 if passed else 3}
        axes.plot(line["size"], line.ratio, marker="o", markersize=3, **style)
        if not passed:
            failed.append((line.ratio.iloc[-1], f"{place} {line.slope.iloc[0]:+.2f}"))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.45), max(high, 2.2))
    axes.xaxis.set_major_locator(FixedLocator([float(size) for size in sizes]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.set_xlabel(axis)
    axes.set_ylabel(f"RMS over that at {axis} {sizes[0]:g}")
    outside = f", {len(failed)} out of bounds" if failed else ""
    axes.set_title(f"{title}: {lines.place.nunique()} places{outside}", loc="left", fontsize=10)
    worst = sorted(failed, key=lambda item: -abs(math.log2(item[0])))[:4]
    if worst:
        up = worst[0][0] > 1
        text = "\n".join(label for _, label in worst) + ("\n…" if len(failed) > 4 else "")
        place, align = (0.97, "top") if up else (0.03, "bottom")
        axes.text(0.03, place, text, va=align, transform=axes.transAxes, color=RED, fontsize=8)
    _tidy(axes)


def _legend_below(axes: Axes, entries: dict[str, Artist] | None = None) -> None:
    """A legend under the axes, where it covers nothing; by default of everything that has a label."""
    handles, labels = axes.get_legend_handles_labels() if entries is None else (list(entries.values()), list(entries))
    inches = ScaledTranslation(0, -_BELOW, axes.figure.dpi_scale_trans)
    place: dict[str, Any] = {"bbox_to_anchor": (0.5, 0.0), "bbox_transform": axes.transAxes + inches}
    axes.legend(handles, labels, loc="upper center", ncols=LEGEND_COLUMNS, frameon=False, **place)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
