"""Records → tidy tables. Every number that appears in a figure is made here.

A run is a folder with `config.yaml` and `metrics.jsonl`. `load_runs` and `load_records` read them; every other function
takes a frame and returns a frame. Losses are in nats per token; `log2_lr` and `optimum` are log2 of the base peak rate.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mutune.certificate.drift import extrapolate
from mutune.certificate.points import AXES
from mutune.certificate.valleys import Valleys, fit_valleys
from mutune.compose import sweep_files
from mutune.errors import Refusal
from mutune.files import read_yaml
from mutune.parametrization.hyperparameters import NAMES
from mutune.search.config import SCHEDULE
from mutune.training.result import METRICS, PREDICTION, smoothing

#: Coordinates of these quantities are drawn: title, and what 1 means on its y axis.
CHECKED = {
    "activation": "activations at initialisation",
    "update": "change of activations",
    "weight_update": "(W_t - W_0)·x, by tensor",
    "gradient": "gradient at initialisation, over ε",
}

CONFIG = "config.yaml"

RUN_COLUMNS = ("run", "study", "trial", "rung", "width", "depth", "table", "seed", *NAMES, *SCHEDULE)
POINT = ["table", "width", "seed", "log2_lr"]  # what tells the runs of a valley apart


def load_runs(directory: Path) -> pd.DataFrame:
    """One row for each run below `directory`, in the order of its trials.

    Columns: `RUN_COLUMNS`, then
        heldout_loss, heldout_bits_per_byte: at the end of the run; NaN where it did not reach it.
        value: what a search is told: the held-out loss, or for a diverged run the worst finite training loss and at
            least ln(vocabulary); NaN for an unfinished run. Of a user's own model no vocabulary is known, so that
            it is infinite where no finite loss was reported.
        diverged: stopped because its loss left the bounds.
        finished: reached its total steps. A row with neither is a run in progress, or one that was cut off.
        steps: updates done; total_steps: updates asked for; tokens; seconds. How many updates a user's own loop will
            do is not known before its end, nor what its tokens are.

    A run whose files are damaged is left out, with a note on stderr.

    Raises:
        Refusal: there is no run below `directory`; the command that makes one is named.
    """
    rows = []
    for path in _metrics(directory):
        try:
            rows.append(_run_row(path, directory))
        except Refusal as damage:  # one record less in a figure; the rest is still worth seeing
            print(f"left out   {damage}", file=sys.stderr)
    if not rows:
        raise _nothing(directory)
    frame = pd.DataFrame(rows).astype({"trial": "Int64", "adam_eps": "float64"})
    return frame.sort_values(["trial", "run"], ignore_index=True)


def load_records(directory: Path) -> pd.DataFrame:
    """One row per step of each run below `directory`, named by the column `run`.

    A line torn by a kill is left out; where a run was resumed and repeated a step, the later record stands.

    Raises:
        Refusal: there is no run below `directory`; the command that makes one is named.
    """
    frames = [pd.DataFrame(_records(path)).assign(run=_name(path, directory)) for path in _metrics(directory)]
    frame = pd.concat([f for f in frames if "step" in f] or frames, ignore_index=True)
    for column in ("heldout_loss", "heldout_bits_per_byte"):
        if column not in frame:
            frame[column] = math.nan
    if "step" not in frame:
        return frame
    return frame.drop_duplicates(["run", "step"], keep="last").sort_values(["run", "step"], ignore_index=True)


def load_space(directory: Path) -> dict[str, bool]:
    """What the study in `directory` searches: name → whether its axis is logarithmic.

    Raises:
        Refusal: there is no study; the command that makes one is named.
    """
    return {name: _is_log(data) for name, data in _search(directory)["space"].items()}


def search_space(directory: Path) -> pd.DataFrame:
    """What the study in `directory` searches, a row each: `low`, `high` and `log`, or `values`; as `load_space`."""
    rows = [
        {"name": name, "values": ", ".join(map(str, data["values"]))}
        if "values" in data
        else {"name": name, "low": data.get("low"), "high": data.get("high"), "log": data.get("log", True)}
        for name, data in _search(directory)["space"].items()
    ]
    columns = ["name", "low", "high", "log", "values"]
    return pd.DataFrame(rows, columns=columns, dtype=object).dropna(axis="columns", how="all")


def is_grid_of_valleys(directory: Path) -> bool:
    """Whether the study in `directory` is a full grid over width and learning rate, and at most table and seed."""
    search = _search(directory)
    whole = {"width", "learning_rate"} <= set(search["space"]) <= {"width", "table", "seed", "learning_rate"}
    return whole and search["sampler"] == "grid"


def _search(directory: Path) -> dict[str, Any]:
    if not (directory / CONFIG).is_file():
        raise _nothing(directory)
    stored = read_yaml(directory / CONFIG, "study's config")
    try:
        search = stored["inputs"]["config"]["search"]
        return {"space": dict(search["space"]), "sampler": search["sampler"]}
    except (KeyError, TypeError, ValueError) as error:
        raise Refusal(f"{directory / CONFIG} is damaged ({error}); restore it from a copy.") from None


def history(runs: pd.DataFrame) -> pd.DataFrame:
    """The course of a search: `trial`, `value`, `diverged` and `best`, the lowest held-out loss so far.

    Unfinished runs are left out, and a diverged one cannot be the best; `best` is NaN until a run finished.
    """
    over = runs[(runs.finished | runs.diverged) & runs.trial.notna()].sort_values("trial")
    frame = over[["trial", "value", "diverged"]].astype({"trial": int}).reset_index(drop=True)
    frame["best"] = frame.value.where(~frame.diverged).cummin().ffill()
    return frame


def best_trials(runs: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """The finished runs of lowest held-out loss, with the quantities in which the runs differ."""
    names = ["width", "table", "seed", *NAMES, *SCHEDULE]
    varied = [name for name in names if runs[name].nunique(dropna=False) > 1]
    columns = ["trial", "heldout_loss", "heldout_bits_per_byte", *varied]
    return runs[runs.finished].nsmallest(count, "heldout_loss")[columns].reset_index(drop=True)


def valleys(runs: pd.DataFrame) -> pd.DataFrame:
    """Loss over learning rate: one row per table, width, seed and `log2_lr`, with `learning_rate`, `loss`, `diverged`.

    A diverged run counts with the value it was told as, or where that is infinite, with the worst loss of its valley;
    unfinished runs are left out.

    Raises:
        Refusal: the runs differ in something else too, so that a point would have two losses.
    """
    frame = runs[runs.finished | runs.diverged].assign(
        log2_lr=lambda f: f.learning_rate.map(math.log2), loss=lambda f: f.value
    )
    twice = frame[frame.duplicated(POINT, keep=False)]
    if len(twice):
        raise Refusal(
            f"runs {twice.run.iloc[0]} and {twice.run.iloc[1]} differ in neither table, width, seed nor learning rate; "
            "give valleys() only runs of one ladder, for example runs[runs.study == 'valley']."
        )
    finite = frame.loss.where(np.isfinite(frame.loss))
    worst = finite.groupby([frame[key] for key in POINT[:3]]).transform("max")
    frame = frame.assign(loss=finite.fillna(worst)).dropna(subset=["loss"])
    return frame[[*POINT, "learning_rate", "loss", "diverged"]].sort_values(POINT, ignore_index=True)


def mean_valleys(valleys: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: one row per table, width and `log2_lr`; `diverged` where any seed did."""
    points = valleys.groupby(["table", "width", "log2_lr"], as_index=False)
    return points.agg(
        learning_rate=("learning_rate", "first"),
        loss=("loss", "mean"),
        diverged=("diverged", "any"),
        num_seeds=("seed", "nunique"),
    )


def optima(valleys: pd.DataFrame) -> pd.DataFrame:
    """The fitted bottom of each width's valley: one row per table and width, as a certificate would have it.

    Columns: `optimum` (log2), its 90 % interval `low` to `high`, `learning_rate` (2^optimum), `loss` there (mean over
    seeds), `edge` (`low` or `high` where the optimum lies at that end of the rates or beyond it, and is only a bound,
    else missing), `num_rates` that finished, `num_seeds`. With fewer than three finished rates the numbers are NaN.
    """
    rows = []
    for table, points in valleys.groupby("table"):
        fit, fitted = _fit(points)
        for width in sorted(points.width.unique().tolist()):
            mine = points[points.width == width]
            done = mine[~mine.diverged]
            row: dict[str, Any] = {"table": table, "width": width}
            row |= {"num_rates": done.log2_lr.nunique(), "num_seeds": mine.seed.nunique(), "edge": None}
            row |= dict.fromkeys(("optimum", "low", "high", "loss"), math.nan)
            row |= _bottom(fit, fitted.index(width), done) if fit and width in fitted else {}
            rows.append(row)
    names = ["table", "width", "optimum", "low", "high", "loss", "edge", "num_rates", "num_seeds"]
    frame = pd.DataFrame(rows, columns=names).astype({"edge": "str"})
    frame.insert(3, "learning_rate", 2.0**frame.optimum)
    return frame


def _fit(points: pd.DataFrame) -> tuple[Valleys | None, list[int]]:
    """One table's valleys fitted together, and the widths that have one."""
    rates = points[~points.diverged].groupby("width").log2_lr.nunique()
    widths = sorted(rates[rates >= 3].index.tolist())
    if not widths:
        return None, []
    mine = points[points.width.isin(widths)]
    others = dict.fromkeys((axis for axis in AXES if axis != "width"), 1.0)
    losses = mine.loss.where(~mine.diverged)
    return fit_valleys(mine.assign(width=mine.width.astype(float), loss=losses, **others)), widths


def _bottom(fit: Valleys, rung: int, done: pd.DataFrame) -> dict[str, Any]:
    """Of one rung; a bound stands at its rate, with the loss that was measured there."""
    low, high = fit.interval(rung)
    found = {"low": low, "high": high, "edge": fit.edges[rung]}
    if fit.edges[rung] is None:
        return {**found, "optimum": float(fit.optima[rung]), "loss": float(fit.levels[rung])}
    bound = float(fit.bounds[rung])
    return {**found, "optimum": bound, "loss": done.loss[np.isclose(done.log2_lr, bound)].mean()}


def offsets(optima: pd.DataFrame) -> pd.DataFrame:
    """How far each width's optimum lies from the narrowest width's, in octaves of the learning rate.

    One row per table and width that has an optimum: `octaves`, and the 90 % interval `low` to `high` of the width's own
    optimum, all counted from the optimum at `base_width`, the table's narrowest; `edge` as in `optima`.
    """
    frame = optima.dropna(subset=["optimum"]).sort_values(["table", "width"], ignore_index=True)
    base = frame.groupby("table").optimum.transform("first")
    frame = frame.assign(
        base_width=frame.groupby("table").width.transform("first"),
        octaves=frame.optimum - base,
        low=frame.low - base,
        high=frame.high - base,
    )
    return frame[["table", "width", "octaves", "low", "high", "edge", "base_width"]]


def drift(valleys: pd.DataFrame) -> pd.DataFrame:
    """How far the optimum moves over the widths: one row per table, in octaves.

    Columns: `octaves_per_doubling` of the width with its 90 % interval `low` to `high`; `total`, from the narrowest to
    the widest; `range` of the optima; `num_seeds`; and `edge`: whether an optimum lies at the edge of its rates. Then
    only `range` is given, and it is a lower bound. A table with fewer than two optima has NaN.
    """
    rows, found = [], optima(valleys)
    for table, points in valleys.groupby("table"):
        mine = found[(found.table == table) & found.optimum.notna()]
        row = {"table": table, "num_seeds": points.seed.nunique(), "edge": bool(mine.edge.notna().any())}
        row |= dict.fromkeys(("octaves_per_doubling", "low", "high", "total", "range"), math.nan)
        if len(mine) > 1:
            row["range"] = mine.optimum.max() - mine.optimum.min()
            if not row["edge"]:
                row["total"] = mine.optimum.iloc[-1] - mine.optimum.iloc[0]
                row |= _slope(points)
        rows.append(row)
    names = ["table", "octaves_per_doubling", "low", "high", "total", "range", "num_seeds", "edge"]
    return pd.DataFrame(rows, columns=names)


def _slope(points: pd.DataFrame) -> dict[str, float]:
    """Of the optimum over the doublings of the width, with its interval."""
    fit, widths = _fit(points)
    assert fit is not None
    moved = extrapolate(fit, 0, {**dict.fromkeys(AXES, 1.0), "width": float(widths[-1])})
    assert moved is not None
    low, middle, high = moved.quantiles(moved.slopes[:, 0])
    return {"octaves_per_doubling": middle, "low": low, "high": high}


def certified(directory: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What the certificate in `directory` says of optima, all in log2 of the base rate.

    Returns:
        The rungs, a row each: width, depth, tokens and batch (missing where unknown), `optimum`, `low`, `high` (90 %),
        `edge`, and whether it is the `base`. Then `rate`, the transferred one, and of the target `optimum`, `low` and
        `high`, missing where too few optima were measured.

    Raises:
        Refusal: there is no certificate, or it is damaged.
    """
    path = directory / "certificate.json"
    try:
        data = json.loads(path.read_text())
        rungs = pd.DataFrame(data["rungs"]).rename(columns={"optimum_log2": "optimum"})
        rate, drift = math.log2(data["learning_rate"]), data["drift"]
        if len(rungs):
            rungs[["low", "high"]] = rungs["interval_log2"].tolist()
            rungs["base"] = rungs["octaves_from_base"] == 0.0
            if not rungs.base.any():
                raise ValueError("no rung is the base")
        ends = (
            {"optimum": drift["distance"], "low": drift["interval"][0], "high": drift["interval"][1]} if drift else {}
        )
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise Refusal(f"{path} cannot be read ({type(error).__name__}); write it again with its command.") from error
    return rungs, {"rate": rate, **{key: rate + octaves for key, octaves in ends.items()}}


def loss_window(losses: pd.Series, diverged: pd.Series) -> tuple[float, float]:
    """The losses worth showing: from the lowest up to twice the third quartile's distance above it.

    Diverged runs are ignored unless there are no others. A margin of 5 % is added on both sides.
    """
    losses = losses.where(np.isfinite(losses))
    shown = losses[~diverged].dropna()
    shown = losses.dropna() if shown.empty else shown
    if shown.empty:
        return 0.0, 1.0
    low, quartile, high = shown.min(), shown.quantile(0.75), shown.max()
    if quartile > low:
        high = min(high, low + 2 * (quartile - low))
    margin = 0.05 * (high - low) or 0.05
    return float(low - margin), float(high + margin)


def best_per_width(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each table and width, the finished run of lowest held-out loss."""
    finished = runs[runs.finished]
    return finished.loc[finished.groupby(["table", "width"]).heldout_loss.idxmin()].reset_index(drop=True)


def curves(records: pd.DataFrame, runs: pd.DataFrame, window: int | None = None) -> pd.DataFrame:
    """The records of `runs` with `smooth_loss` added, and each run's table, width, seed and learning rate.

    Args:
        window: steps of the trailing mean; None takes 2 % of the longest run. Kept in the column `window`.
    """
    facts = runs[["run", "table", "width", "seed", "learning_rate"]]
    frame = records.merge(facts, on="run").sort_values(["run", "step"], ignore_index=True)
    window = window or max(1, round(0.02 * float(runs.total_steps.to_numpy().max())))
    rolling = frame.groupby("run").loss.rolling(window, min_periods=1)
    frame["smooth_loss"] = rolling.mean().reset_index(level=0, drop=True)
    frame["window"] = window
    return frame


def band(directory: Path) -> pd.DataFrame:
    """What was foretold of the training loss of the run in `directory`: `tokens`, `low`, `median`, `high` and `window`,
    the steps that it is a mean over; no row where nothing was.
    """
    columns = ["tokens", "low", "median", "high", "window"]
    try:
        rows = json.loads((directory / PREDICTION).read_text())["prediction"]["band"]
        foretold = pd.DataFrame(rows or [], columns=["fraction", *columns[1:4]], dtype=float)
    except (OSError, ValueError, LookupError, TypeError):  # as of a run whose transfer file knows no band
        return pd.DataFrame(columns=columns, dtype=float)
    stages = read_yaml(directory / CONFIG, "run's config")["run"]["stages"]
    steps = np.cumsum([0, *(stage["num_steps"] for stage in stages)])
    sizes = [s["num_steps"] * s["batch_sequences"] * s["context_length"] for s in stages]
    foretold["tokens"] = np.interp(foretold.fraction * steps[-1], steps, np.cumsum([0, *sizes]))
    foretold["window"] = smoothing(int(steps[-1]))
    return foretold[columns]


def outside(curves: pd.DataFrame, band: pd.DataFrame) -> pd.DataFrame:
    """The rows of one run's `curves` whose smoothed loss lies outside its band, `smooth_loss` missing in all others."""
    low, high = (np.interp(curves.tokens, band.tokens, band[end], left=math.nan) for end in ("low", "high"))
    out = (curves.smooth_loss < low) | (curves.smooth_loss > high)  # before the band, neither
    return curves.assign(smooth_loss=curves.smooth_loss.where(out))


def context_switches(records: pd.DataFrame) -> pd.DataFrame:
    """Where the context length of a run changes: `tokens` before the switch, the context `before` and `after` it."""
    before, tokens = records.context_length.shift(), records.tokens.shift()
    switched = before.notna() & (records.context_length != before)
    rows = {"tokens": tokens, "before": before, "after": records.context_length}
    return pd.DataFrame(rows)[switched].astype(int).reset_index(drop=True)


def _metrics(directory: Path) -> list[Path]:
    found = sorted(directory.rglob(METRICS)) if directory.is_dir() else []
    if not found:
        raise _nothing(directory)
    return found


def _nothing(directory: Path) -> Refusal:
    return Refusal(f"there are no runs in {directory}; make them with: {_command(directory)}")


def _command(directory: Path) -> str:
    """The command whose results would lie in `directory`."""
    parts = directory.parts
    if "transfer" in parts:
        study, _, target = next((part for part in parts if "--" in part), "proxy--small").partition("--")
        return f"python -m mutune.transfer study={study} target={target}"
    if "train" in parts:
        return "python -m mutune.train transfer=runs/transfer/proxy--small/transfer.yaml"
    sweep = next((part for part in reversed(parts) if part in sweep_files()), "proxy")
    return f"python -m mutune.sweep +sweep={sweep}"


def _name(path: Path, directory: Path) -> str:
    return path.parent.relative_to(directory).as_posix()


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    with path.open(errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # torn: the run is in progress, or was killed while it wrote
                continue
            if isinstance(record, dict):
                records.append(record)
    return records


def _run_row(path: Path, directory: Path) -> dict[str, Any]:
    config, records = read_yaml(path.parent / CONFIG, "run's config"), _records(path)
    try:
        return _facts(config, _name(path, directory)) | _outcome(config, records)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(f"the run {path.parent} is damaged ({error!r} in {CONFIG} or {METRICS})") from None


def _facts(config: dict[str, Any], name: str) -> dict[str, Any]:
    """What the run is."""
    run = config["run"]
    facts = {"run": name, **{key: config.get(key) for key in ("study", "trial", "rung")}}
    facts |= {
        "width": run["model"]["width"],
        "depth": run["model"]["depth"],
        "table": run["parametrization"]["table"],
        "seed": run["seed"],
    }
    schedule = run.get("schedule", {})  # a user's own loop has its own
    facts |= {name: schedule.get(key) for name, key in SCHEDULE.items()}
    return facts | {key: run["hyperparameters"].get(key) for key in NAMES}


def _outcome(config: dict[str, Any], records: list[dict[str, Any]]) -> dict[str, Any]:
    """What became of it."""
    last = records[-1] if records else {"step": 0, "tokens": 0, "seconds": 0.0, "diverged": False}
    diverged = last["diverged"]
    steps = last["step"] - diverged  # the last record of a diverged run made no update
    if "stages" in config["run"]:
        total = sum(stage["num_steps"] for stage in config["run"]["stages"])
        finished, worst = not diverged and steps == total, math.log(config["vocab_size"])
    else:  # a user's own loop: it is over when it has returned a held-out loss
        total, finished, worst = steps, "heldout_loss" in last and not diverged, -math.inf
    loss = last["heldout_loss"] if finished else math.nan
    losses = [record["loss"] for record in records if math.isfinite(record["loss"])]
    return {
        "heldout_loss": loss,
        "heldout_bits_per_byte": last.get("heldout_bits_per_byte", math.nan) if finished else math.nan,
        "value": _told(max([worst, *losses])) if diverged else loss,
        "diverged": diverged,
        "finished": finished,
        "steps": steps,
        "total_steps": total,
        "tokens": last.get("tokens", math.nan),
        "seconds": last["seconds"],
    }


def _told(worst: float) -> float:
    return worst if math.isfinite(worst) else math.inf


def _is_log(data: dict[str, Any]) -> bool:
    """A range says it; listed values are on a log scale where they are positive numbers spanning two octaves."""
    if "values" not in data:
        return bool(data.get("log", True))
    values = data["values"]
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and min(values) > 0 and max(values) >= 4 * min(values)


def check_lines(directory: Path, axis: str) -> pd.DataFrame:
    """The judged coordinates of a check over size, each relative to its value at the smallest size.

    One row per quantity, place and size, at the last step at which the place was judged: `ratio` (geometric mean over
    seeds, and for gradients and for what a bound expects to scale, over what it expects), `step`, `slope`, `low`,
    `high`, `passed`.

    Raises:
        Refusal: there is no check in `directory`; the command that makes one is named.
    """
    paths = [directory / f"{part}-{axis}.csv" for part in ("coordinates", "slopes")]
    if not all(path.exists() for path in paths):
        raise Refusal(f"{directory} holds no check over {axis}; make one with python -m mutune.check.")
    coordinates, slopes = (pd.read_csv(path) for path in paths)
    slopes = slopes.sort_values(["passed", "step"], ascending=[True, False])  # what failed, else the last step
    slopes = slopes.drop_duplicates(["quantity", "place"]).rename(columns={"mean": "slope"})
    values = coordinates.merge(slopes[["quantity", "place", "step", "slope", "low", "high", "passed"]])
    values["log2"] = np.log2(values.value)
    keys = ["quantity", "place", "step", "slope", "low", "high", "passed", "size"]
    lines = values.groupby(keys, sort=False)["log2"].mean().reset_index()
    lines = lines.sort_values(["quantity", "place", "size"])
    first = lines.groupby(["quantity", "place"])[["log2", "size"]].transform("first")
    expected = ((lines.low + lines.high) / 2).where(lines.quantity == "gradient", 0.0)
    lines["ratio"] = 2 ** (lines.log2 - first.log2 - expected * np.log2(lines["size"] / first["size"]))
    return lines.drop(columns="log2").reset_index(drop=True)
