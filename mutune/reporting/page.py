"""The page of a folder of results, `report.html`: one file with its figures inside, which opens without a network.

Everything on it is read from the folder's own files, so that the same files give the same bytes.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from mutune.certificate.config import Prediction
from mutune.compose import build
from mutune.errors import Refusal, first_line, require
from mutune.files import read_yaml, write_text
from mutune.reporting import frames
from mutune.training.result import METRICS

REPORT = "report.html"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing is fetched, whatever the page holds
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 2.2rem; font-size: 1.2rem; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
div.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; }
code, pre { background: #f4f4f4; padding: 0.1rem 0.3rem; }
pre { padding: 0.6rem; overflow-x: auto; }
"""


def study_page(directory: Path, next_step: str) -> Path:
    """The page of a study that has a best trial; returns its path.

    Args:
        next_step: what to do next, as the command says it.

    Raises:
        Refusal: a file that it needs is missing or damaged.
    """
    runs = frames.load_runs(directory / "trials")
    best = _read(directory / "best.yaml")
    losses = ("heldout_loss", "heldout_bits_per_byte")
    facts = {
        "trials": f"{len(runs)}: {runs.finished.sum()} finished, {runs.diverged.sum()} diverged",
        "best trial": _get(best, "trial", directory / "best.yaml"),
        **{name: best[name] for name in losses if best.get(name) is not None},
    }
    parts = [_table("", _pairs(facts)), _figures(directory)]
    if frames.is_grid_of_valleys(directory):
        valleys = frames.valleys(runs)
        parts += [
            _table("Optima with their 90 % intervals (log2 of the rate)", frames.optima(valleys)),
            _table("Drift of the optimum with width, in octaves", frames.drift(valleys)),
        ]
    hyperparameters = _pairs(_get(best, "hyperparameters", directory / "best.yaml", dict))
    parts += [
        _table("Trials of the lowest losses, before any was confirmed", frames.best_trials(runs)),
        _table("What was searched", frames.search_space(directory)),
        _table("Base hyperparameters of the best trial", hyperparameters),
    ]
    return _write(directory, f"Study {directory.name}", parts, next_step)


def transfer_page(directory: Path, next_step: str) -> Path:
    """The page of a transfer, with its verdict; as `study_page`."""
    path = directory / "certificate.json"
    data = _read(path)
    verdict = str(_get(data, "verdict", path))
    parts = [
        _text(f"Verdict: {verdict}. Base learning rate {_cell(_get(data, 'learning_rate', path))}."),
        _listed("Reasons", _get(data, "reasons", path, list)),
        _listed("What would settle it", data.get("settle") or []),
        _listed("Notes", [*(data.get("notes") or []), *(data.get("comparison_words") or [])]),
        _figures(directory),
    ]
    if data.get("prediction"):
        parts.append(
            _listed("Prediction of the target's loss", [str(build(Prediction, data["prediction"], str(path)))])
        )
    rungs = pd.DataFrame(_get(data, "rungs", path, list)).drop(columns="points", errors="ignore")
    parts += [
        _table(
            "Runs of the target", pd.DataFrame(data.get("outcome") or []).drop(columns="prediction", errors="ignore")
        ),
        _table("Ladder (optima in log2 of the base rate, losses in nats per token)", rungs),
        _table("Expected regret", _pairs(data.get("regret") or {})),
        _table("How proxy and target differ", pd.DataFrame(_get(data, "differences", path, list))),
        *_plan(directory),
    ]
    return _write(directory, f"{verdict}: {directory.name}", parts, next_step)


def train_page(directory: Path, next_step: str) -> Path:
    """The page of a finished training run; as `study_page`."""
    path = directory / "config.yaml"
    inputs = _get(_read(path), "inputs", path, dict)
    run = _get(inputs, "run", path, dict)
    runs, records = frames.load_runs(directory), frames.load_records(directory)
    require("step" in records, f"{directory / METRICS} holds no record; train again with the same command.")
    columns = ["step", "tokens", "context_length", "loss", "heldout_loss", "heldout_bits_per_byte"]
    facts = runs[["heldout_loss", "heldout_bits_per_byte", "steps", "tokens", "seconds"]].iloc[0].to_dict()
    facts["verdict of its transfer"] = _get(inputs, "verdict", path)
    parts = [
        _table("", _pairs(facts)),
        _figures(directory),
        _table("Held-out losses (nats per token)", records[records.heldout_loss.notna()].reindex(columns=columns)),
        _table("Stages", pd.DataFrame(_get(run, "stages", path, list))),
        _table("Base hyperparameters", _pairs(_get(run, "hyperparameters", path, dict))),
        *_plan(directory),
    ]
    return _write(directory, f"Run {directory.name}", parts, next_step)


def _write(directory: Path, title: str, parts: Iterable[str], next_step: str) -> Path:
    body = [f"<h1>{escape(title)}</h1>", *parts, _heading("Next"), f"<pre>{escape(next_step)}</pre>", _files(directory)]
    page = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>",
        "<body>",
        *filter(None, body),
        "</body></html>",
    ]
    write_text(directory / REPORT, "\n".join(page) + "\n")
    return directory / REPORT


def _read(path: Path) -> dict[str, Any]:
    """What a YAML or JSON file of the folder holds, which is a mapping."""
    if path.suffix == ".yaml":
        return read_yaml(path, "file")
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Refusal(f"{path} cannot be read ({type(error).__name__}); write it again with its command.") from error
    if not isinstance(data, dict):
        raise Refusal(f"{path} holds no keys; write it again with its command.")
    return data


def _get(data: Mapping[str, Any], key: str, path: Path, kind: type = object) -> Any:
    if not isinstance(data.get(key), kind) or key not in data:
        raise Refusal(f"{path} is damaged: {key} is {'not right' if key in data else 'missing'}; write it again.")
    return data[key]


def _plan(directory: Path) -> list[str]:
    """The plan's two tables, folded; none where the folder has no plan."""
    folded = []
    for path in (directory / f"{name}.csv" for name in ("parametrization", "multipliers")):
        if not path.is_file():
            continue
        try:
            frame = pd.read_csv(path)
        except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
            raise Refusal(f"{path} is damaged ({first_line(error)}); write it again.") from error
        folded.append(f"<details><summary>{escape(path.name)}</summary>{_table('', frame)}</details>")
    return [_heading("Plan"), *folded] if folded else []


def _figures(directory: Path) -> str:
    found = []
    for path in sorted((directory / "figures").glob("*.png")):
        image = base64.b64encode(path.read_bytes()).decode()
        found.append(f'<figure><img alt="{escape(path.stem)}" src="data:image/png;base64,{image}"></figure>')
    return "\n".join(found)


def _files(directory: Path) -> str:
    """Links to everything that lies beside the page."""
    names = [
        f"{path.name}/" if path.is_dir() else path.name
        for path in sorted(directory.iterdir())
        if not path.name.startswith((".", REPORT, "study.db-"))  # locks, this page, what SQLite keeps while it is open
    ]
    links = [f'<li><a href="./{escape(quote(name))}">{escape(name)}</a></li>' for name in names]
    return "\n".join([_heading("Files"), "<ul>", *links, "</ul>"])


def _listed(title: str, lines: Iterable[Any]) -> str:
    items = [f"<li>{escape(str(line))}</li>" for line in lines]
    return "\n".join([_heading(title), "<ul>", *items, "</ul>"]) if items else ""


def _table(title: str, frame: pd.DataFrame) -> str:
    """A frame under a heading; nothing where it has no rows."""
    if frame.empty:
        return ""
    shown = frame.map(_cell).rename(columns=lambda name: str(name).replace("_", " "))
    return f'{_heading(title)}<div class="table">{shown.to_html(index=False, border=0, justify="left")}</div>'


def _pairs(facts: Mapping[Any, Any]) -> pd.DataFrame:
    """A row per fact."""
    rows = [{"": str(key).replace("_", " "), "value": value} for key, value in facts.items()]
    return pd.DataFrame(rows, dtype=object)


def _cell(value: Any) -> str:
    """A value as it is read: 0.01234, 983,040, -0.23 to 0.32."""
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_cell, value))
    if value is None or value is pd.NA or value != value:  # NaN
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    return str(value)


def _heading(title: str) -> str:
    return f"<h2>{escape(title)}</h2>" if title else ""


def _text(words: str) -> str:
    return f"<p>{escape(words)}</p>"
