"""The figures of a folder of results: a study, a transfer or a training run. They go to `figures/` inside it.

Drawing the same records again writes the same bytes.
"""

import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mutune.files import fsync_directory, fsync_file
from mutune.reporting import frames, plots

DPI = 200
PAGE_WIDTH = 8.3  # inches: 1660 pixels, shown at half of them on a page


def draw_study(directory: Path) -> list[Path]:
    """The figures of a study: `valley.png` and `drift.png` for a full grid over width and learning rate and nothing
    more than table and seed, else `history.png` and `slices.png`.

    Raises:
        Refusal: there is no study, or it has no run yet; the command that makes one is named.
    """
    space = frames.load_space(directory)
    runs = frames.load_runs(directory).dropna(subset=["trial"])  # a ladder may lie beside the trials
    if frames.is_grid_of_valleys(directory):
        return _draw_valleys(directory, runs)
    folder = directory / "figures"
    return [
        save(_unit(history_figure(runs), runs), folder / "history.png"),
        save(_unit(slices_figure(runs, space), runs), folder / "slices.png"),
    ]


def draw_transfer(directory: Path, compared: Sequence[Path] = ()) -> list[Path]:
    """The figures of a transfer's ladder of widths: `valley.png` and `drift.png`, with a panel and a line per table.

    Args:
        compared: folders of other tables' ladders.

    Raises:
        Refusal: there is no ladder yet; the command that makes one is named.
    """
    runs = pd.concat([frames.load_runs(ladder) for ladder in (directory / "ladder", *compared)], ignore_index=True)
    named = runs.rung.map(lambda rung: isinstance(rung, str))  # a rung of another axis has a name
    return _draw_valleys(directory, runs[~named])


def draw_certificate(directory: Path) -> list[Path]:
    """The figure of a certificate, `optima.png`: every rung's optimum and the target's, with their intervals.

    Raises:
        Refusal: there is no certificate.
    """
    rungs, target = frames.certified(directory)
    return [save(certificate_figure(rungs, target), directory / "figures" / "optima.png")] if len(rungs) else []


def draw_train(directory: Path) -> list[Path]:
    """The figure of a training run, `loss.png`; it may still be running.

    Where `prediction.json` beside it holds a band, it lies under the loss, which is then smoothed as the band is.

    Raises:
        Refusal: there is no run; the command that makes one is named.
    """
    band = frames.band(directory)
    window = int(band.window.iloc[0]) if len(band) else None
    curves = frames.curves(frames.load_records(directory), frames.load_runs(directory), window)
    return [save(train_figure(curves, band), directory / "figures" / "loss.png")]


def draw_check(directory: Path, axis: str) -> Path:
    """The figure of a coordinate check over `width` or `depth`, `coordinates-<axis>.png`.

    Raises:
        Refusal: there is no check; the command that makes one is named.
    """
    figure = check_figure(frames.check_lines(directory, axis), axis)
    return save(figure, directory / "figures" / f"coordinates-{axis}.png")


def history_figure(runs: pd.DataFrame) -> Figure:
    """How a search went."""
    figure = _figure(PAGE_WIDTH, 3.9)
    axes = figure.subplots()
    history = frames.history(runs)
    plots.plot_history(history, axes)
    best = history.best.iloc[-1] if len(history) else math.nan
    if not math.isnan(best):
        unit = "" if _is_own(runs) else " nats per token"
        axes.set_title(f"{len(history)} trials, best held-out loss {best:.4f}{unit}", loc="left")
    return figure


def slices_figure(runs: pd.DataFrame, space: dict[str, bool]) -> Figure:
    """Each searched quantity against the held-out loss; `space` is that of `frames.load_space`."""
    columns = min(2, len(space))
    rows = math.ceil(len(space) / columns)
    figure = _figure(PAGE_WIDTH, 0.9 + 2.7 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes, (name, log) in zip(panels, space.items(), strict=False):
        points = plots.plot_slice(runs, name, axes, log=log)
    for axes in panels[1::2]:
        axes.set_ylabel("")
    for axes in panels[len(space) :]:
        axes.remove()
    figure.colorbar(points, ax=list(panels[: len(space)]), label="trial", aspect=40, pad=0.02)
    _legend(figure, _labelled(panels[: len(space)]))
    return figure


def valley_figure(valleys: pd.DataFrame) -> Figure:
    """A panel of valleys per table, all with the same axes; the title says how far each optimum moves."""
    tables = [t for t in plots.TABLE_NAMES if t in set(valleys.table)]
    tables += sorted(set(valleys.table) - set(tables))
    window = frames.loss_window(valleys.loss, valleys.diverged)
    optima, drifts = frames.optima(valleys), frames.drift(valleys)
    figure = _figure(PAGE_WIDTH, 4.4)
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True, sharex=True)[0]
    for axes, table in zip(panels, tables, strict=True):
        plots.plot_valleys(
            valleys[valleys.table == table], optima[optima.table == table], axes, window=window, legend=False
        )
        axes.label_outer()
        axes.set_title(f"{plots.table_name(table)}: {movement(drifts[drifts.table == table])}", loc="left", fontsize=12)
    narrow, wide, seeds = valleys.width.min(), valleys.width.max(), valleys.seed.nunique()
    mean = f" ({seeds} seeds)" if seeds > 1 else ""
    title = f"How far the best learning rate moves over widths {narrow} to {wide}{mean}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    named = plots.legend_entries(list(panels))
    marks = {label: artist for label, artist in named.items() if label in plots.MARKS}
    widths = {label: artist for label, artist in named.items() if label not in plots.MARKS}
    _legend(figure, widths, loc="outside right center", ncols=1)
    _legend(figure, marks)
    return figure


def drift_figure(valleys: pd.DataFrame) -> Figure:
    """How far the optimum moves with width, a line per table."""
    figure = _figure(PAGE_WIDTH, 4.1)
    axes = figure.subplots()
    plots.plot_drift(frames.offsets(frames.optima(valleys)), axes)
    words = [
        f"{plots.table_name(row['table'])} {row['octaves_per_doubling']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})"
        for row in frames.drift(valleys).dropna(subset=["octaves_per_doubling"]).to_dict("records")
    ]
    if words:
        axes.set_title(f"{', '.join(words)}\noctaves per doubling of the width, by these points alone", loc="left")
    return figure


def train_figure(curves: pd.DataFrame, band: pd.DataFrame | None = None) -> Figure:
    """Training and held-out loss of one run over its learning rate, with its context switches, and the band, if any,
    that was foretold of a loss smoothed as `curves` is.
    """
    figure = _figure(PAGE_WIDTH, 4.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if band is not None and len(band):
        plots.plot_band(band, frames.outside(curves, band), above)
    plots.plot_loss_curves(curves, above)
    plots.look_past_the_start(curves, above)
    plots.plot_learning_rate(curves, below)
    plots.plot_context_switches(frames.context_switches(curves), [above, below])
    above.label_outer()
    return figure


def check_figure(lines: pd.DataFrame, axis: str) -> Figure:
    """A panel per quantity: flat grey lines are right, red ones are out of bounds."""
    quantities = [quantity for quantity in frames.CHECKED if quantity in set(lines.quantity)]
    figure = _figure(PAGE_WIDTH, 0.3 + 3.1 * math.ceil(len(quantities) / 2))
    panels = figure.subplots(math.ceil(len(quantities) / 2), 2, squeeze=False).ravel()
    for axes, quantity in zip(panels, quantities, strict=False):
        plots.plot_coordinates(lines[lines.quantity == quantity], axes, axis=axis, title=frames.CHECKED[quantity])
    for axes in panels[len(quantities) :]:
        axes.remove()
    _legend(figure, _labelled(panels[: len(quantities)]))
    return figure


def certificate_figure(rungs: pd.DataFrame, target: dict[str, Any]) -> Figure:
    """A panel per axis that the ladder varies, the other axes at the base's, and one for the target."""
    axes_of = [axis for axis in ("width", "tokens", "batch", "depth") if rungs[axis].nunique() > 1] or ["width"]
    ratios = [3.0] * len(axes_of) + [1.0] * ("optimum" in target)
    figure = _figure(PAGE_WIDTH, 3.9)
    panels = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    base = rungs[rungs.base].iloc[0]
    for axis, axes in zip(axes_of, panels, strict=False):
        others = [other for other in axes_of if other != axis]
        plots.plot_optima(rungs[(rungs[others] == base[others]).all(axis=1)], axes, axis=axis, rate=target["rate"])
        axes.label_outer()
    words = ""
    if "optimum" in target:
        plots.plot_target(target, panels[-1])
        off = [target[key] - target["rate"] for key in ("optimum", "low", "high")]
        words = ": at the target {:+.2f} octaves from the transferred one ({:+.2f} to {:+.2f})".format(*off)
    low, high = panels[0].get_ylim()
    panels[0].set_ylim(min(low, target["rate"] - 1.1), max(high, target["rate"] + 1.1))
    figure.suptitle(f"Best learning rates{words}", x=0.01, ha="left", fontsize=11, fontweight="bold")
    _legend(figure, _labelled(panels[: len(axes_of)]))
    return figure


def movement(drift: pd.DataFrame) -> str:
    """What was measured of one table's optimum, in words; `drift` is its row of `frames.drift`."""
    octaves = drift["range"].item()
    if math.isnan(octaves):
        return "not measured at two widths"
    return f"{octaves:.1f} octaves{' or more' if drift.edge.item() else ''}"


def save(figure: Figure, path: Path) -> Path:
    """Write `figure` as a PNG without metadata, atomically; returns `path`."""
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(image.getvalue())
        fsync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_directory(path.parent)
    return path


def _draw_valleys(directory: Path, runs: pd.DataFrame) -> list[Path]:
    valleys = frames.valleys(runs)
    drawn = [save(_unit(valley_figure(valleys), runs), directory / "figures" / "valley.png")]
    if frames.optima(valleys).optimum.notna().any():
        drawn.append(save(drift_figure(valleys), directory / "figures" / "drift.png"))
    return drawn


def _unit(figure: Figure, runs: pd.DataFrame) -> Figure:
    """Take the unit from the axes where losses have one of their user's."""
    for axes in figure.axes if _is_own(runs) else []:
        if axes.get_ylabel() == plots.HELDOUT_LABEL:
            axes.set_ylabel(plots.HELDOUT_LABEL.partition(" (")[0])
    return figure


def _is_own(runs: pd.DataFrame) -> bool:
    """Whether they are of a user's own model, whose tokens nobody counts."""
    return bool(runs.tokens.isna().all())


def _legend(figure: Figure, entries: dict[str, Artist], **place: Any) -> None:
    """A legend outside all panels, below them unless `place` says otherwise."""
    if entries:
        style: dict[str, Any] = {"loc": "outside lower center", "ncols": plots.LEGEND_COLUMNS, "frameon": False} | place
        figure.legend(list(entries.values()), list(entries), **style)


def _labelled(panels: Iterable[Axes]) -> dict[str, Artist]:
    """Label → artist of everything in the panels that has a label, the first of each."""
    found: dict[str, Artist] = {}
    for axes in panels:
        for artist, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, artist)
    return found


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")
