"""Writing files so that a reader sees the old content or the new, never half of it."""

import csv
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from mutune.errors import Refusal

#: libyaml's where PyYAML was built with it: seven times as fast, to the same values.
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text)
        fsync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_directory(path.parent)


def appended(path: Path) -> TextIO:
    """A file of lines to write more of them to, each at once; one that a kill cut is ended first."""
    cut = False
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            cut = file.read() != b"\n"
    opened = path.open("a", buffering=1)
    if cut:
        opened.write("\n")
    return opened


def csv_text(rows: Iterable[Mapping[str, object]]) -> str:
    """Rows of the same keys, at least one, as CSV with a header."""
    listed = list(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(listed[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return buffer.getvalue()


def write_json(path: Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_yaml(path: Path, data: Mapping[str, Any], comment: str = "") -> None:
    """Write `data` as YAML in its own key order, atomically, under an optional comment line."""
    head = f"# {comment}\n" if comment else ""
    write_text(path, head + yaml.dump(dict(data), Dumper=DUMPER, sort_keys=False, allow_unicode=True))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Read a YAML mapping with the safe loader.

    Raises:
        Refusal: the file is missing, is not YAML, or holds no mapping.
    """
    text = ""
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in (".yaml", ".yml"))
        works = f"for example {path / inside[-1]}" if inside else "check the path"
        raise Refusal(f"the {what} {path} is a folder; {works}.")
    try:
        text = path.read_text()
        data = yaml.load(text, LOADER)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"the {what} {path} cannot be read ({type(error).__name__}); check the path.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        lines = max(1, len(text.splitlines()))
        where = f" at line {min(mark.line + 1, lines)}" if mark else ""  # libyaml has the end one line further
        raise Refusal(f"the {what} {path} is not valid YAML{where}; write it again with its command.") from error
    if not isinstance(data, dict):
        raise Refusal(f"the {what} {path} holds no keys; write it again with its command.")
    return data


def require_writable(directory: Path) -> None:
    """Refuse an output folder in which nothing can be created; leaves nothing behind itself."""
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise Refusal(f"out={directory} cannot be used because {existing} is a file; for example out=runs.")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        why = f"{existing} is not writable ({error.strerror})"
        raise Refusal(f"out={directory} cannot be used because {why}; for example out=runs.") from error


def remove(path: Path) -> None:
    """Remove what is there, whatever it is; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def fsync_directory(path: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
