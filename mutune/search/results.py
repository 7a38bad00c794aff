"""What a study leaves for others: its best values, beside the inputs that made them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial

from mutune.compose import build, written
from mutune.errors import Refusal
from mutune.files import read_yaml, write_yaml
from mutune.folders import CONFIG
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.training.schedule import ScheduleConfig

BEST = "best.yaml"
OWN_MODEL = "own_model"  # the key under which the config of a study of a user's own model describes it


@dataclass(frozen=True)
class Confirmed:
    """A leader that was run again: its held-out losses by seed, the search's own first.

    Attributes:
        standard_error: of the mean, the spread over seeds pooled over all leaders.
        tied: whether nothing tells its mean from the lowest.
    """

    trial: int
    losses: list[float]
    mean: float
    standard_error: float
    bits_per_byte: float | None
    tied: bool

    def __str__(self) -> str:
        same = ", not told from the lowest" if self.tied else ""
        return (
            f"trial {self.trial}: mean {self.mean:.4f} ± {self.standard_error:.4f} over {len(self.losses)} seeds{same}"
        )


@dataclass(frozen=True)
class BestValues:
    """`best.yaml`: the best trial's number, losses, searched parameters, and all its base hyperparameters.

    Losses are held-out ones, in nats per token and in bits per byte; a user's own model has its own unit, and no bytes.
    `schedule` is the best trial's, every length a ratio of the run wherever the study gave it so; None for a user's own
    loop. Where leaders were run again, they are the chosen one's means over seeds, and `confirmed` has all leaders.
    """

    study: str
    trial: int
    heldout_loss: float
    heldout_bits_per_byte: float | None
    searched: list[str]
    params: dict[str, Any]
    hyperparameters: BaseHyperparameters
    schedule: ScheduleConfig | None = None
    confirmed: list[Confirmed] = field(default_factory=list)


@dataclass(frozen=True)
class StoredStudy:
    """A study on disk: its name, its configuration as plain data, the hash of its data, its best trial, its code."""

    name: str
    directory: Path
    config: dict[str, Any]
    data_hash: str
    best: BestValues
    commit: str


def write_best(
    directory: Path,
    name: str,
    best: FrozenTrial,
    hyperparameters: BaseHyperparameters,
    schedule: ScheduleConfig | None = None,
    confirmed: Sequence[Confirmed] = (),
) -> None:
    """Write `best.yaml`; `confirmed` has the best trial first."""
    assert best.value is not None
    assert not confirmed or confirmed[0].trial == best.number
    values = BestValues(
        study=name,
        trial=best.number,
        heldout_loss=confirmed[0].mean if confirmed else best.value,
        heldout_bits_per_byte=confirmed[0].bits_per_byte if confirmed else best.user_attrs["bits_per_byte"],
        searched=sorted(best.params),
        params=dict(best.params),
        hyperparameters=hyperparameters,
        schedule=schedule,
        confirmed=list(confirmed),
    )
    unit = "" if values.heldout_bits_per_byte is None else "; losses in nats per token"
    write_yaml(directory / BEST, written(values), f"base hyperparameters of the best finished trial{unit}")


def read_best(directory: Path) -> BestValues:
    """What `best.yaml` says.

    Raises:
        Refusal: it is damaged.
    """
    return build(BestValues, read_yaml(directory / BEST, "study's best values"))


def load_study(sweeps: Path, name: str) -> StoredStudy:
    """Read a study that has a best trial.

    Raises:
        Refusal: it does not exist, or has no finished trial yet (the known ones are listed), or one of its files is
            damaged.
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
    stored = read_yaml(directory / CONFIG, "study's config")
    if isinstance(stored.get("inputs"), dict) and OWN_MODEL in stored["inputs"]:
        raise Refusal(
            f"study={name} searched a model that only its author's code can build; its ladder is that of "
            "mutune.search.run, for example with widths=[128,256]."
        )
    try:
        inputs, commit = stored["inputs"], stored["versions"]["commit"]
        config, data_hash = inputs["config"], str(inputs["data_hash"])
    except (KeyError, TypeError) as error:
        raise Refusal(
            f"study={name}: {directory / CONFIG} is damaged ({error}); restore it, or remove {directory} and run the "
            "sweep again."
        ) from None
    try:
        values = read_best(directory)
    except Refusal as refusal:
        raise Refusal(f"study={name}: {directory / BEST} is damaged ({refusal}); run its sweep again.") from refusal
    return StoredStudy(name, directory, config, data_hash, values, str(commit))


def check_best(
    study: StoredStudy, searched: Collection[str], hyperparameters: BaseHyperparameters, schedule: ScheduleConfig
) -> None:
    """Refuse best values that were edited: they must be what the search found.

    Args:
        searched: the names in the study's space.
        hyperparameters, schedule: those that the best trial's parameters give.
    """
    path, best = study.directory / BEST, study.best
    odd = sorted(set(best.params) ^ set(searched))
    if odd:
        raise Refusal(f"{path} and the study's space differ in params.{odd[0]}; run the sweep again to write it anew.")
    for name, value in hyperparameters.as_dict().items():
        said = getattr(best.hyperparameters, name)
        if said != value:
            raise Refusal(
                f"{path} says hyperparameters.{name}={said}, but trial {best.trial} had {value}; leave that file alone "
                f"and transfer another value with hyperparameters.{name}={said}."
            )
    if best.schedule is not None and best.schedule != schedule:
        raise Refusal(
            f"{path} says schedule={best.schedule}, but trial {best.trial} had {schedule}; leave that file alone and "
            "transfer another schedule with target.schedule.kind=linear."
        )
