"""What a user's code passes in: numbers of other libraries, names for what they name, and functions that may fail."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from mutune.errors import Refusal, require, require_number, shown
from mutune.parametrization.hyperparameters import NAMES, BaseHyperparameters
from mutune.parametrization.plan import Decay
from mutune.parametrization.roles import Role
from mutune.parametrization.rules import Table, get_table

Shape = TypeVar("Shape")


def plain_values(value: Any) -> Any:
    """Arrays, sequences and mappings as lists and dicts, and numbers of NumPy's and torch's as Python's."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {plain_values(key): plain_values(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        return [plain_values(part) for part in value]
    return value


def as_table(table: str | Table) -> Table:
    """The table itself, or the one of that name."""
    require(isinstance(table, str | Table), f"table={table!r} must be the name of a table; for example table='mup'.")
    return get_table(table) if isinstance(table, str) else table


def as_decay(decay: str | Decay) -> Decay:
    """The decay itself, or the one of that name."""
    require(
        isinstance(decay, str | Decay),
        f"decay={decay!r} must be the name of a decay, or a mutune.Decay; for example decay='fixed'.",
    )
    return Decay(decay) if isinstance(decay, str) else decay


def as_hyperparameters(given: BaseHyperparameters | Mapping[str, Any]) -> BaseHyperparameters:
    """The hyperparameters themselves, or the defaults with these put in."""
    if isinstance(given, BaseHyperparameters):
        return given
    require(
        isinstance(given, Mapping),
        f"hyperparameters={shown_value(given)} must be a dict; for example hyperparameters={{'learning_rate': 0.01}}.",
    )
    for name in given:
        require(name in NAMES, f"hyperparameters.{name} is unknown; known: {', '.join(NAMES)}.")
    return BaseHyperparameters(**plain_values(given))


def called(name: str, function: Callable[[Shape], Any], shape: Shape, purpose: str) -> Any:
    """What a user's function of the shape returns.

    Raises:
        Refusal: it raised; `purpose` says what it must do.
    """
    try:
        return function(shape)
    except Refusal:
        raise
    except Exception as error:
        said = shown(" ".join(str(error).split()))
        raise Refusal(
            f"{name}({shown_value(shape)}) raised {type(error).__name__}: {said}; it must {purpose}."
        ) from error


def shown_value(value: Any) -> str:
    """A value as code would have it, not longer than a line."""
    return shown(" ".join(repr(value).split()))


def check_build(build: Any) -> None:
    """Refuse what makes no model, such as the model itself."""
    require(
        callable(build) and not isinstance(build, nn.Module),
        f"build is a {type(build).__name__} and must be a function from shape to a fresh model; for example "
        f"build=lambda width: Net(width).",
    )


def check_options(
    roles: Mapping[str, Role | str],
    sites: Mapping[str, str],
    base_fan_in: Mapping[str, float],
    depth: Callable[[Any], int] | None,
    head_size: int | Callable[[Any], int] | None,
) -> None:
    """Refuse a family's options that are of no use with any model."""
    _check_names("roles", roles, "{'lm_head.weight': 'output'}")
    for pattern, role in roles.items():
        _check_role(pattern, role)
    _check_names("sites", sites, "{'output': 'lm_head'}")
    for site, pattern in sites.items():
        require(
            isinstance(pattern, str),
            f"sites[{site!r}]={shown_value(pattern)} must be the name of a module, or one pattern for several; for "
            f"example sites={{{site!r}: 'lm_head'}}.",
        )
    _check_names("base_fan_in", base_fan_in, "{'*.w2.weight': 682.6}")
    for pattern, value in base_fan_in.items():
        require_number(f"base_fan_in[{pattern!r}]", value, above=0.0, example=682.6)
    require(
        depth is None or callable(depth),
        f"depth={shown_value(depth)} must be a function of the shape; for example depth=lambda shape: 4.",
    )
    if not callable(head_size):
        check_head_size(head_size)


def check_head_size(size: float | None) -> None:
    """Refuse what is no size of a head."""
    if size is not None:
        require_number("head_size", size, above=0.0, example=64)


def _check_names(key: str, given: Mapping[str, Any], example: str) -> None:
    require(isinstance(given, Mapping), f"{key}={shown_value(given)} must be a dict; for example {key}={example}.")
    for name in given:
        require(isinstance(name, str), f"{key} has the key {name!r}, which is no name; for example {key}={example}.")


def _check_role(pattern: str, role: Role | str) -> None:
    example = f"roles={{{pattern!r}: 'hidden'}}"
    name = role.name if isinstance(role, Role) else role
    require(
        isinstance(name, str),
        f"roles[{pattern!r}]={shown_value(role)} must name a row of the table; for example {example}.",
    )
    if isinstance(role, Role) and role.fan_in is not None:
        axes = role.fan_in if isinstance(role.fan_in, tuple | list) else [role.fan_in]
        require(
            all(isinstance(axis, int) and not isinstance(axis, bool) for axis in axes) and len(set(axes)) == len(axes),
            f"roles[{pattern!r}] has fan_in={shown_value(role.fan_in)}, which must be a dimension or several different "
            f"ones; for example Role({name!r}, fan_in=1).",
        )
