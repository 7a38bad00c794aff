"""`report.html`: what a folder's files say, in one file that needs no network and repeats to the same bytes."""

import base64
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml

from mutune.door import drawn
from mutune.errors import Refusal
from mutune.reporting import draw_study, draw_train
from mutune.reporting.page import study_page, train_page, transfer_page
from tests.reporting.runs import HYPERPARAMETERS, diverge, write_run, write_search, write_valleys

CERTIFICATE: dict[str, Any] = {
    "verdict": "GO WITH CARE",
    "reasons": ["batch: 2 doublings, <unmeasured>"],
    "settle": ["a rung with batch 512"],
    "learning_rate": 0.012,
    "rungs": [
        {"width": 32, "interval_log2": [-7.25, -6.5], "edge": None, "loss": 4.25, "points": [{"loss": 9.875}]},
        {"width": 1024, "interval_log2": [-7.0, -6.0], "edge": "high", "loss": 3.5, "points": []},
    ],
    "regret": {"transferred": 0.0125},
    "differences": [{"axis": "batch", "proxy": 512, "target": 3932160, "measured_to": None}],
}


class Page(HTMLParser):
    """What a page holds: its tags, the attributes that load or link, its text, the cells of its tables."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        self.sources += [found["src"] or ""] if "src" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.rows and self.rows[-1] and self.get_starttag_text() in ("<td>", "<th>"):
            self.rows[-1][-1] += data.strip()


def study(directory: Path) -> Path:
    write_search(directory)
    diverge(directory / "trials" / "0", 7.0, 60.0)
    draw_study(directory)
    best = {"study": directory.name, "trial": 3, "heldout_loss": 4.2, "heldout_bits_per_byte": 2.1}
    best |= {"hyperparameters": {**HYPERPARAMETERS, "weight_decay": 0.123}}
    (directory / "best.yaml").write_text(yaml.safe_dump(best))
    return study_page(directory, "python -m mutune.transfer study=proxy")


def transfer(directory: Path) -> Path:
    directory.mkdir(parents=True)
    (directory / "certificate.json").write_text(json.dumps(CERTIFICATE))
    (directory / "parametrization.csv").write_text("name,role,peak_lr\nwte.weight,embedding,0.0123\n")
    return transfer_page(directory, "python -m mutune.train transfer=...")


def train(directory: Path) -> Path:
    write_run(directory, loss=3.75, contexts=(128, 512))
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["inputs"] = {"run": config["run"], "verdict": "NOT CERTIFIED"}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    draw_train(directory)
    return train_page(directory, "open a notebook")


MAKERS = [study, transfer, train]
AGAIN: dict[Any, Callable[[Path, str], Path]] = {study: study_page, transfer: transfer_page, train: train_page}


def test_a_study_says_its_best_trial_its_space_and_what_comes_next(tmp_path: Path) -> None:
    page = Page(study(tmp_path / "proxy"))
    assert ["trials", "4: 3 finished, 1 diverged"] in page.rows
    assert ["heldout loss", "4.2"] in page.rows
    assert ["weight decay", "0.123"] in page.rows
    assert ["learning_rate", "0.001", "0.1", "yes"] in page.rows
    assert ["init_std", "0", "1", "no"] in page.rows
    trials = page.rows[
        page.rows.index(["trial", "heldout loss", "heldout bits per byte", "learning rate", "init std"]) :
    ]
    assert [row[:2] for row in trials[1:4]] == [["3", "4.2"], ["1", "4.5"], ["2", "4.8"]]
    assert "python -m mutune.transfer study=proxy" in page.text


def test_a_grid_of_valleys_has_its_optima_and_their_drift(tmp_path: Path) -> None:
    write_valleys(tmp_path, {"mup": {32: -7.0, 64: -7.5}}, seeds=(0, 1))
    (tmp_path / "best.yaml").write_text(yaml.safe_dump({"trial": 0, "hyperparameters": HYPERPARAMETERS}))
    page = Page(study_page(tmp_path, "look"))
    optima = [row for row in page.rows if row[:2] in (["mup", "32"], ["mup", "64"])]
    assert ["table", "mup"] in page.rows
    assert ["learning_rate", "0.001953125, 0.00390625, 0.0078125, 0.015625, 0.03125"] in page.rows
    assert [round(float(row[2]), 1) for row in optima] == [-7.0, -7.5]
    names = ["table", "octaves per doubling", "low", "high", "total", "range", "num seeds", "edge"]
    table, slope, low, high, *_, seeds, edge = page.rows[page.rows.index(names) + 1]
    assert (table, seeds, edge) == ("mup", "2", "no")
    assert float(low) < -0.4 < float(high)
    assert float(slope) == pytest.approx(-0.5, abs=0.1)


def test_a_transfer_says_its_verdict_reasons_rungs_and_plan(tmp_path: Path) -> None:
    page = Page(transfer(tmp_path / "proxy--small"))
    assert "GO WITH CARE: proxy--small" in page.text
    assert "batch: 2 doublings, <unmeasured>" in page.text
    assert "a rung with batch 512" in page.text
    assert ["32", "-7.25 to -6.5", "—", "4.25"] in page.rows
    assert ["1,024", "-7 to -6", "high", "3.5"] in page.rows
    assert ["transferred", "0.0125"] in page.rows
    assert ["batch", "512", "3,932,160", "—"] in page.rows
    assert ["wte.weight", "embedding", "0.0123"] in page.rows
    assert "9.875" not in page.text  # a rung's points are in the certificate


def test_a_training_run_says_its_losses_stages_and_verdict(tmp_path: Path) -> None:
    page = Page(train(tmp_path / "small"))
    assert ["verdict of its transfer", "NOT CERTIFIED"] in page.rows
    assert ["heldout loss", "3.75"] in page.rows
    assert ["steps", "40"] in page.rows
    assert ["20", "10,240", "128", "5.375", "5.375", "2.6875"] in page.rows
    assert ["40", "51,200", "512", "3.75", "3.75", "1.875"] in page.rows
    assert ["4", "512", "—", "20"] in page.rows


@pytest.mark.parametrize("make", MAKERS)
def test_a_page_opens_without_a_network_and_links_to_what_is_there(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "odd #1? 50%")
    page = Page(path)
    assert not page.tags & {"script", "link", "iframe", "object", "form", "base"}
    assert "url(" not in path.read_text()
    images = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert images == [figure.read_bytes() for figure in sorted((path.parent / "figures").glob("*.png"))]
    linked = {(path.parent / unquote(link)).name for link in page.links}
    assert linked == {entry.name for entry in path.parent.iterdir()} - {"report.html"}
    assert all(link.startswith("./") for link in page.links)


@pytest.mark.parametrize("make", MAKERS)
def test_a_page_escapes_what_it_shows(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    directory = tmp_path / "<script>&amp;"
    path = make(directory)
    (directory / "<img src=x>.txt").touch()
    again = AGAIN[make](directory, "<b>next</b> & more")
    assert again == path
    page = Page(path)
    assert page.tags.isdisjoint({"script", "b", "unmeasured"})
    assert not [source for source in page.sources if source == "x"]
    for shown in ("<script>&amp;", "<b>next</b> & more", "<img src=x>.txt"):
        assert shown in page.text


@pytest.mark.parametrize("make", MAKERS)
def test_the_same_files_give_the_same_bytes(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    first, second = make(tmp_path / "a" / "same"), make(tmp_path / "b" / "same")
    assert first.read_bytes() == second.read_bytes()
    assert b"/tmp" not in first.read_bytes()


@pytest.mark.parametrize(
    ("make", "name", "content", "sentence"),
    [
        (study, "best.yaml", "{", "best.yaml is not valid YAML at line 1"),
        (study, "best.yaml", "trial: 3\n", "best.yaml is damaged: hyperparameters is missing"),
        (study, "config.yaml", "inputs: 3\n", "config.yaml is damaged"),
        (transfer, "certificate.json", '{"verdict": ', "certificate.json cannot be read"),
        (transfer, "certificate.json", "[]", "certificate.json holds no keys"),
        (transfer, "certificate.json", "{}", "certificate.json is damaged: verdict is missing"),
        (transfer, "certificate.json", json.dumps(CERTIFICATE | {"rungs": 3}), "damaged: rungs is not right"),
        (transfer, "certificate.json", json.dumps(CERTIFICATE | {"prediction": {"los": 1}}), "unknown key"),
        (transfer, "parametrization.csv", "", "parametrization.csv is damaged"),
        (train, "config.yaml", "run: {}\n", "config.yaml is damaged: inputs is missing"),
        (train, "metrics.jsonl", "", "metrics.jsonl holds no record"),
    ],
)
def test_a_damaged_file_gives_one_sentence(
    tmp_path: Path,
    make: Callable[[Path], Path],
    name: str,
    content: str,
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = tmp_path / "proxy"
    path = make(directory)
    before = path.read_bytes()
    (directory / name).write_text(content)
    again = AGAIN[make]
    with pytest.raises(Refusal) as refusal:
        again(directory, "next")
    assert sentence in str(refusal.value)
    assert path.read_bytes() == before
    capsys.readouterr()
    assert drawn(lambda: [again(directory, "next")], "report") == []  # as a command says it
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("report     not made: ")
