"""The house: a room imports rooms above it, never below, and a few libraries have one room each."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mutune

PACKAGE = Path(__file__).resolve().parent.parent / "mutune"
ROOMS = [
    "parametrization",
    "scaling",
    "model",
    "data",
    "training",
    "search",
    "verification",
    "certificate",
    "evaluation",
    "reporting",
]
DOORS = ["sweep", "transfer", "train", "check"]
#: The door for notebooks. It lies in the hall as the others do, since it draws; the front of search/ hands it out.
NOTEBOOK_DOOR, ITS_FRONT = "own_model", PACKAGE / "search" / "__init__.py"
#: Modules beside the rooms, and the rooms that they may know: all of them, or none.
HALL_KNOWS_ROOMS = ["config", "door", "follow", "beginning", "underway", NOTEBOOK_DOOR, *DOORS]
HALL_KNOWS_NONE = ["errors", "files", "folders", "help", "progress", "versions", "compose"]
#: What a user's code imports: it names rooms, and loads them on first use only.
FRONT = "__init__"
ONLY_IN = {
    "hydra": ["compose"],
    "omegaconf": ["compose"],
    "optuna": ["search"],
    "matplotlib": ["reporting"],
    "tensorboard": ["training"],
    "wandb": ["training"],
}
WITHOUT_TORCH = [
    "parametrization/rules.py",
    "parametrization/plan.py",
    "parametrization/symmetry.py",
    "parametrization/hyperparameters.py",
    "parametrization/finding.py",
    "parametrization/names.py",
    "scaling",
    "data",
    "model/shape.py",
    "training/alarms.py",
    "training/config.py",
    "training/guard.py",
    "training/guard_rules.py",
    "training/schedule.py",
    "training/price.py",
    "training/usual.py",
    "training/quote.py",
    "training/passes.py",
    "search/config.py",
    "certificate/config.py",
    "certificate/stages.py",
    "verification/places.py",
    "verification/verdict.py",
    "compose.py",
    "config.py",
    "door.py",
    "help.py",
]


def imports(file: Path, top_level_only: bool = False) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            yield str(node.module)


def files_of(place: str) -> list[Path]:
    path = PACKAGE / place
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    below = ROOMS[ROOMS.index(room) + 1 :]
    for file in files_of(room):
        for name in imports(file):
            parts = name.split(".")
            if parts[0] != "mutune" or len(parts) < 2:
                continue
            assert parts[1] not in below, f"{file} imports {name}, which lies below {room}"
            handed_out = file == ITS_FRONT and parts[1] == NOTEBOOK_DOOR
            assert handed_out or parts[1] not in HALL_KNOWS_ROOMS, f"{file} imports {name}, which is a door's"


@pytest.mark.parametrize("module", HALL_KNOWS_NONE)
def test_the_hall_below_the_doors_knows_no_room(module: str) -> None:
    for name in imports(PACKAGE / f"{module}.py"):
        assert not any(name.startswith(f"mutune.{room}") for room in ROOMS), f"{module} imports {name}"


def test_every_module_is_listed_here() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules == {*HALL_KNOWS_ROOMS, *HALL_KNOWS_NONE, FRONT}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


def test_the_front_loads_no_room_and_no_torch_before_a_name_is_asked_for() -> None:
    ask = "import sys, mutune; print([name for name in sys.modules if name == 'torch' or name.startswith('mutune.')])"
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_workers_load_has_no_storage_no_fit_and_no_figure() -> None:
    """They start many times in a sweep's life, and each start is waited for."""
    heavy = ("optuna", "sqlalchemy", "pandas", "scipy", "matplotlib", "hydra")
    ask = (
        "import sys, mutune.search.trial, mutune.search.own_trial, mutune.certificate.ladder;"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_front_has_every_name_that_it_lists_and_no_other() -> None:
    for name in mutune.__all__:
        assert getattr(mutune, name).__name__ == name
        assert getattr(mutune, name).__module__ == mutune.PUBLIC[name]
    with pytest.raises(AttributeError, match="module mutune has no attribute parametrise"):
        mutune.parametrise  # noqa: B018


def test_every_room_is_in_the_wheel() -> None:
    packages = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert {*packages} == {"mutune", "mutune.conf", "mutune.sweeps", *(f"mutune.{room}" for room in ROOMS)}


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_room(library: str) -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        place = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if any(name.split(".")[0] == library for name in imports(file)):
            assert place in ONLY_IN[library], f"{file} imports {library}"


@pytest.mark.parametrize("place", WITHOUT_TORCH)
def test_the_theory_and_the_doors_start_without_torch(place: str) -> None:
    for file in files_of(place):
        names = imports(file, top_level_only=place in ("door.py", "parametrization/names.py"))
        assert not any(name.split(".")[0] == "torch" for name in names), file


def test_the_public_names_are_there_and_the_package_starts_without_torch() -> None:
    assert sorted(mutune.PUBLIC) == mutune.__all__
    assert all(hasattr(mutune, name) for name in mutune.__all__)
    assert not hasattr(mutune, "nothing")
    code = "import sys, mutune, mutune.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
