"""The search. `run`, its door for notebooks, lies in the hall since it also draws; it is loaded on first use."""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune.own_model import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Load `run` when it is asked for, so that the room's modules start without torch and Optuna."""
    if name != "run":
        raise AttributeError(f"module mutune.search has no attribute {name}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "IProgress not found")  # Optuna's, of a progress bar that is not drawn here
        return importlib.import_module("mutune.own_model").run
