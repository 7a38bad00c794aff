"""A fingerprint of a user's functions: what they do, not how they are written, followed into what they call."""

import dataclasses
import dis
import functools
import hashlib
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    reached by name at run time are not seen. What the functions themselves write to by its name, such as a dict that
    remembers results or a global counter, is state: it does not count either.

    Hashes are of Python's bytecode, so they differ between its minor versions.
    """
    reached: list[tuple[str, Any]] = []
    seen: set[int] = set()
    for name, function in functions.items():
        _visit(name, function, reached, seen)
    state = _Writes.of([thing.__code__ for _, thing in reached if isinstance(thing, FunctionType)])
    found: dict[str, str] = {}
    for name, thing in reached:
        facts = _class_facts(thing, state) if inspect.isclass(thing) else _function_facts(thing, state)
        if facts:
            found[name] = _hash(found.get(name), *facts)
    return found


def _visit(name: str, thing: Any, reached: list[tuple[str, Any]], seen: set[int]) -> None:
    """Add to `reached` every class and function of the user's that `thing` leads to, in the order of their hashing."""
    thing = _plain(thing)
    if id(thing) in seen or not (callable(thing) and _is_users(thing)):
        return
    seen.add(id(thing))
    if inspect.isclass(thing):
        for base in thing.__bases__:
            _visit(base.__qualname__, base, reached, seen)
        reached.append((name, thing))
        for key, member in vars(thing).items():
            if isinstance(member, (FunctionType, staticmethod, classmethod, property, functools.partial)):
                _visit(f"{name}.{key}", member, reached, seen)
    elif isinstance(thing, FunctionType):
        reached.append((name, thing))
        for key, value in sorted(_used(thing), key=lambda pair: pair[0]):
            _visit(key, value, reached, seen)
    else:
        _visit(name, type(thing), reached, seen)


def _class_facts(thing: type, state: "_Writes") -> tuple[Any, ...]:
    """A class's constants; none where it has none."""
    constants = {key: _value(value) for key, value in vars(thing).items() if not key.startswith("__")}
    counted = {key: None if key in state.attributes else value for key, value in constants.items()}
    return (sorted(counted.items()),) if any(value is not None for value in counted.values()) else ()


def _function_facts(function: FunctionType, state: "_Writes") -> tuple[Any, ...]:
    """What a function's code is, and the values that it finds by name or has as defaults."""
    used = sorted(_used(function), key=lambda pair: pair[0])
    values = [(key, None if key in state.names else _value(value)) for key, value in used]
    code, own = function.__code__, _Writes.of([function.__code__]).locals
    positional = code.co_varnames[: code.co_argcount][-len(function.__defaults__ or ()) :]
    defaults = zip(positional, function.__defaults__ or (), strict=False)
    named = {key: value for key, value in (function.__kwdefaults__ or {}).items() if key not in own}
    return _facts(code), values, [*(None if key in own else _value(value) for key, value in defaults), _value(named)]


@dataclasses.dataclass(frozen=True)
class _Writes:
    """What code writes into: names of globals and of closures, its own locals, and attributes of either."""

    names: frozenset[str]
    locals: frozenset[str]
    attributes: frozenset[str]

    @classmethod
    def of(cls, codes: Iterable[CodeType]) -> "_Writes":
        """Of all these code objects and their inner ones."""
        targets = [target for code in codes for target in _written(code)]
        kinds = ("name", "local", "attribute")
        return cls(*(frozenset(name for kind, name in targets if kind == wanted) for wanted in kinds))


def _written(code: CodeType) -> Iterator[tuple[str, str]]:
    """(kind, name) of every target: `x` of `x[k] = v`, `x.k = v`, `x.update(...)` and `global x; x = v`.

    An instruction that writes has the position of its whole target, which begins where the target's name does.
    """
    starts: dict[Any, list[dis.Instruction]] = defaultdict(list)  # the loads that begin at one place of the source
    for step in dis.get_instructions(code):
        at = (step.positions.lineno, step.positions.col_offset) if step.positions else (None, None)
        if step.opname in ("STORE_GLOBAL", "DELETE_GLOBAL") or (
            step.opname in ("STORE_DEREF", "DELETE_DEREF") and step.argval in code.co_freevars
        ):
            yield "name", step.argval
        elif step.opname.startswith("LOAD_") and not _changes(step):
            starts[at].append(step)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_ATTR") or _changes(step):
            if at[1] is None:  # Python was told to keep no columns
                continue
            yield from _roots(starts[at], code)
            if step.opname == "STORE_ATTR" and any(load.opname == "LOAD_GLOBAL" for load in starts[at]):
                yield "attribute", step.argval
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _written(const)


def _changes(step: dis.Instruction) -> bool:
    """Whether it takes up a method that changes its object: a dict's, or one of torch's with an underscore."""
    if step.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
        return False
    name = str(step.argval)
    return name in ("update", "setdefault", "pop", "popitem", "clear") or (name[-1:] == "_" and name[-2:] != "__")


def _roots(loads: list[dis.Instruction], code: CodeType) -> Iterator[tuple[str, str]]:
    for load in loads:
        if load.opname in ("LOAD_GLOBAL", "LOAD_NAME") or (
            load.opname == "LOAD_DEREF" and load.argval in code.co_freevars
        ):
            yield "name", load.argval
        elif load.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield "attribute", load.argval
        elif load.opname.startswith("LOAD_FAST"):
            yield "local", load.argval


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
        elif "__wrapped__" in getattr(thing, "__dict__", {}):  # and not what `__getattr__` makes up
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


def _value(value: Any, above: tuple[int, ...] = ()) -> str | None:
    """A value that decides what a function does, as text; None where it is none of those that are followed.

    Args:
        above: what holds it, by identity.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()  # any dtype, bfloat16 too
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if id(value) in above:
        return "one that holds it"
    above = (*above, id(value))
    if isinstance(value, tuple):
        return repr([_value(part, above) for part in value])
    if isinstance(value, dict):
        return repr([(_key(key), _value(part, above)) for key, part in value.items()])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return repr([(field.name, _value(getattr(value, field.name, None), above)) for field in fields])
    return None


def _key(key: Any) -> str:
    """A dict's key as text, without what is of one process, such as a function's address."""
    return str(getattr(key, "__qualname__", None) or repr(key))


def _hash(*data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()[:12]
