"""Plots draw what the frames hold; figures are files that can be drawn again to the same bytes."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from mutune.errors import Refusal
from mutune.reporting import figures, frames, plots
from tests.reporting.runs import cut, diverge, write_run, write_search, write_space, write_valleys

KNOWN = {"mup": {32: -7.0, 64: -7.0, 128: -6.75}, "sp": {32: -6.0, 64: -7.0, 128: -11.0}}


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


@pytest.fixture(autouse=True)
def _style_is_left_alone() -> Iterator[None]:
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def _labelled(axes: Axes) -> list[str]:
    return [str(line.get_label()) for line in axes.get_lines() if not str(line.get_label()).startswith("_")]


def _x(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def _y(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def test_a_history_has_units_and_the_best_so_far(tmp_path: Path, axes: Axes) -> None:
    history = frames.history(frames.load_runs(write_search(tmp_path)))
    plots.plot_history(history, axes)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("trial", "held-out loss (nats per token)")
    assert _labelled(axes) == ["trial", "best so far"]
    assert _y(axes.get_lines()[1]) == history.best.tolist()


@pytest.mark.parametrize(("name", "log", "scale"), [("learning_rate", True, "log"), ("init_std", False, "linear")])
def test_a_slice_has_the_scale_of_its_search(tmp_path: Path, axes: Axes, name: str, log: bool, scale: str) -> None:
    runs = frames.load_runs(write_search(tmp_path))
    points = plots.plot_slice(runs, name, axes, log=log)
    assert axes.get_xscale() == scale
    assert len(np.asarray(points.get_offsets())) == len(runs)
    assert axes.get_xlabel() == name.replace("_", " ")
    ring = axes.get_lines()[0]
    assert (_x(ring)[0], _y(ring)[0]) == (runs[name].iloc[3], 4.2)


def test_valleys_are_a_line_per_width_with_a_star_at_each_fitted_optimum(tmp_path: Path, axes: Axes) -> None:
    valleys = frames.valleys(frames.load_runs(write_valleys(tmp_path, {"mup": KNOWN["mup"]}, seeds=(0, 1))))
    optima = frames.optima(valleys)
    plots.plot_valleys(valleys, optima, axes)
    assert _labelled(axes) == ["width 32", "fitted optimum", "width 64", "width 128"]
    stars = [line for line in axes.get_lines() if line.get_marker() == "*" and len(_x(line))]
    assert [_x(star)[0] for star in stars] == pytest.approx(optima.learning_rate.tolist())
    assert [_y(star)[0] for star in stars] == pytest.approx(optima.loss.tolist())
    assert "learning rate" in axes.get_xlabel()
    assert "nats per token" in axes.get_ylabel()


def test_ticks_of_the_learning_rate_are_written_as_powers_of_two(tmp_path: Path, axes: Axes) -> None:
    valleys = frames.valleys(frames.load_runs(write_valleys(tmp_path, {"mup": KNOWN["mup"]})))
    plots.plot_valleys(valleys, frames.optima(valleys), axes)
    axes.figure.canvas.draw()
    assert [label.get_text() for label in axes.get_xticklabels()] == [f"$2^{{{k}}}$" for k in range(-9, -4)]


def test_a_diverged_run_is_marked_and_does_not_squash_the_valleys(tmp_path: Path, axes: Axes) -> None:
    write_valleys(tmp_path, {"sp": KNOWN["sp"]})
    diverge(tmp_path / "trials" / "14", 7.0, 60.0)
    valleys = frames.valleys(frames.load_runs(tmp_path))
    plots.plot_valleys(valleys, frames.optima(valleys), axes)
    assert axes.get_ylim()[1] < 10.0
    assert "diverged" in _labelled(axes)
    assert "optimum at the edge or beyond" in _labelled(axes)


def test_drift_is_in_octaves_from_the_base_width(tmp_path: Path, axes: Axes) -> None:
    valleys = frames.valleys(frames.load_runs(write_valleys(tmp_path, KNOWN, seeds=(0, 1))))
    plots.plot_drift(frames.offsets(frames.optima(valleys)), axes)
    assert axes.get_ylabel() == "optimum relative to width 32\n(octaves of learning rate)"
    assert _labelled(axes) == ["μP", "SP", "90 % interval", "optimum at the edge or beyond"]
    lines = {str(line.get_label()): _y(line) for line in axes.get_lines()}
    assert lines["μP"] == pytest.approx([0.0, 0.0, 0.25], abs=0.05)
    assert lines["SP"] == pytest.approx([0.0, -1.0, -3.0], abs=0.05)


def test_loss_curves_are_a_line_per_run_and_say_how_they_were_smoothed(tmp_path: Path, axes: Axes) -> None:
    for width in (32, 64):
        for seed in (0, 1):
            write_run(tmp_path / f"{width}-{seed}", width=width, seed=seed)
    curves = frames.curves(frames.load_records(tmp_path), frames.load_runs(tmp_path), window=4)
    plots.plot_loss_curves(curves, axes)
    assert sum(len(_x(line)) > 1 for line in axes.get_lines()) == 4
    assert _labelled(axes) == ["width 32", "width 64", "held-out loss"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("tokens", "training loss, mean of 4 steps\n(nats per token)")


def test_a_search_has_a_history_and_slices(tmp_path: Path) -> None:
    drawn = figures.draw_study(write_search(tmp_path / "proxy"))
    assert [path.name for path in drawn] == ["history.png", "slices.png"]
    assert [path.parent for path in drawn] == [tmp_path / "proxy" / "figures"] * 2


def test_a_grid_over_width_and_learning_rate_has_valleys_of_the_readmes_size(tmp_path: Path) -> None:
    drawn = figures.draw_study(write_valleys(tmp_path / "valley", KNOWN))
    assert [path.name for path in drawn] == ["valley.png", "drift.png"]
    assert imread(drawn[0]).shape[1] == 1660


def test_a_search_over_listed_widths_and_rates_that_is_no_grid_has_a_history(tmp_path: Path) -> None:
    values: dict[str, Any] = {"width": {"values": [32, 64]}, "table": {"values": ["mup", "sp"]}}
    for number in range(4):  # the first two are the same point, as a random search may propose
        note = {"study": "mine", "trial": number}
        width, table = (64 if number == 2 else 32), ("sp" if number == 3 else "mup")
        write_run(tmp_path / "trials" / str(number), width=width, table=table, note=note, learning_rate=0.01)
    write_space(tmp_path, values | {"learning_rate": {"values": [0.01, 0.02]}}, sampler="random")
    assert [path.name for path in figures.draw_study(tmp_path)] == ["history.png", "slices.png"]


def test_the_valley_says_how_far_the_optimum_moves(tmp_path: Path) -> None:
    valleys = frames.valleys(frames.load_runs(write_valleys(tmp_path, KNOWN)))
    left, right = figures.valley_figure(valleys).axes
    assert left.get_title(loc="left") == "μP: 0.2 octaves"
    assert right.get_title(loc="left") == "SP: 3.0 octaves or more"
    assert left.get_ylim() == right.get_ylim()


def test_a_grid_that_cannot_be_fitted_is_still_drawn(tmp_path: Path) -> None:
    write_valleys(tmp_path, {"mup": {32: -8.0}}, exponents=(-9, -8))
    assert [path.name for path in figures.draw_study(tmp_path)] == ["valley.png"]


def test_a_certificate_shows_every_axis_of_its_ladder_and_the_target(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"certificate.json cannot be read"):
        figures.draw_certificate(tmp_path)
    place = {"width": 32, "depth": None, "tokens": 4096, "batch": None, "edge": None, "interval_log2": [-7.2, -6.8]}
    base = place | {"optimum_log2": -7.0, "octaves_from_base": 0.0}
    wide = place | {"width": 64, "optimum_log2": -6.5, "octaves_from_base": 0.5, "edge": "high"}
    longer = place | {"tokens": 8192, "optimum_log2": -7.5, "octaves_from_base": -0.5}
    data: dict[str, Any] = {"rungs": [base, wide, longer], "learning_rate": 2.0**-7}
    data["drift"] = {"distance": -0.25, "interval": [-1.0, 0.5]}
    (tmp_path / "certificate.json").write_text(json.dumps(data))
    width, tokens, target = figures.certificate_figure(*frames.certified(tmp_path)).axes
    assert (width.get_xlabel(), tokens.get_xlabel(), target.get_xlabel()) == ("width", "tokens", "target")
    assert np.asarray(tokens.get_lines()[1].get_ydata()).tolist() == [-7.0, -7.5]
    assert np.asarray(target.get_lines()[1].get_ydata()).tolist() == [-7.25]
    assert "optimum at the edge or beyond" in [line.get_label() for line in width.get_lines()]
    assert width.get_ylim()[0] < -8
    assert [path.name for path in figures.draw_certificate(tmp_path)] == ["optima.png"]
    for damage in ({"rungs": [{"width": 1}]}, {"rungs": [wide]}, {"drift": {"distance": 0.0, "interval": []}}):
        (tmp_path / "certificate.json").write_text(json.dumps(data | damage))
        with pytest.raises(Refusal, match=r"certificate.json cannot be read"):
            figures.draw_certificate(tmp_path)
    (tmp_path / "certificate.json").write_text(json.dumps(data | {"drift": None}))
    assert len(figures.certificate_figure(*frames.certified(tmp_path)).axes) == 2


def test_a_transfer_has_the_valleys_and_the_drift_of_its_ladder(tmp_path: Path) -> None:
    write_valleys(tmp_path, {"mup": KNOWN["mup"]}, seeds=(0, 1), folder="ladder")
    assert [path.name for path in figures.draw_transfer(tmp_path)] == ["valley.png", "drift.png"]
    drawn = (tmp_path / "figures" / "valley.png").read_bytes()
    write_run(tmp_path / "ladder" / "deeper", loss=1.0, note={"rung": "w32d8"}, learning_rate=2.0**-7)
    figures.draw_transfer(tmp_path)
    assert (tmp_path / "figures" / "valley.png").read_bytes() == drawn  # a rung of another axis is no valley of widths


def test_a_training_run_is_drawn_while_it_runs_with_its_context_switch(tmp_path: Path) -> None:
    cut(write_run(tmp_path / "small", contexts=(128, 512)), 30, torn='{"step"')
    assert [path.name for path in figures.draw_train(tmp_path / "small")] == ["loss.png"]
    curves = frames.curves(frames.load_records(tmp_path), frames.load_runs(tmp_path))
    above, below = figures.train_figure(curves).axes
    assert [text.get_text().strip() for text in above.texts] == ["context 128 → 512"]
    assert re.search("learning rate", below.get_ylabel())


def test_the_band_of_a_running_run_reaches_to_its_end_and_its_loss_is_smoothed_alike(tmp_path: Path) -> None:
    folder = cut(write_run(tmp_path / "small", contexts=(128, 128)), 20)
    figures.draw_train(folder)
    plain = (folder / "figures" / "loss.png").read_bytes()
    rows = [[0.25, 6.2, 6.3, 6.4], [1.0, 5.6, 5.7, 5.8]]
    (folder / "prediction.json").write_text(json.dumps({"prediction": {"band": rows}}))
    figures.draw_train(folder)
    assert (folder / "figures" / "loss.png").read_bytes() != plain
    band = frames.band(folder)
    curves = frames.curves(frames.load_records(folder), frames.load_runs(folder), int(band.window.iloc[0]))
    expected = figures.save(figures.train_figure(curves, band), tmp_path / "expected.png")
    assert (folder / "figures" / "loss.png").read_bytes() == expected.read_bytes()
    above = figures.train_figure(curves, band).axes[0]
    (filled,) = above.collections
    assert filled.get_paths()[0].get_extents().extents == pytest.approx((10 * 512, 5.6, 40 * 512, 6.4))
    names = above.get_legend_handles_labels()[1]
    assert names == ["foretold band", "outside it", "training loss, mean of 2 steps", "held-out loss"]


def _search(folder: Path) -> Figure:
    write_search(folder, losses=(5.0, 4.5, 4.8, 4.2, 6.5))
    diverge(folder / "trials" / "0", 7.0, 60.0)
    return figures.history_figure(frames.load_runs(folder))


def _slices(folder: Path) -> Figure:
    _search(folder)
    return figures.slices_figure(frames.load_runs(folder), frames.load_space(folder))


def _valleys(folder: Path) -> Figure:
    write_valleys(folder, KNOWN, seeds=(0, 1))
    diverge(folder / "trials" / "14", 7.0, 60.0)
    valleys = frames.valleys(frames.load_runs(folder))
    return figures.valley_figure(valleys)


def _drift(folder: Path) -> Figure:
    write_valleys(folder, KNOWN, seeds=(0, 1))
    return figures.drift_figure(frames.valleys(frames.load_runs(folder)))


def _loss(folder: Path) -> Figure:
    write_run(folder, contexts=(128, 512))
    return figures.train_figure(frames.curves(frames.load_records(folder), frames.load_runs(folder)))


def _check(folder: Path) -> Figure:
    rows = [
        {"quantity": quantity, "place": place, "step": 0, "size": float(size), "slope": slope, "low": -0.2, "high": 0.2}
        | {"passed": abs(slope) < 0.2, "ratio": (size / 64) ** slope}
        for quantity in frames.CHECKED
        for place, slope in (("logits", 0.0), ("h.*", 0.5))
        for size in (64, 128, 256)
    ]
    return figures.check_figure(pd.DataFrame(rows), "width")


@pytest.mark.parametrize("make", [_search, _slices, _valleys, _drift, _loss, _check])
def test_a_legend_covers_nothing_and_nothing_is_cut_off(tmp_path: Path, make: Callable[[Path], Figure]) -> None:
    figure = make(tmp_path / "run")
    FigureCanvasAgg(figure).draw()
    legends = [legend for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes)) if legend]
    assert legends
    boxes = [legend.get_window_extent() for legend in legends]
    for axes in figure.axes:
        taken = [axes.patch.get_window_extent()]
        taken += [extent for axis in (axes.xaxis, axes.yaxis) if (extent := axis.get_tightbbox())]
        for box in boxes:
            assert not any(box.overlaps(other) for other in taken)
        for box in (*boxes, *taken):
            assert figure.bbox.padded(1).contains(box.x0, box.y0)
            assert figure.bbox.padded(1).contains(box.x1, box.y1)
    assert not any(box.overlaps(other) for i, box in enumerate(boxes) for other in boxes[:i])


def test_drawing_again_gives_the_same_bytes_and_leaves_nothing_else(tmp_path: Path) -> None:
    study = write_search(tmp_path)
    first = {path.name: path.read_bytes() for path in figures.draw_study(study)}
    again = {path.name: path.read_bytes() for path in figures.draw_study(study)}
    assert first == again
    assert sorted(path.name for path in (study / "figures").iterdir()) == sorted(first)


def test_a_study_in_which_everything_diverged_is_drawn(tmp_path: Path) -> None:
    study = write_search(tmp_path, losses=(5.0, 5.0))
    for trial in ("0", "1"):
        diverge(study / "trials" / trial, 7.0, math.nan)
    assert len(figures.draw_study(study)) == 2


def test_a_missing_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="make them with: python -m mutune"):
        figures.draw_study(tmp_path / "sweeps" / "proxy")
