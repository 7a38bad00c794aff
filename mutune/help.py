"""What `--help` prints: each key of a command with its default and its meaning, from the docstring of its dataclass."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from mutune.compose import choices, compose, data_dir, plain, sweep_files

EXIT_CODES = "exit codes: 0 done, 1 failed while working, 2 refused, 3 not GO (require_go=true), 130/143 after a signal"
NARROWEST, WIDEST, MEANINGS_AT = 60, 120, 34
_ENTRY = re.compile(r" {4}(\w+(?:, \w+)*): (.*)")


def help_text(door: str, schema: type, about: str, groups: Sequence[str]) -> str:
    """The help of one command.

    Args:
        door: its name, as in `python -m mutune.<door>`.
        schema: its configuration's dataclass.
        about: the docstring of its module, with examples.
        groups: the config groups it has.
    """
    columns = min(max(shutil.get_terminal_size((100, 24)).columns, NARROWEST), WIDEST)
    chosen = _chosen(door)
    known = [(f"{group}=", _marked(choices(group), chosen[group])) for group in groups]
    if door == "sweep":
        known.insert(0, ("+sweep=", ", ".join(sorted(sweep_files()))))
    return "\n".join(
        [
            f"python -m mutune.{door} [key=value ...]",
            "",
            *_about(about, columns),
            "",
            *(["choices:", *(_row(name, text, 2, columns) for name, text in known), ""] if known else []),
            "keys, their defaults and what they mean (inside a group: group.key=value):",
            *_rows(compose(door, schema, []), 2, columns),
            "",
            textwrap.fill(EXIT_CODES, columns),
        ]
    )


def meanings(cls: type) -> dict[str, str]:
    """Field → meaning, from the `Attributes:` of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        names: list[str] = []
        for line in inspect.cleandoc(part.__doc__ or "").partition("Attributes:\n")[2].splitlines():
            if entry := _ENTRY.fullmatch(line):
                names = entry[1].split(", ")
                found |= dict.fromkeys(names, entry[2])
            elif line.startswith(" "):
                found |= {name: f"{found[name]} {line.strip()}" for name in names}
            else:
                names = []
    return found


def _about(text: str, columns: int) -> Iterator[str]:
    """A module's docstring at this width; a paragraph with indented lines, as of examples, stays as it is."""
    for number, paragraph in enumerate(inspect.cleandoc(text).split("\n\n")):
        as_it_is = "\n " in paragraph
        yield ("\n" if number else "") + (paragraph if as_it_is else textwrap.fill(paragraph, columns))


def _rows(config: Any, indent: int, columns: int) -> Iterator[str]:
    """The keys of a dataclass; a group follows its heading, after the keys that are none."""
    told = meanings(type(config))
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name, value in sorted(values.items(), key=lambda item: dataclasses.is_dataclass(item[1])):
        if not dataclasses.is_dataclass(value):
            yield _row(f"{name}={_yaml(value)}", told.get(name, ""), indent, columns)
            yield from _items(type(config), name, indent + 2, columns)
            continue
        yield ""
        yield _row(f"{name}:", told.get(name) or _first_line(type(value)), indent, columns)
        yield from _rows(value, indent + 2, columns)


def _items(cls: type, name: str, indent: int, columns: int) -> Iterator[str]:
    """The keys of each item, where a key holds a list of groups."""
    hint = typing.get_type_hints(cls)[name]
    if typing.get_origin(hint) is list and dataclasses.is_dataclass(item := typing.get_args(hint)[0]):
        yield from _rows(typing.cast(type, item)(), indent, columns)


def _row(key: str, meaning: str, indent: int, columns: int) -> str:
    """`key` and its meaning in two columns; a key that is too long has the meaning below it."""
    meaning = re.sub(r"\bNone\b", "null", meaning)  # as it is written on a command line
    head = textwrap.fill(" " * indent + key, columns, subsequent_indent=" " * (indent + 4), break_on_hyphens=False)
    margin = " " * MEANINGS_AT
    body = textwrap.wrap(meaning, columns, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    if body and len(head) <= MEANINGS_AT - 2:
        body[0] = head + body[0][len(head) :]
        return "\n".join(body)
    return "\n".join([head, *body])


def _yaml(value: Any) -> str:
    """A default as it would be typed."""
    if isinstance(value, float) and value >= 1e6:
        return f"{value:g}"
    if isinstance(value, list):
        value = [plain(item) if dataclasses.is_dataclass(item) else item for item in value]
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("...\n").strip()


def _first_line(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").partition("\n")[0]


def _chosen(door: str) -> dict[str, str]:
    """Group → the choice that `conf/<door>.yaml` makes."""
    defaults = yaml.safe_load((data_dir("conf") / f"{door}.yaml").read_text())["defaults"]
    return {group: name for entry in defaults if isinstance(entry, dict) for group, name in entry.items()}


def _marked(names: Sequence[str], chosen: str) -> str:
    return ", ".join(f"{name} (default)" if name == chosen else name for name in names)
