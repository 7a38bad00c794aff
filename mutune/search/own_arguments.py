"""The arguments of a search of a user's own model: as plain data, or refused."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mutune.errors import Refusal, require, require_name, require_number
from mutune.model.shape import MAX_WIDTH
from mutune.parametrization.arguments import plain_values, shown_value
from mutune.training.config import MAX_SEED


def listed(key: str, given: Any, example: list[Any]) -> list[Any]:
    """Several values as a plain list."""
    values = plain_values(given)
    require(isinstance(values, list), f"{key}={shown_value(given)} must be a list; for example {key}={example}.")
    return list(values)


def grouped(key: str, given: Any, example: dict[str, Any]) -> dict[str, Any]:
    """Named values as a plain dict."""
    require(isinstance(given, Mapping), f"{key}={shown_value(given)} must be a dict; for example {key}={example}.")
    return dict(plain_values(given))


def check_arguments(
    base: int,
    delta: int,
    widths: list[int],
    seed: int,
    seeds: int,
    workers: int | None,
    out: str | Path,
    name: str,
    overwrite: bool,
) -> None:
    """Refuse what is of the wrong kind, or does not go together."""
    require_number("delta", delta, at_least=1, at_most=MAX_WIDTH, example=128, whole=True)
    require(base != delta, f"delta={delta} is the base; for example delta={2 * base}.")
    require(
        not widths or set(widths) != {base},
        f"widths={widths} holds only the base's own width; for example widths=[{2 * base}, {4 * base}].",
    )
    require_number("seeds", seeds, at_least=1, at_most=100, example=2, whole=True)
    require_number("seed", seed, at_least=0, at_most=MAX_SEED - seeds, example=0, whole=True)
    if workers is not None:
        require_number("workers", workers, at_least=0, example=2, whole=True)
    for key, text in (("out", out), ("name", name)):
        kinds = (str,) if key == "name" else (str, Path)
        require(isinstance(text, kinds), f"{key}={shown_value(text)} must be a name; for example {key}='mine'.")
    require(str(out) != "", "out='' is empty; for example out='runs'.")
    require_name("name", name)
    require(isinstance(overwrite, bool), f"overwrite={shown_value(overwrite)} must be True or False.")


def check_train(train: Any) -> None:
    """Refuse what cannot be called as a loop is."""
    example = "for example one that begins def train(model, optimizer, seed, report)"
    require(
        callable(train) and not isinstance(train, nn.Module),
        f"train is a {type(train).__name__} and must be a function that trains a model; {example}.",
    )
    try:
        inspect.signature(train).bind(None, None, 0, None)
    except TypeError as error:
        raise Refusal(f"train cannot be called with four arguments ({error}); {example}.") from None
    except ValueError:  # there is no signature to look at
        return
