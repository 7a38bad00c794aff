"""What a study leaves for others: its inputs (to be compared at the next start) and its best values."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from mutune.errors import Refusal
from mutune.files import read_yaml, write_yaml
from mutune.versions import versions

CONFIG, BEST = "config.yaml", "best.yaml"


@dataclass(frozen=True)
class StoredStudy:
    """A study on disk: its name, its configuration as plain data, the hash of its data, and its best trial."""

    name: str
    directory: Path
    config: dict[str, Any]
    data_hash: str
    best: dict[str, Any]
    versions: dict[str, str]


def claim(directory: Path, config: Mapping[str, Any], data_hash: str, overwrite: bool) -> None:
    """Make `directory` this study's, or check that it already is.

    Args:
        config: everything that decides the trials, as plain data.

    Raises:
        Refusal: it holds a study with other inputs, and `overwrite` is false; the first difference is named.
    """
    path = directory / CONFIG
    if path.exists() and not overwrite:
        stored = read_yaml(path, "study's config")
        differing = differences({**stored["study"], "data_hash": stored["data_hash"]}, {**config, "data_hash": data_hash})
        if differing:
            raise Refusal(
                f"study {directory} exists with other inputs: {'; '.join(differing)}; "
                f"choose another study=NAME or replace it with overwrite=true."
            )
        return
    if overwrite:
        clear(directory)
    write_yaml(path, {"study": dict(config), "data_hash": data_hash, "versions": versions()})


def clear(directory: Path) -> None:
    """Remove what a study left in its folder, keeping the lock that is held on it."""
    for entry in directory.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != ".lock":
            entry.unlink()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for every leaf in which two nested mappings differ."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {'absent' if key not in old else before} → {'absent' if key not in new else after}")
    return found


def write_best(directory: Path, name: str, best: FrozenTrial, hyperparameters: Mapping[str, Any]) -> None:
    """Write `best.yaml`: the best trial's base hyperparameters, its number and its losses."""
    data = {
        "study": name,
        "trial": best.number,
        "heldout_loss": best.value,
        "heldout_bits_per_byte": best.user_attrs["bits_per_byte"],
        "searched": sorted(best.params),
        "params": dict(best.params),
        "hyperparameters": dict(hyperparameters),
    }
    write_yaml(directory / BEST, data, "base hyperparameters of the best finished trial; losses in nats per token")


def load_study(sweeps: Path, name: str) -> StoredStudy:
    """Read a study that has a best trial.

    Raises:
        Refusal: it does not exist, or has no finished trial yet; the known ones are listed.
    """
    directory = sweeps / name
    if not (directory / CONFIG).is_file():
        known = sorted(path.parent.name for path in sweeps.glob(f"*/{CONFIG}"))
        have = f"studies there: {', '.join(known)}" if known else "there are none yet"
        raise Refusal(f"study={name} does not exist in {sweeps} ({have}); run python -m mutune.sweep +sweep=proxy first.")
    if not (directory / BEST).is_file():
        raise Refusal(f"study={name} has no finished trial yet; run python -m mutune.sweep with study={name} first.")
    stored, best = read_yaml(directory / CONFIG, "study's config"), read_yaml(directory / BEST, "study's best values")
    try:
        return StoredStudy(name, directory, stored["study"], stored["data_hash"], best, stored["versions"])
    except KeyError as error:
        raise Refusal(f"study={name}: {directory / CONFIG} lacks {error}; run its sweep again with overwrite=true.") from None
