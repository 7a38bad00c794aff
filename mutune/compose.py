"""Where YAML meets Python: Hydra composes plain values, and `build` turns them into a room's dataclasses.

A key exists because a dataclass has it. Every default is the dataclass's own; the YAML under `conf/` and `sweeps/`
only chooses. Nothing below a door knows Hydra or OmegaConf.
"""

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from mutune.errors import Refusal, shown

T = TypeVar("T")

#: Groups whose keys a user chooses → how one is added.
FREE = {
    "search.space": "~search.space.learning_rate '+search.space.learning_rate={values: [0.01, 0.02]}'",
    "resources": "+resources.timeout_min=60",
}
_NAMES = {int: "a whole number", float: "a number", str: "a word", bool: "true or false"}
LATER = "later"  # of a field's metadata
MANY = 20  # keys that are not listed one by one
_EXAMPLES = {int: "32", float: "0.01", str: "runs", bool: "true"}


def data_dir(name: str) -> Path:
    """`conf` or `sweeps`: inside the installed package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / name, here.parent / name) if path.is_dir())


def build(cls: type[T], data: Any, key: str = "") -> T:
    """Plain data → dataclass, strictly.

    Args:
        cls: a dataclass, whose fields may be dataclasses, lists, dicts, scalars, or any of these or None.
        data: mappings, lists and scalars.
        key: the key of `data` itself, for messages.

    Raises:
        Refusal: an unknown key, a value of the wrong type, or a value that the dataclass itself refuses.
    """
    if not isinstance(data, dict):
        raise Refusal(f"{key}={shown(data)} must be a group of keys ({', '.join(_field_names(cls))}).")
    hints = typing.get_type_hints(cls)
    for name in data:
        if name not in hints:
            raise Refusal(unknown_key(_join(key, str(name)), [_join(key, known) for known in hints]))
    for field in dataclasses.fields(typing.cast(Any, cls)):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            raise Refusal(f"{_join(key, field.name)} is missing; write it again with the command that made the file.")
    examples = {field.name: field.default for field in dataclasses.fields(typing.cast(Any, cls))}
    values = {n: _convert(hints[n], value, _join(key, n), examples[n]) for n, value in data.items()}
    try:
        return cls(**values)
    except Refusal as refusal:
        raise Refusal(_located(str(refusal), key)) from refusal


def plain(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts and lists, ready for YAML or JSON."""
    return typing.cast(dict[str, Any], _plain(dataclasses.asdict(config)))


def later() -> Any:
    """A field that is newer than files that lack it: None unless it is used, and then not in what `written` gives."""
    return dataclasses.field(default=None, metadata={LATER: True})


def written(config: Any) -> Any:
    """As `plain`, without the fields of `later` that are None: what is hashed and compared over versions of mutune."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        values = {field: getattr(config, field.name) for field in dataclasses.fields(config)}
        unused = [field for field, value in values.items() if value is None and field.metadata.get(LATER)]
        return {field.name: written(value) for field, value in values.items() if field not in unused}
    if isinstance(config, dict):
        return {key: written(item) for key, item in config.items()}
    if isinstance(config, (list, tuple)):
        return [written(item) for item in config]
    return config


def unknown_key(key: str, known: Sequence[str]) -> str:
    """The sentence for a key that no dataclass has."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    groups = list(dict.fromkeys(name.partition(".")[0] for name in known)) if len(known) > MANY else known
    more = "; --help tells what is below them" if groups is not known else ""
    hint = f"did you mean {close[0]}?" if close else f"known keys: {', '.join(groups)}{more}."
    return f"unknown key {key}; {hint}"


def compose(door: str, schema: type[T], overrides: Sequence[str]) -> T:
    """Compose a door's configuration from its defaults, `conf/`, `sweeps/` and the command line.

    Args:
        door: the name of its file under `conf/`.
        schema: the dataclass of the whole tree.
        overrides: `key=value` words in Hydra's grammar.

    Raises:
        Refusal: anything that cannot be composed, Hydra's own complaints included.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    store = ConfigStore.instance()
    store.store(name=f"{door}_defaults", node=plain(schema()))
    words = [_through_null(word, schema) for word in overrides]
    for name in _chosen_sweeps(overrides):
        if door != "sweep":
            raise Refusal(unknown_key("sweep", _all_keys(schema)))
        store.store(group="sweep", name=name, node=_load_sweep(name), package="_global_", provider=name)
    try:
        with initialize_config_dir(config_dir=str(data_dir("conf")), version_base="1.3"):
            composed = OmegaConf.to_container(hydra_compose(door, overrides=words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise Refusal(_sentence(error, schema)) from error
    except ValueError as error:  # of Python's own parser: a number of thousands of digits
        raise Refusal(f"the command line cannot be read ({error}); write key=value, for example seed=1.") from error
    return build(schema, composed)


def _through_null(override: str, schema: type) -> str:
    """An override of what may be null or lack keys, such as target.schedule: there Hydra has nothing to override, and
    `++` adds or overrides.
    """
    key, equals, _ = override.partition("=")
    cls: Any = schema
    for name in key.split(".") if equals else []:
        hint = typing.get_type_hints(cls).get(name)
        inner = [each for each in typing.get_args(hint) if each is not types.NoneType]
        if len(inner) == 1 and isinstance(hint, types.UnionType) and dataclasses.is_dataclass(inner[0]):
            return f"++{override}"
        if not dataclasses.is_dataclass(hint):
            break
        cls = hint
    return override


def sweep_files() -> dict[str, Path]:
    """Name → file of every known sweep; those in `./sweeps` of the working directory shadow ours."""
    folders = [data_dir("sweeps"), Path.cwd() / "sweeps"]
    paths = [path for folder in folders if folder.is_dir() for path in sorted(folder.glob("*.yaml"))]
    return {path.stem: path for path in paths if path.is_file()}


def choices(group: str) -> list[str]:
    """The files of a config group under `conf/`."""
    return sorted(path.stem for path in (data_dir("conf") / group).glob("*.yaml"))


def _chosen_sweeps(overrides: Sequence[str]) -> list[str]:
    """The names in `+sweep=NAME`: only what is chosen is read, so that another file in `./sweeps` is no concern."""
    words = [override.partition("=") for override in overrides]
    return [value.strip("'\"") for key, _, value in words if key.lstrip("+") == "sweep"]


def _load_sweep(name: str) -> dict[str, Any]:
    files = sweep_files()
    if name not in files:
        raise Refusal(f"unknown sweep '{shown(name)}'; known: {', '.join(sorted(files))}.")
    path = files[name]
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refusal(f"the sweep file {path} is not valid YAML; mend or remove it.") from error
    if not isinstance(data, dict):
        raise Refusal(f"the sweep file {path} holds no keys; write at least `study: {path.stem}` into it.")
    return data


def _located(message: str, key: str) -> str:
    """A room's message names its keys below the room's own name; put the key in this tree in its place."""
    room, dot, _ = message.partition(".")
    return message.replace(f"{room}.", f"{key}.") if key and dot and room.isidentifier() else message


def _sentence(error: Exception, schema: type) -> str:
    """One sentence out of Hydra's paragraph."""
    text = " ".join(str(error).replace("\t", " ").split())
    if text.startswith("Could not override '") and "No match in the defaults list" in text:
        group = text.split("'")[1]
        return f"{group} is added, not overridden: write +{group}=... (known: {', '.join(_known(group))})."
    if text.startswith("Could not override '"):
        return _not_overridden(text.split("'")[1], error.__cause__, _all_keys(schema))
    if "Could not find '" in text:
        group, _, name = text.split("Could not find '")[1].split("'")[0].rpartition("/")
        return f"unknown {group} '{name}'; known: {', '.join(_known(group))}."
    if "Could not append" in text:
        key = text.split("'")[1]
        return f"{key} exists already; write {key}=... without the plus sign."
    cause = f" ({' '.join(str(error.__cause__).split())})" if error.__cause__ else ""
    return (
        f"the command line cannot be read: {text.split(' See https')[0]}{cause}; write key=value, for example seed=1."
    )


def _not_overridden(key: str, cause: BaseException | None, known: Sequence[str]) -> str:
    """The sentence for a key that is not there, or for one that is, set to a group with a key that is not there."""
    missing = str(getattr(cause, "full_key", None) or key)
    example = next((example for free, example in FREE.items() if missing.startswith(f"{free}.")), None)
    if example is None:
        return unknown_key(missing, known)
    return (
        f"{missing} is not there yet, so it is added: write +{missing}=... and take out what it replaces, "
        f"for example {example}."
    )


def _known(group: str) -> list[str]:
    return sorted(sweep_files()) if group == "sweep" else choices(group)


def _all_keys(cls: type, key: str = "") -> list[str]:
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        keys.append(_join(key, name))
        if dataclasses.is_dataclass(hint):
            keys += _all_keys(typing.cast(type, hint), _join(key, name))
    return keys


def _convert(hint: Any, value: Any, key: str, example: Any = dataclasses.MISSING) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        alike = [a for a in kinds if (typing.get_origin(a) in (list, tuple)) == isinstance(value, (list, tuple))]
        return _convert((alike or kinds)[0], value, key, example)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, key)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            works = f"[{shown(value)}]" if isinstance(value, (str, int, float)) else "[1,2]"
            raise Refusal(f"{key}={shown(value)} must be a list; for example {key}={works}.")
        return origin(_convert(arguments[0], item, f"{key}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise Refusal(f"{key}={shown(value)} must be a group of keys.")
        return {str(name): _convert(arguments[1], item, _join(key, str(name))) for name, item in value.items()}
    return _scalar(hint, value, key, example)


def _scalar(hint: type, value: Any, key: str, example: Any) -> Any:
    """`value` as a `hint`; `example` is the field's default, which works, where there is one."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= sys.float_info.max:
        return float(value)
    if hint is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a word
        try:
            return float(value)
        except ValueError:
            pass
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    works = str(example).lower() if isinstance(example, bool) else "null" if example is None else example
    works = works if isinstance(example, (hint, types.NoneType)) and works != "" else _EXAMPLES[hint]
    raise Refusal(f"{key}={shown(value)} must be {_NAMES[hint]}; for example {key}={works}.")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
