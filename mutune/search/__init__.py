"""The search. `run`, its door for notebooks, lies in the hall since it also draws; it is loaded on first use."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mutune.own_model import run

__all__ = ["run"]


def __getattr__(name: str) -> Any:
    """Load `run` when it is asked for, so that the room's modules start without torch and Optuna."""
    if name != "run":
        raise AttributeError(f"module mutune.search has no attribute {name}")
    return importlib.import_module("mutune.own_model").run
