"""A ladder's runs: what each is, and where it lies. What fits them is not needed to make them, nor loaded."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutune.errors import Refusal
from mutune.files import read_yaml
from mutune.folders import CONFIG
from mutune.search.once import Once, fingerprint
from mutune.search.workers import saving
from mutune.training.config import RunSpec
from mutune.training.result import RunResult
from mutune.versions import versions


@dataclass(frozen=True)
class LadderRun:
    """One training run of the ladder.

    Attributes:
        rung: its name, in what it differs from the base.
        offset: octaves from the transferred learning rate.
    """

    rung: str
    offset: float
    spec: RunSpec
    directory: Path
    device: str
    data_hash: str

    def __str__(self) -> str:
        return f"ladder run {self.directory.name}"

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides its losses."""
        return fingerprint(self.spec.as_dict(), self.data_hash)

    @property
    def note(self) -> dict[str, Any]:
        """What its records say it belongs to; a rung of widths is named by its width."""
        width = self.spec.model.width
        rung = width if self.rung == f"w{width}" else self.rung
        return {"rung": rung, "offset": self.offset, "device": self.device}


def made_here(run: LadderRun) -> bool:
    """Whether a finished run was made by the present code and libraries, on its kind of device."""
    try:
        facts = read_yaml(run.directory / CONFIG, "run's config")
    except (OSError, Refusal):
        return False
    return facts.get("versions") == versions() and facts.get("device") == run.device


def gather(runs: Sequence[Once], ladder: Path, spare: Path) -> None:
    """Let `ladder` hold these runs alone: what another ladder left goes to `spare`, and comes back when asked for."""
    wanted = {run.directory.name for run in runs}
    for folder in list(ladder.glob("*/")):
        if folder.name not in wanted:
            _move(folder, spare / folder.name)
    for folder in list(spare.glob("*/")):
        if folder.name in wanted and not (ladder / folder.name).exists():
            _move(folder, ladder / folder.name)


def _move(folder: Path, place: Path) -> None:
    if place.exists():
        shutil.rmtree(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(place)


def train_rung(run: LadderRun) -> RunResult:
    """One run of the ladder; a worker's whole job."""
    from mutune.training.run import run_to_end

    with saving() as stop:
        return run_to_end(run.spec, run.directory, run.device, run.note, stop=stop)
