"""The notebooks run from top to bottom, with results and without."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.reporting.runs import write_run, write_search, write_valleys

ANALYSIS = Path(__file__).parent.parent.parent / "analysis"
NOTEBOOKS = ("sweep", "transfer")


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
    NotebookClient(notebook, timeout=60, kernel_name="python3").execute(cwd=str(ANALYSIS.parent))
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


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_stored_without_outputs(name: str) -> None:
    notebook = nbformat.read(ANALYSIS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
