"""A fingerprint of a user's functions: what they do, not how they are written, followed into what they call."""

import dataclasses
import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch

#: Values that decide what a function does, and that print as themselves.
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def fingerprints(functions: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Name → hash of every function that `functions` consist of, under the names given here or their own.

    Followed are functions, the methods and constants of classes, and what they find in closures, defaults or globals:
    plain values, tuples, dicts and dataclasses of them, tensors and arrays. Installed libraries are not followed, and
    are known by their version. Comments and layout do not count. Lists, which loops fill, other objects, and what is
    reached by name at run time are not seen.

    Hashes are of Python's bytecode, so they differ between its minor versions.
    """
    found: dict[str, str] = {}
    seen: set[int] = set()
    for name, function in functions.items():
        _visit(name, function, found, seen)
    return found


def _visit(name: str, thing: Any, found: dict[str, str], seen: set[int]) -> None:
    thing = _plain(thing)
    if id(thing) in seen or not (callable(thing) and _is_users(thing)):
        return
    seen.add(id(thing))
    if inspect.isclass(thing):
        for base in thing.__bases__:
            _visit(base.__qualname__, base, found, seen)
        constants = {key: _value(value) for key, value in vars(thing).items() if not key.startswith("__")}
        if any(value is not None for value in constants.values()):
            found[name] = _hash(found.get(name), sorted(constants.items()))
        for key, member in vars(thing).items():
            if isinstance(member, (FunctionType, staticmethod, classmethod, property, functools.partial)):
                _visit(f"{name}.{key}", member, found, seen)
    elif isinstance(thing, FunctionType):
        used = sorted(_used(thing), key=lambda pair: pair[0])
        values = [(key, _value(value)) for key, value in used]
        defaults = [*map(_value, thing.__defaults__ or ()), _value(thing.__kwdefaults__ or {})]
        found[name] = _hash(found.get(name), _facts(thing.__code__), values, defaults)
        for key, value in used:
            _visit(key, value, found, seen)
    else:
        _visit(name, type(thing), found, seen)


def _is_users(thing: Any) -> bool:
    """Whether it is of the user's own code: neither Python's, nor ours, nor an installed library's."""
    name = str(thing.__module__ if hasattr(thing, "__qualname__") else type(thing).__module__)
    if name == "__main__":  # a script's or a notebook's own, whatever file started it
        return True
    if name.partition(".")[0] in ("builtins", "mutune", *sys.stdlib_module_names):
        return False
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _plain(thing: Any) -> Any:
    """The function inside a partial, a method, a property or a decorator's wrapper."""
    while True:
        if isinstance(thing, functools.partial):
            thing = thing.func
        elif isinstance(thing, (staticmethod, classmethod)) or inspect.ismethod(thing):
            thing = thing.__func__
        elif isinstance(thing, property):
            thing = thing.fget
        elif hasattr(thing, "__wrapped__"):
            thing = thing.__wrapped__
        else:
            return thing


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What its code finds by name in its globals and its closure."""
    for name in sorted(_globals(function.__code__)):
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue


def _globals(code: CodeType) -> set[str]:
    """The globals that it and its inner functions read."""
    mine = {str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return mine.union(*(_globals(const) for const in code.co_consts if isinstance(const, CodeType)))


def _facts(code: CodeType) -> tuple[Any, ...]:
    """What a code object does: its instructions, names and constants, its inner functions' too."""
    consts = [_facts(const) if isinstance(const, CodeType) else _constant(const) for const in code.co_consts]
    return (code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, consts)


def _constant(value: Any) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _value(value: Any) -> str | None:
    """A value that decides what a function does, as text; None where it is none of those that are followed."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # any dtype, bfloat16 too
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, tuple):
        return repr([_value(part) for part in value])
    if isinstance(value, dict):
        return repr([(repr(key), _value(part)) for key, part in value.items()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr([(field.name, _value(getattr(value, field.name))) for field in dataclasses.fields(value)])
    return None


def _hash(*data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:12]
