"""Numbers of the frames, on run folders whose losses are known."""

import itertools
import json
import math
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.anyone import Asked, from_runs
from mutune.certificate.table import to_tables
from mutune.errors import Refusal
from mutune.reporting import frames
from tests.reporting.runs import NUM_STEPS, VOCAB_SIZE, cut, diverge, write_run, write_search, write_valleys


def test_one_row_per_run_says_what_the_run_was_and_how_it_ended(tmp_path: Path) -> None:
    note = {"study": "proxy", "trial": 3}
    write_run(tmp_path / "trials" / "3", loss=4.25, width=64, table="sp", seed=1, note=note, learning_rate=0.5)
    row = frames.load_runs(tmp_path).iloc[0]
    expected = {
        "run": "trials/3", "study": "proxy", "trial": 3, "width": 64, "depth": 4, "table": "sp", "seed": 1,
        "learning_rate": 0.5, "init_std": 0.08, "heldout_loss": 4.25, "heldout_bits_per_byte": 2.125, "value": 4.25,
        "diverged": False, "finished": True, "steps": NUM_STEPS, "tokens": NUM_STEPS * 512, "seconds": 10.0,
    }  # fmt: skip
    assert {key: row[key] for key in expected} == expected
    assert math.isnan(row.adam_eps)


def test_runs_come_in_the_order_of_their_trials(tmp_path: Path) -> None:
    write_search(tmp_path, losses=(5.0,) * 12)
    assert frames.load_runs(tmp_path).trial.tolist() == list(range(12))


def test_a_torn_last_line_loses_only_its_own_step(tmp_path: Path) -> None:
    cut(write_run(tmp_path / "a"), 7, torn='{"step": 8, "tokens": 40')
    assert frames.load_records(tmp_path).step.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_an_unfinished_run_is_kept_and_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "whole")
    cut(write_run(tmp_path / "half"), 10)
    cut(write_run(tmp_path / "started"), 0)
    runs = frames.load_runs(tmp_path).set_index("run")
    assert runs.finished.to_dict() == {"half": False, "started": False, "whole": True}
    assert runs.steps.to_dict() == {"half": 10, "started": 0, "whole": NUM_STEPS}
    assert not runs.diverged.any()
    assert runs.value.isna().to_dict() == {"half": True, "started": True, "whole": False}


@pytest.mark.parametrize(
    ("losses", "told"),
    [((7.0, 9.5, math.nan), 9.5), ((6.0, 6.5, math.inf), math.log(VOCAB_SIZE)), ((7.0, 7.1, 15.0), 15.0)],
)
def test_a_diverged_run_counts_with_what_the_search_was_told(
    tmp_path: Path, losses: tuple[float, ...], told: float
) -> None:
    diverge(write_run(tmp_path / "a"), *losses)
    row = frames.load_runs(tmp_path).iloc[0]
    assert (row.diverged, row.finished, row.steps) == (True, False, len(losses) - 1)
    assert row.value == told
    assert math.isnan(row.heldout_loss)


def test_records_hold_one_row_per_step_named_by_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    records = frames.load_records(tmp_path)
    assert records.groupby("run").size().to_dict() == {"a": NUM_STEPS, "b": NUM_STEPS}
    assert records.heldout_loss.notna().sum() == 2


def test_a_step_that_was_repeated_after_a_resume_counts_once_with_its_later_record(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    again = json.loads(path.read_text().splitlines()[4]) | {"loss": 1.5}
    path.write_text(path.read_text() + json.dumps(again) + "\n")
    records = frames.load_records(tmp_path)
    assert len(records) == NUM_STEPS
    assert records[records.step == 5].loss.tolist() == [1.5]


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("runs/sweeps/valley", r"python -m mutune\.sweep \+sweep=valley$"),
        ("runs/sweeps/mine", r"python -m mutune\.sweep \+sweep=proxy$"),
        ("runs/transfer/a--b/ladder", r"python -m mutune\.transfer study=a target=b$"),
        ("runs/train/small", r"python -m mutune\.train transfer=\S+$"),
    ],
)
def test_a_missing_folder_is_refused_with_the_command_that_makes_it(tmp_path: Path, folder: str, command: str) -> None:
    for load in (frames.load_runs, frames.load_records, frames.load_space):
        with pytest.raises(Refusal, match=command):
            load(tmp_path / folder)
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(Refusal, match=command):
        frames.load_runs(tmp_path / folder)


DAMAGE: list[tuple[str, bytes]] = [
    ("config.yaml", b"vocab_size: 5\n"),
    ("config.yaml", b"run: 3\n"),
    ("config.yaml", b"\xff\xfe"),
    ("metrics.jsonl", b'{"step": 20}\n'),
]


@pytest.mark.parametrize(("file", "content"), DAMAGE)
def test_a_damaged_run_is_left_out_with_a_note_and_the_others_are_shown(
    file: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a")
    (write_run(tmp_path / "b") / file).write_bytes(content)
    assert frames.load_runs(tmp_path).run.tolist() == ["a"]
    note = capsys.readouterr().err
    assert note.startswith("left out   the ")
    assert str(tmp_path / "b") in note
    (tmp_path / "a" / "metrics.jsonl").unlink()
    with pytest.raises(Refusal, match="there are no runs in"):
        frames.load_runs(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"[]\n", b"null\n", b"3\n"])
def test_a_line_that_is_no_record_is_passed_over(content: bytes, tmp_path: Path) -> None:
    path = write_run(tmp_path / "a") / "metrics.jsonl"
    whole = frames.load_records(tmp_path)
    path.write_bytes(content + path.read_bytes())
    assert frames.load_runs(tmp_path).finished.tolist() == [True]
    pd.testing.assert_frame_equal(frames.load_records(tmp_path), whole)


@pytest.mark.parametrize("text", ["inputs: null", "inputs: {config: 3}", "inputs: {config: {search: {space: 3}}}"])
def test_a_damaged_config_of_a_study_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(Refusal, match=r"config\.yaml is damaged"):
        frames.load_space(tmp_path)


def test_history_keeps_the_best_so_far_and_no_diverged_run_wins(tmp_path: Path) -> None:
    write_search(tmp_path, losses=(5.0, 4.0, 4.5, 3.0, 3.5))
    diverge(tmp_path / "trials" / "0", 7.0, 20.0)
    diverge(tmp_path / "trials" / "3", 1.0, math.nan)
    history = frames.history(frames.load_runs(tmp_path))
    assert history.value.tolist() == [20.0, 4.0, 4.5, math.log(VOCAB_SIZE), 3.5]
    assert history.best.iloc[1:].tolist() == [4.0, 4.0, 4.0, 3.5]
    assert math.isnan(history.best.iloc[0])


def test_the_best_trials_show_what_was_searched(tmp_path: Path) -> None:
    best = frames.best_trials(frames.load_runs(write_search(tmp_path)), count=2)
    assert best.columns.tolist() == ["trial", "heldout_loss", "heldout_bits_per_byte", "learning_rate", "init_std"]
    assert best.trial.tolist() == [3, 1]


def test_the_space_knows_which_axes_are_logarithmic(tmp_path: Path) -> None:
    assert frames.load_space(write_search(tmp_path)) == {"learning_rate": True, "init_std": False}
    grid = write_valleys(tmp_path / "grid", {"mup": {32: -7.0, 128: -7.0}, "sp": {32: -7.0, 128: -7.0}})
    assert frames.load_space(grid) == {"width": True, "table": False, "seed": False, "learning_rate": True}


def read(folder: Path) -> pd.DataFrame:
    return frames.valleys(frames.load_runs(folder))


def test_optima_are_the_bottoms_of_the_parabolas_that_were_written(tmp_path: Path) -> None:
    known = {"mup": {32: -7.25, 64: -7.0, 128: -6.875}, "sp": {32: -6.5, 64: -7.5, 128: -7.75}}
    optima = frames.optima(read(write_valleys(tmp_path, known, seeds=(0, 1))))
    assert len(optima) == 6
    assert optima.edge.isna().all()
    assert optima.num_seeds.tolist() == [2] * 6
    for row in optima.to_dict("records"):
        truth = known[row["table"]][row["width"]]
        assert row["optimum"] == pytest.approx(truth, abs=0.05)
        assert row["low"] < truth < row["high"]
        assert row["loss"] == pytest.approx(4.005 + 1.0 / row["width"], abs=0.01)
        assert row["learning_rate"] == pytest.approx(2.0 ** row["optimum"])


def test_optima_are_those_of_a_certificate_of_the_same_runs(tmp_path: Path) -> None:
    valleys = read(write_valleys(tmp_path, {"mup": {32: -7.25, 64: -7.0, 128: -6.875}}, seeds=(0, 1)))
    data = from_runs(to_tables(valleys.drop(columns="table"), "runs=x"), Asked(), "x")
    optima = frames.optima(valleys)
    assert optima.optimum.tolist() == pytest.approx([rung["optimum_log2"] for rung in data["rungs"]])
    assert optima[["low", "high"]].to_numpy() == pytest.approx(np.array([r["interval_log2"] for r in data["rungs"]]))
    slope = data["drift"]["octaves_per_doubling"]["width"]
    assert frames.drift(valleys).octaves_per_doubling[0] == pytest.approx(slope["median"], abs=0.02)


def test_drift_is_the_slope_that_was_written(tmp_path: Path) -> None:
    known = {"mup": {32: -7.0, 64: -7.0, 128: -7.0}, "sp": {32: -6.0, 64: -7.0, 128: -8.0}}
    drift = frames.drift(read(write_valleys(tmp_path, known, seeds=(0, 1)))).set_index("table")
    assert drift.octaves_per_doubling.to_dict() == pytest.approx({"mup": 0.0, "sp": -1.0}, abs=0.1)
    assert (drift.low < drift.octaves_per_doubling).all()
    assert (drift.octaves_per_doubling < drift.high).all()
    assert drift.total.to_dict() == pytest.approx({"mup": 0.0, "sp": -2.0}, abs=0.1)
    assert drift.range.to_dict() == pytest.approx({"mup": 0.0, "sp": 2.0}, abs=0.1)
    assert drift.num_seeds.tolist() == [2, 2]
    assert not drift.edge.any()


def test_an_optimum_at_the_edge_gives_a_lower_bound_and_no_slope(tmp_path: Path) -> None:
    valleys = read(write_valleys(tmp_path, {"sp": {32: -6.0, 64: -8.0, 128: -11.0}}))  # the rates end at 2^-9
    assert frames.optima(valleys).edge.dropna().tolist() == ["low"]
    assert frames.optima(valleys).optimum.iloc[-1] == -9.0
    drift = frames.drift(valleys).iloc[0]
    assert drift.edge
    assert drift.range == pytest.approx(3.0, abs=0.1)
    assert math.isnan(drift.octaves_per_doubling)


def test_two_rates_make_no_optimum(tmp_path: Path) -> None:
    valleys = read(write_valleys(tmp_path, {"mup": {32: -8.0, 64: -8.0}}, exponents=(-9, -8)))
    optima = frames.optima(valleys)
    assert optima.optimum.isna().all()
    assert optima.num_rates.tolist() == [2, 2]
    assert frames.drift(valleys).range.isna().all()
    assert frames.offsets(optima).empty


def test_valleys_leave_out_unfinished_runs_and_mark_diverged_ones(tmp_path: Path) -> None:
    write_valleys(tmp_path, {"mup": {32: -7.0}})
    cut(tmp_path / "trials" / "0", 3)
    diverge(tmp_path / "trials" / "4", 7.0, 16.0)
    valleys = frames.valleys(frames.load_runs(tmp_path))
    assert valleys.log2_lr.tolist() == [-8.0, -7.0, -6.0, -5.0]
    assert valleys.diverged.tolist() == [False, False, False, True]
    assert valleys.loss.iloc[-1] == 16.0


def test_valleys_refuse_runs_that_differ_in_something_else(tmp_path: Path) -> None:
    for trial in (0, 1):
        write_run(tmp_path / str(trial), init_std=0.1 + trial)
    with pytest.raises(Refusal, match="runs 0 and 1 differ in neither table, width, seed nor learning rate"):
        frames.valleys(frames.load_runs(tmp_path))


def test_offsets_are_counted_from_the_narrowest_width(tmp_path: Path) -> None:
    valleys = frames.valleys(frames.load_runs(write_valleys(tmp_path, {"mup": {32: -7.0, 64: -6.75, 128: -6.5}})))
    offsets = frames.offsets(frames.optima(valleys))
    assert offsets.octaves.tolist() == pytest.approx([0.0, 0.25, 0.5], abs=0.05)
    assert offsets.base_width.tolist() == [32, 32, 32]


def test_the_window_is_not_squashed_by_a_diverged_or_hopeless_run() -> None:
    losses = pd.Series([4.0, 4.1, 4.2, 4.3, 9.0, 15.0])
    low, high = frames.loss_window(losses, pd.Series([False] * 5 + [True]))
    assert low < 4.0
    assert 4.3 < high < 5.0


def test_the_window_shows_diverged_runs_where_there_is_nothing_else() -> None:
    low, high = frames.loss_window(pd.Series([8.0, 9.0]), pd.Series([True, True]))
    assert low < 8.0 < 9.0 < high


def test_smoothing_is_a_trailing_mean_within_each_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=4.0)
    write_run(tmp_path / "b", loss=1.0)
    curves = frames.curves(frames.load_records(tmp_path), frames.load_runs(tmp_path), window=2)
    for _, run in curves.groupby("run"):
        loss = run.loss.tolist()
        assert run.smooth_loss.tolist() == pytest.approx([loss[0], *((a + b) / 2 for a, b in itertools.pairwise(loss))])


def test_a_context_switch_is_found_where_it_was_made(tmp_path: Path) -> None:
    write_run(tmp_path / "a", contexts=(128, 512))
    switches = frames.context_switches(frames.load_records(tmp_path))
    assert switches.to_dict("records") == [{"tokens": NUM_STEPS * 512, "before": 128, "after": 512}]


def foretold(directory: Path, rows: list[list[float]] | None) -> Path:
    """Leave a band of a run's training loss beside it, as the command does."""
    (directory / "prediction.json").write_text(json.dumps({"prediction": {"loss": 4.0, "band": rows}}))
    return directory


def test_a_band_stands_at_the_tokens_of_its_fractions_and_says_its_window(tmp_path: Path) -> None:
    write_run(tmp_path / "a", contexts=(128, 512))
    band = frames.band(foretold(tmp_path / "a", [[0.25, 5.0, 6.0, 7.0], [0.75, 4.0, 5.0, 6.0]]))
    half = NUM_STEPS // 2
    assert band.tokens.tolist() == [half * 512, NUM_STEPS * 512 + half * 2048]
    assert band[["low", "median", "high"]].to_numpy().tolist() == [[5.0, 6.0, 7.0], [4.0, 5.0, 6.0]]
    assert set(band.window) == {2}  # a twentieth of 40 steps


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"prediction": null}', '{"prediction": {"band": null}}'])
def test_where_nothing_was_foretold_there_is_no_band(tmp_path: Path, content: str | None) -> None:
    write_run(tmp_path / "a")
    if content is not None:
        (tmp_path / "a" / "prediction.json").write_text(content)
    assert frames.band(tmp_path / "a").empty


def test_what_lies_outside_is_marked_and_before_the_band_nothing_does(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=4.0)  # from 7 - 0.15 at step 1 to 4, in even steps
    band = frames.band(foretold(tmp_path / "a", [[0.5, 5.3, 5.5, 5.7], [1.0, 4.5, 4.6, 4.7]]))
    curves = frames.curves(frames.load_records(tmp_path / "a"), frames.load_runs(tmp_path / "a"), window=1)
    marked = frames.outside(curves, band)
    low = np.interp(marked.step, [10, 20], [5.3, 4.5])
    expected = (marked.step >= 10) & (marked.loss < low)
    assert expected.any()
    assert (~expected[marked.step >= 10]).any()
    assert (marked.smooth_loss.notna() == expected).all()


def test_fifty_runs_load_in_under_two_seconds(tmp_path: Path) -> None:
    line = (write_run(tmp_path / "0") / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    for number in range(1, 50):
        write_run(tmp_path / str(number))
    for number in range(50):
        (tmp_path / str(number) / "metrics.jsonl").write_text(line * 240)
    started = time.process_time()
    assert len(frames.load_runs(tmp_path)) == 50
    assert time.process_time() - started < 2.0
