"""What a study leaves for others: its best values, beside the inputs that made them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from mutune.errors import Refusal
from mutune.files import read_yaml, write_yaml
from mutune.folders import CONFIG

BEST = "best.yaml"


@dataclass(frozen=True)
class StoredStudy:
    """A study on disk: its name, its configuration as plain data, the hash of its data, and its best trial."""

    name: str
    directory: Path
    config: dict[str, Any]
    data_hash: str
    best: dict[str, Any]
    versions: dict[str, str]


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
        raise Refusal(
            f"study={name} does not exist in {sweeps} ({have}); run python -m mutune.sweep +sweep=proxy first."
        )
    if not (directory / BEST).is_file():
        raise Refusal(f"study={name} has no finished trial yet; run python -m mutune.sweep with study={name} first.")
    stored, best = read_yaml(directory / CONFIG, "study's config"), read_yaml(directory / BEST, "study's best values")
    try:
        return StoredStudy(
            name, directory, stored["inputs"]["config"], stored["inputs"]["data_hash"], best, stored["versions"]
        )
    except KeyError as error:
        raise Refusal(
            f"study={name}: {directory / CONFIG} lacks {error}; run its sweep again with overwrite=true."
        ) from None
