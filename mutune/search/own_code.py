"""A fingerprint of a user's functions: what they do, not how they are written, followed into what they call."""

import dis
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

#: Values that decide what a function does, and that print as themselves.
PLAIN = (bool, int, float, complex, str, bytes, type(None))


def fingerprints(functions: Mapping[str, Callable[..., Any]]) -> dict[str, str]:
    """Name → hash of every function that `functions` consist of, under the names given here or their own.

    Followed are functions, the methods of classes, and plain values that they find in closures, defaults or globals, as
    long as they are not of an installed library, which is known by its version. Comments and layout do not count. What
    is reached through data or by name at run time is not seen.

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
        for key, member in vars(thing).items():
            if isinstance(member, (FunctionType, staticmethod, classmethod, property, functools.partial)):
                _visit(f"{name}.{key}", member, found, seen)
    elif isinstance(thing, FunctionType):
        used = sorted(_used(thing), key=lambda pair: pair[0])
        values = [(key, value) for key, value in used if isinstance(value, PLAIN)]
        defaults = [value for value in thing.__defaults__ or () if isinstance(value, PLAIN)]
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


def _hash(*data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:12]
