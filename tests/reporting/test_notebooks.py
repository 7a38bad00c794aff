"""The notebooks run from top to bottom, with results and without."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.reporting.runs import write_run, write_search, write_valleys

ANALYSIS = Path(__file__).parent.parent.parent / "analysis"
NOTEBOOKS, OWN_MODEL, SWITCH = ("sweep", "transfer"), "own_model", "context_switch"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    write_search(runs / "sweeps" / "proxy")
    optima = {"mup": {32: -7.0, 64: -6.75}, "sp": {32: -6.0, 64: -7.0}}
    write_valleys(runs / "sweeps" / "valley", optima)
    write_valleys(runs / "transfer" / "proxy--small", {"mup": optima["mup"]}, seeds=(0, 1), folder="ladder")
    write_run(runs / "train" / "small", contexts=(128, 512))
    return runs


def _execute(name: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The outputs of all cells of a notebook that was executed beside `runs`."""
    monkeypatch.setenv("MUTUNE_RUNS", str(runs))
    notebook = nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, kernel_name="python3", coalesce_streams=True).execute(
        cwd=str(ANALYSIS.parent)
    )
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


@pytest.mark.parametrize(("name", "num_images"), [("sweep", 5), ("transfer", 4)])
def test_notebooks_execute(name: str, num_images: int, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = _execute(name, results, monkeypatch)
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == num_images


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_without_results_every_cell_names_the_command_that_makes_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = _execute(name, tmp_path, monkeypatch)
    texts = [output.text for output in outputs]
    assert len(texts) == 4
    assert all(text.count("\n") == 1 and "make them with: python -m mutune." in text for text in texts)


def test_the_context_switch_is_shown_from_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = _execute(SWITCH, tmp_path, monkeypatch)
    assert not [output for output in outputs if output.output_type in ("error", "stream")]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert "difference" in outputs[-1].data["text/plain"]


def test_a_users_own_model_is_searched_and_climbed_by_one_cell_of_15_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = nbformat.read(ANALYSIS / f"{OWN_MODEL}.ipynb", as_version=4)
    (calls,) = [cell.source for cell in notebook.cells if "search.run(" in cell.source]
    assert len(calls.splitlines()) <= 15
    outputs = _execute(OWN_MODEL, tmp_path, monkeypatch)
    assert [output.output_type for output in outputs if output.output_type == "error"] == []
    progress, target = [output for output in outputs if output.output_type == "stream"]
    study, ladder = progress.text.splitlines()  # one line each, rewritten in place
    assert study.startswith("own 16/16 trials · best ")
    assert ladder.startswith("ladder 30/30 runs")
    assert target.text.splitlines()[3].startswith("hidden.weight,hidden,1024x1024,1024,32.0,")
    assert {progress.name, target.name} == {"stdout"}
    shown = next(output.data for output in outputs if "text/html" in output.get("data", {}))
    assert shown["text/html"].count("<img ") == 4
    assert len(list((tmp_path / "sweeps" / "own" / "trials").iterdir())) == 16


@pytest.mark.parametrize("name", [*NOTEBOOKS, OWN_MODEL, SWITCH])
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    notebook = nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
