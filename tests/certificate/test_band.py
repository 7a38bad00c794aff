"""The target's training loss along its run: bands that hold runs, broken runs that leave them, and none from nothing.

The real runs are stored step by step (`store_losses`); widths that a ladder does not hold are foretold from it.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest

from mutune.certificate.band import LEVEL, Curves, band_at, foretell, with_band
from mutune.certificate.config import Prediction
from mutune.certificate.ladder import LadderRun
from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.training.config import StageConfig
from mutune.training.result import METRICS, smoothing
from tests import soak
from tests.certificate.store_losses import BROKEN, FAULTS, FILE, NUM_STEPS, SEEDS, WIDTHS, store, wanted

WARMUP = 12
LADDERS = [  # rungs → a width that is none of them
    (WIDTHS[:-1], 128),
    (WIDTHS[1:], 256),
    (WIDTHS, 256),
    *((tuple(w for w in WIDTHS if w != left_out), left_out) for left_out in WIDTHS[1:-1]),
]
LATE = 400  # steps of made-up runs


@cache
def stored() -> tuple[pd.DataFrame, np.ndarray]:
    """The runs and, of those that did not stop early, the losses (runs, steps); missing after a stop."""
    frame = pd.read_csv(FILE)
    losses = np.full((len(frame), NUM_STEPS), np.nan)
    for i, words in enumerate(frame.losses):
        found = [int(word) / 1000 for word in words.split()]
        losses[i, : len(found)] = found
    return frame.drop(columns="losses"), losses


def runs(**wanted: Any) -> Curves:
    """The stored runs with these columns, each one value or several."""
    frame, losses = stored()
    mine = np.logical_and.reduce([frame[key].isin(np.atleast_1d(value)) for key, value in wanted.items()])
    widths, octaves, seeds = (frame[key].to_numpy(float)[mine] for key in ("width", "offset", "seed"))
    return Curves(widths, octaves, seeds, losses[mine], WARMUP)


def clean(widths: tuple[int, ...], seeds: tuple[int, ...]) -> Curves:
    return runs(rule="mup", width=widths, offset=0.0, seed=seeds)


def departures(band: list[list[float]], losses: np.ndarray) -> np.ndarray:
    """(runs, steps) whether the smoothed loss is outside, of the steps that the band speaks of; a stopped run is."""
    at = band_at(Prediction(loss=1.0, band=band), losses.shape[1])
    window = smoothing(losses.shape[1])
    columns = []
    for step in range(1, losses.shape[1] + 1):
        if (ends := at(step)) is not None:
            mean = losses[:, step - window : step].mean(axis=1)
            columns.append(~((ends[0] <= mean) & (mean <= ends[1])))
    return np.array(columns).T


class Held(NamedTuple):
    """A band of a ladder of two seeds, and where runs of the width that it does not hold depart from it.

    Attributes:
        out: by other seeds. own: by the ladder's.
    """

    band: list[list[float]]
    out: np.ndarray
    own: np.ndarray


def outcomes(rungs: tuple[int, ...], size: int, pairs: Sequence[tuple[int, ...]], level: float) -> list[Held]:
    """What ladders of these pairs of seeds say of the left-out width, and what became of it."""
    found = []
    for pair in pairs:
        band = foretell(clean(rungs, pair), size, level)
        assert len(band) == 20
        parts = [tuple(seed for seed in range(SEEDS) if (seed in pair) == same) for same in (False, True)]
        found.append(Held(band, *(departures(band, clean((size,), seeds).losses) for seeds in parts)))
    return [held for held in found if len(held.out)]


def without_repeats(rungs: tuple[int, ...]) -> Curves:
    """A ladder as it is by design: three rates by one seed, and a second seed at another than the transferred one."""
    mine = runs(rule="mup", width=rungs, offset=(-1.0, 0.0, 1.0), seed=(0, 1))
    rows = (mine.seeds == 0) | (mine.octaves == -1.0)
    parts = {key: getattr(mine, key)[rows] for key in ("widths", "octaves", "seeds", "losses")}
    return replace(mine, **parts)


def lasting(out: np.ndarray) -> np.ndarray:
    """(runs,) whether a run is outside for a whole window of smoothing on end."""
    window = smoothing(NUM_STEPS)
    windows = np.lib.stride_tricks.sliding_window_view(out, window, axis=1)
    return np.any(np.all(windows, axis=2), axis=1)


def share(parts: Sequence[Any]) -> str:
    return f"{np.concatenate([np.asarray(part).ravel() for part in parts]).mean():.1%}"


def half_width(row: list[float]) -> float:
    """In % of the loss."""
    return 50 * (row[3] - row[1]) / row[2]


@pytest.mark.parametrize(("rungs", "size"), [LADDERS[0], LADDERS[2]])
def test_nearly_all_of_a_wider_run_lies_in_its_band(rungs: tuple[int, ...], size: int) -> None:
    found = outcomes(rungs, size, [(2, 3), (4, 5)], LEVEL)
    assert fmean(held.out.mean() for held in found) < 0.04  # of the steps; the soak counts all pairs of seeds
    assert fmean(lasting(held.out).mean() for held in found) <= 0.25  # of four; 1.5 % of all in the soak


def test_so_it_does_where_no_seed_is_repeated_at_the_transferred_rate() -> None:
    out = departures(foretell(without_repeats(WIDTHS[:-1]), 128), clean((128,), tuple(range(2, SEEDS))).losses)
    assert out.mean() < 0.04


def test_a_rate_eight_times_too_high_leaves_the_band_as_soon_as_there_is_one() -> None:
    band = foretell(clean(WIDTHS[:-1], (0, 1)), WIDTHS[-1])
    assert band[0][0] == pytest.approx(0.1)
    for fault in ("rate × 8", "rate / 8"):
        rule, offset = FAULTS[fault]
        broken = runs(rule=rule, width=WIDTHS[-1], offset=offset, seed=BROKEN)
        assert departures(band, broken.losses)[:, 0].all()


def made_up(seed: int, *, noise: float, shift: float, rates: bool = False) -> tuple[Curves, np.ndarray]:
    """A ladder of two seeds whose losses follow a power law of width and step, and a run of twice its widest rung.

    Args:
        noise: of one run, of all its steps together. shift: of a seed, of all widths together, anew at every tenth.
        rates: runs an octave to either side, and at the rate itself only one.
    """
    rng, steps = np.random.default_rng(seed), np.arange(1, LATE + 1)
    moves = shift * rng.standard_normal((3, 10)).repeat(LATE // 10, axis=1)

    def losses(width: float, octaves: float, s: int) -> np.ndarray:
        law = 2.0 + 1.5 * (width / 32) ** -0.4 + 3.0 * steps**-0.3 + 0.03 * octaves**2
        return law + noise * rng.standard_normal() + moves[s] + 0.05 * rng.standard_normal(LATE)

    points = [(-1.0, 0), (0.0, 0), (1.0, 0), (-1.0, 1)] if rates else [(0.0, 0), (0.0, 1)]
    rows = [(width, octaves, s) for width in (32, 48, 64, 96, 128) for octaves, s in points]
    widths, octaves, seeds = np.array(rows, float).T
    return Curves(widths, octaves, seeds, np.array([losses(*row) for row in rows]), 20), losses(256, 0.0, 2)


@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize(("noise", "shift"), [(0.01, 0.0), (0.01, 0.06)])
def test_a_smoothed_loss_is_inside_as_often_as_asked(noise: float, shift: float, rates: bool) -> None:
    inside = []
    for seed in range(6):
        ladder, outcome = made_up(seed, noise=noise, shift=shift, rates=rates)
        band = foretell(ladder, 256, 0.9)
        inside.append(1 - departures(band, outcome[None]).mean())
    assert 0.8 <= fmean(inside) <= 1.0


def test_batches_that_move_all_widths_together_widen_the_band() -> None:
    calm, moved = (foretell(made_up(0, noise=0.002, shift=shift)[0], 256) for shift in (0.0, 0.06))
    assert median(map(half_width, moved)) > 2 * median(map(half_width, calm))


def test_a_band_narrows_towards_a_known_law() -> None:
    """Without any noise it is the law's own loss: 2 + 1.5·8^-0.4 + 3·mean(step^-0.3)."""
    steps = np.arange(1, LATE + 1)
    rows = [(width, 0.0, s) for width in (32, 48, 64, 96, 128) for s in (0, 1)]
    widths, octaves, seeds = np.array(rows).T
    losses = 2.0 + 1.5 * (widths[:, None] / 32) ** -0.4 + 3.0 * steps**-0.3
    band, window = foretell(Curves(widths, octaves, seeds, losses, 20), 256), smoothing(LATE)
    for (fraction, low, middle, high), end in ((band[0], 20 + window), (band[-1], LATE)):
        truth = 2.0 + 1.5 * 8**-0.4 + 3.0 * (steps[end - window : end] ** -0.3).mean()
        assert fraction == end / LATE
        assert middle == pytest.approx(truth, abs=0.01)
        assert low < truth < high


def test_losses_at_other_rates_are_carried_to_the_transferred_one() -> None:
    near, _ = made_up(0, noise=0.002, shift=0.0, rates=True)
    tilt = 0.4 * near.octaves * np.log2(near.widths) / 6 + 0.3 * near.octaves**2
    steep = replace(near, losses=near.losses + tilt[:, None])
    for here, there in zip(foretell(steep, 256), foretell(near, 256), strict=True):
        assert here == pytest.approx(there, abs=0.01)


def test_too_few_widths_seeds_or_runs_give_no_band() -> None:
    ladder, _ = made_up(0, noise=0.01, shift=0.0)
    for kept in (ladder.widths < 128, ladder.seeds == 0):
        parts = {key: getattr(ladder, key)[kept] for key in ("widths", "octaves", "seeds", "losses")}
        assert foretell(replace(ladder, **parts), 256) == []
    one_side = replace(ladder, octaves=np.where(ladder.widths == 48, 0.5, ladder.octaves))
    assert foretell(one_side, 256) == []
    around, _ = made_up(0, noise=0.01, shift=0.0, rates=True)
    rows = around.octaves != 0.0  # an octave to either side, which tells no curvature
    parts = {key: getattr(around, key)[rows] for key in ("widths", "octaves", "seeds", "losses")}
    assert foretell(replace(around, **parts), 256) == []


BAND = [[0.1, 5.0, 5.1, 5.2], [0.5, 4.0, 4.1, 4.2], [1.0, 3.0, 3.2, 3.4]]


def test_a_guard_asks_by_the_step_and_between_fractions() -> None:
    at = band_at(Prediction(loss=3.0, band=BAND), 1000)
    assert (at(1), at(99)) == (None, None)
    assert at(100) == (5.0, 5.2)
    assert at(300) == pytest.approx((4.5, 4.7))
    assert at(1000) == (3.0, 3.4)
    assert {band_at(none, 1000)(500) for none in (None, Prediction("too few"), Prediction(loss=3.0))} == {None}


@pytest.mark.parametrize("band", [[], [[0.1, 5.0, 5.1]], [[0.1, 5.0, 4.9, 5.1]], [BAND[1], BAND[0]]])
def test_a_band_that_is_none_is_refused(band: list[list[float]]) -> None:
    with pytest.raises(Refusal, match="band must hold rows of fraction, low, median, high"):
        Prediction(loss=3.0, band=band)


STAGE = StageConfig(num_steps=LATE)
PROXY = replace(SweepConfig().spec(), stages=(STAGE,))


def left(folder: Path, ladder: Curves) -> list[LadderRun]:
    """Folders of a ladder's runs, as its workers leave them."""
    made = []
    for i, losses in enumerate(ladder.losses):
        rate = PROXY.hyperparameters.learning_rate * 2.0 ** ladder.octaves[i]
        hyper = replace(PROXY.hyperparameters, learning_rate=rate)
        model = PROXY.model.at_width(int(ladder.widths[i]))
        spec = replace(PROXY, model=model, hyperparameters=hyper, seed=int(ladder.seeds[i]))
        run = LadderRun(f"w{model.width}", 0.0, spec, folder / str(i), "cpu", "0")
        run.directory.mkdir()
        records = [{"step": step, "loss": loss} for step, loss in enumerate(losses.tolist(), 1)]
        (run.directory / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
        made.append(run)
    return made


def test_the_band_is_read_from_the_ladder_s_folders(tmp_path: Path) -> None:
    ladder, _ = made_up(0, noise=0.01, shift=0.01)
    made, said = left(tmp_path, ladder), Prediction(loss=3.0, low=2.9, high=3.1)
    target = replace(PROXY, model=PROXY.model.at_width(256))
    warm = replace(ladder, warmup=PROXY.schedule.warmup(LATE))
    assert with_band(said, made, target) == replace(said, band=foretell(warm, 256))
    (tmp_path / "deeper").mkdir()
    others = left(tmp_path / "deeper", replace(ladder, losses=ladder.losses + 1.0))
    deeper = [replace(run, spec=replace(run.spec, model=replace(run.spec.model, depth=8))) for run in others]
    assert with_band(said, [*made, *deeper], target) == with_band(said, made, target)
    assert with_band(Prediction("too few"), made, target) == Prediction("too few")


@pytest.mark.parametrize("damage", ["", '{"step": 1, "loss": NaN}\n', "[]\n", '{"loss": 3.0}\n'])
def test_runs_without_all_their_records_are_left_out(tmp_path: Path, damage: str) -> None:
    ladder, _ = made_up(0, noise=0.01, shift=0.01)
    made, said = left(tmp_path, ladder), Prediction(loss=3.0, low=2.9, high=3.1)
    (made[0].directory / METRICS).write_text(damage)
    target = replace(PROXY, model=PROXY.model.at_width(256))
    assert with_band(said, made, target) == with_band(said, made[1:], target)
    assert with_band(said, [], target).band is None


@pytest.mark.soak
def test_soak_how_much_of_real_runs_lies_in_their_bands_is_recorded() -> None:
    rows = []
    for rungs, size in LADDERS:
        pairs = list(combinations(range(SEEDS), 2))
        nine, found = (outcomes(rungs, size, pairs, level) for level in (0.9, LEVEL))
        rows.append(
            {
                "rungs": ", ".join(map(str, rungs)),
                "held-out width": size,
                "bands": len(found),
                "runs": sum(len(held.out) for held in found),
                "steps inside, 90 %": share([~held.out for held in nine]),
                f"steps inside, {LEVEL:.0%}": share([~held.out for held in found]),
                "runs never outside": share([~held.out.any(axis=1) for held in found]),
                "never for a whole window": share([~lasting(held.out) for held in found]),
                "runs of the ladder's seeds never outside": share([~held.own.any(axis=1) for held in found]),
                "half width after 10 %, 33 %, 100 %": ", ".join(
                    f"{median(half_width(held.band[i]) for held in found):.1f} %" for i in (0, 10, -1)
                ),
            }
        )
        assert np.concatenate([held.out for held in found]).mean() < 0.05, rows[-1]
    title = (
        "The band of the training loss, of ladders of two seeds: how much of the smoothed losses of real runs of a "
        "width that the ladder does not hold lies inside, and its half width in % of the loss"
    )
    soak.record("band", title, rows)


@pytest.mark.soak
def test_soak_how_early_broken_runs_leave_their_band_is_recorded() -> None:
    rows, rungs, size = [], WIDTHS[:-1], WIDTHS[-1]
    bands = [foretell(clean(rungs, pair), size) for pair in combinations(range(SEEDS), 2)]
    for fault, (rule, offset) in FAULTS.items():
        losses = runs(rule=rule, width=size, offset=offset, seed=BROKEN).losses
        out = np.concatenate([departures(band, losses) for band in bands])
        start = NUM_STEPS - out.shape[1] + 1  # the first step of a band
        first = [(start + int(row.argmax())) / NUM_STEPS for row in out if row.any()]
        rows.append(
            {
                "fault": fault,
                "bands": len(bands),
                "left": share([out.any(axis=1)]),
                "first outside, median": f"after {median(first):.0%} of the run" if first else "never",
                "outside for a whole window": share([lasting(out)]),
                "steps outside": share([out]),
            }
        )
    assert rows[0]["left"] == share([np.ones((1, 1), dtype=bool)]), "a rate eight times too high leaves every band"
    title = f"Broken runs of width {size} and the bands of the rungs {', '.join(map(str, rungs))}: who leaves, and when"
    soak.record("band_faults", title, rows)


@pytest.mark.soak
def test_soak_the_stored_runs_are_made_anew(tmp_path: Path) -> None:
    store(wanted(str(tmp_path)), 1)
