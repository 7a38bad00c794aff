"""The transfer door around its ladder: what it refuses before any run, what it reuses, what it says.

No model is trained here: a run's loss is a parabola around `BEST`, the same at every width.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mutune.certificate import ladder
from mutune.certificate.ladder import LadderRun
from mutune.training.run import RunResult
from mutune.transfer import main
from tests import doors, studies

BEST = studies.RATE
TARGET = ["study=mine", "target=small", "target.model.width=32", "target.model.depth=2"]
TARGET += ["target.stages=[{context_length: 64, batch_sequences: 4, num_steps: 20}]"]
LADDER = ["ladder.widths=[32]", "ladder.offsets=[-1,0,1]", "ladder.seeds=2"]


class Training:
    """Stands for the worker processes: makes up every result, and remembers what was run."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(
        self, function: Callable[..., Any], runs: Sequence[LadderRun], workers: int, tick: Callable[..., None]
    ) -> Iterator[tuple[LadderRun, RunResult]]:
        for run in runs:
            octaves = math.log2(run.spec.hyperparameters.learning_rate / BEST)
            self.ran.append(run.directory.name)
            run.directory.mkdir(parents=True, exist_ok=True)
            yield run, RunResult(4.0 + 0.2 * octaves**2, False, 2.0, 20, 1.0)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    fake = Training()
    monkeypatch.setattr(ladder, "run_all", fake)
    return fake


@pytest.fixture
def study(out: Path) -> Path:
    return studies.write_study(out, "mine")


def transfer(out: Path, *arguments: str, expect: int = 0) -> Path:
    assert main([*TARGET, *LADDER, f"out={out}", *arguments]) == expect
    return out / "transfer" / "mine--small"


def certificate(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "certificate.json").read_text()))


REFUSED = [
    (["ladder.widths=[40]"], "ladder.widths=[40]: the study's head size of 16 does not divide 40; for example"),
    (["ladder.widths=[16]"], "ladder.widths=[16] holds only the study's own width; for example ladder.widths=[32,64]."),
    (["ladder.widths=[1000000]"], "choose a smaller ladder.widths or ladder.workers"),
    (["ladder.seeds=100000000000"], "ladder.seeds=100000000000 must be"),
    (["seed=2147483647"], "seed=2147483647 and ladder.seeds=2 go beyond the largest seed, 2147483647"),
    (["target.data={source: text, path: no.txt}"], "no.txt does not exist"),
    (["target.stages=[{context_length: 100000000}]"], "target.stages[0].context_length=100000000 does not fit into"),
    (["study=../sweeps/mine"], "study=../sweeps/mine must be a plain folder name"),
]


@pytest.mark.parametrize(("arguments", "sentence"), REFUSED, ids=[" ".join(a)[:40] for a, _ in REFUSED])
def test_a_ladder_that_cannot_be_run_is_refused_before_anything_is_written(
    arguments: list[str],
    sentence: str,
    out: Path,
    study: Path,
    training: Training,
    capsys: pytest.CaptureFixture[str],
) -> None:
    transfer(out, *arguments, expect=2)
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert captured.err.count("\n") == 1
    assert not (out / "transfer").exists()
    assert training.ran == []


def test_a_dry_run_refuses_the_same_and_writes_nothing(out: Path, study: Path, training: Training) -> None:
    transfer(out, "ladder.widths=[40]", "dry_run=true", expect=2)
    transfer(out, "dry_run=true")
    assert not (out / "transfer").exists()
    assert training.ran == []


def test_more_seeds_and_widths_keep_the_rungs_that_are_there(out: Path, study: Path, training: Training) -> None:
    folder = transfer(out, "ladder.seeds=1")
    assert [rung["seeds"] for rung in certificate(folder)["rungs"]] == [1, 1]
    first = set(training.ran)
    transfer(out)
    assert len(training.ran) == len(set(training.ran)) == 2 * len(first)  # only the second seed was run
    assert [rung["seeds"] for rung in certificate(folder)["rungs"]] == [2, 2]


def test_a_ladder_folder_holds_the_runs_of_its_certificate_and_the_others_are_kept_aside(
    out: Path, study: Path, training: Training
) -> None:
    folder = transfer(out, "ladder.widths=[32,48]")
    transfer(out)
    assert not list((folder / "ladder").glob("w48_*"))
    assert len(list((folder / "spare").glob("w48_*"))) == 6
    transfer(out, "ladder.widths=[32,48]")
    assert len(training.ran) == 18  # nothing was run twice
    assert not list((folder / "spare").iterdir())


def test_overwriting_with_another_target_keeps_the_rungs(out: Path, study: Path, training: Training) -> None:
    folder = transfer(out)
    transfer(out, "target.model.depth=4", expect=2)
    transfer(out, "target.model.depth=4", "overwrite=true")
    assert len(training.ran) == 12
    assert yaml.safe_load((folder / "transfer.yaml").read_text())["target"]["model"]["depth"] == 4


def test_overwriting_with_other_values_runs_the_ladder_again(out: Path, study: Path, training: Training) -> None:
    transfer(out)
    transfer(out, "hyperparameters.init_std=0.1", "overwrite=true")
    assert len(training.ran) == 24


@pytest.mark.parametrize("text", ["null", "[]", "{", '{"fingerprint": "x"}', "3"])
def test_a_damaged_result_is_made_again_and_no_other(text: str, out: Path, study: Path, training: Training) -> None:
    folder = transfer(out)
    broken = sorted((folder / "ladder").iterdir())[3]
    (broken / "result.json").write_text(text)
    transfer(out)
    assert training.ran[12:] == [broken.name]


def test_the_seed_of_a_transfer_is_that_of_its_ladder(out: Path, study: Path, training: Training) -> None:
    folder = transfer(out, "seed=5")
    assert {name.rpartition("_s")[2] for name in training.ran} == {"5", "6"}
    transfer(out, "seed=6")
    assert len(training.ran) == 18  # seed 6 was there
    assert {point["seed"] for point in certificate(folder)["rungs"][0]["points"]} == {6, 7}


def test_the_optimum_is_compared_with_the_rate_that_is_transferred(out: Path, study: Path, training: Training) -> None:
    offsets = "ladder.offsets=[-3,-2,-1,0,1]"
    good = certificate(transfer(out, offsets))
    assert good["verdict"] == "GO"
    wrong = transfer(out, offsets, f"hyperparameters.learning_rate={4 * BEST}", "overwrite=true")
    assert certificate(wrong)["verdict"] == "NO-GO"
    assert certificate(wrong)["drift"]["distance"] == pytest.approx(-2, abs=0.1)


def test_figures_that_cannot_be_drawn_do_not_stand_in_the_way(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = transfer(out)  # the made-up runs have no records
    captured = capsys.readouterr()
    assert "figures    not made: there are no runs in" in captured.err
    assert f"written    {folder}/: transfer.yaml, certificate.md" in captured.out


@pytest.mark.parametrize(
    ("keys", "value", "sentence"),
    [
        (["hyperparameters", "learning_rate"], 0.5, "transfer another value with hyperparameters.learning_rate=0.5"),
        (["params"], {"learning_rte": 0.5}, "differ in params.learning_rate"),
        (["params"], [], "params=[] must be a group of keys"),
    ],
)
def test_best_values_that_were_edited_are_not_transferred(
    keys: list[str],
    value: object,
    sentence: str,
    out: Path,
    study: Path,
    training: Training,
    capsys: pytest.CaptureFixture[str],
) -> None:
    doors.edit_yaml(study / "best.yaml", *keys, value=value)
    transfer(out, expect=2)
    assert sentence in capsys.readouterr().err
    assert not (out / "transfer").exists()


def test_a_study_whose_config_was_damaged_is_refused_by_name(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    doors.edit_yaml(study / "config.yaml", "inputs", "config", value={"modle": 3})
    transfer(out, expect=2)
    assert "study=mine: its config.yaml is damaged (unknown key modle;" in capsys.readouterr().err


def test_a_text_that_changed_since_the_study_is_refused(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    doors.edit_yaml(study / "config.yaml", "inputs", "data_hash", value="0123456789abcdef")
    transfer(out, expect=2)
    assert "has changed since the study (0123456789ab →" in capsys.readouterr().err
