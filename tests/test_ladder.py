"""The transfer door around its ladder: what it refuses before any run, what it reuses, what it says.

No model is trained here: a run's loss is a parabola around `BEST`, the same at every width; under the table `sp` its
optimum falls by an octave per doubling.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mutune.certificate import climb
from mutune.certificate.ladder import LadderRun
from mutune.training.result import RunResult
from mutune.transfer import main
from tests import doors, studies

BEST = studies.RATE
TARGET = ["study=mine", "target=small", "target.model.width=32", "target.model.depth=2"]
TARGET += ["target.stages=[{context_length: 64, batch_sequences: 4, num_steps: 20}]"]
LADDER = ["ladder.widths=[32]", "ladder.offsets=[-1,0,1]", "ladder.seeds=2"]


class Training:
    """Stands for the worker processes: makes up every result, remembers what was run, and may die before a run."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dies_after: int | None = None
        self.diverges: str | None = None  # a table

    def __call__(self, function: Callable[..., Any], workers: int) -> "Training":
        return self

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(
        self, runs: Sequence[LadderRun], tick: Callable[..., None] = lambda running: None
    ) -> Iterator[tuple[LadderRun, RunResult]]:
        for run in runs:
            if len(self.ran) == self.dies_after:
                raise KeyboardInterrupt
            octaves = math.log2(run.spec.hyperparameters.learning_rate / BEST)
            if run.spec.parametrization.table == "sp":
                octaves += math.log2(run.spec.model.width / 16)
            self.ran.append(run.directory.name)
            run.directory.mkdir(parents=True, exist_ok=True)
            if run.spec.parametrization.table == self.diverges:
                yield run, RunResult(7.0, True, None, 3, 1.0)
                continue
            yield run, RunResult(4.0 + 0.2 * octaves**2, False, 2.0, 20, 1.0)


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    fake = Training()
    monkeypatch.setattr(climb, "Workers", fake)
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
    (["ladder.widths=[40]"], "ladder.widths=40: the study's head size of 16 does not divide 40; for example"),
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


DESIGNED = ["ladder.widths=null", "ladder.offsets=null", "ladder.seeds=null", "target.model.width=64"]
DESIGNED += ["target.stages=[{context_length: 64, batch_sequences: 8, num_steps: 40}]", "budget_fraction=4"]


def test_a_ladder_by_design_measures_width_and_tokens_within_its_budget(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = transfer(out, *DESIGNED)
    data = certificate(folder)
    assert {rung["width"] for rung in data["rungs"]} >= {16, 32, 64}
    assert len({rung["tokens"] for rung in data["rungs"]}) >= 3
    assert len(training.ran) == len(set(training.ran)) == sum(len(rung["points"]) for rung in data["rungs"])
    transfer(out, *DESIGNED)
    assert len(training.ran) == len(set(training.ran))  # a finished ladder runs nothing
    assert "ladder" in capsys.readouterr().err


def test_tables_are_compared_on_the_same_ladder_and_the_verdict_is_that_of_the_study_s_own(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    designed = [*DESIGNED, "target.stages=[{context_length: 64, batch_sequences: 4, num_steps: 20}]"]
    designed += ["budget_fraction=20"]
    transfer(out, *designed, "compare=[sp]", "dry_run=true")
    said = capsys.readouterr().out
    assert "ladder mup w16" in said
    assert "ladder sp  w16" in said
    folder = transfer(out, *designed, "compare=[sp,mup]")
    data = certificate(folder)
    assert data["table"] == "mup"
    assert data["verdict"] == certificate(transfer(out, *designed))["verdict"] == "GO"
    assert [row["table"] for row in data["comparison"]] == ["mup", "sp"]
    assert data["comparison"][1]["distance"] == pytest.approx(-2, abs=0.3)
    assert "transfers best, by expected regret: mup" in data["comparison_words"]
    assert list((folder / "compare" / "sp").glob("w32_*"))
    ran = len(training.ran)
    transfer(out, *designed, "compare=[sp]")
    assert len(training.ran) == ran  # nothing was run twice


def test_a_table_whose_base_cannot_be_measured_is_left_out_of_the_comparison_and_no_own_one(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    training.diverges = "sp"
    folder = transfer(out, *DESIGNED, "budget_fraction=20", "compare=[sp]")
    (note,) = [note for note in certificate(folder)["notes"] if "three" in note]
    assert note.startswith("fewer than three learning rates finished at the base of the ladder sp, around 0.0156")
    assert "comparison" not in certificate(folder)
    training.diverges = "mup"
    transfer(out, *DESIGNED, "hyperparameters.learning_rate=20", "overwrite=true", "budget_fraction=20", expect=1)
    assert (
        "take a lower hyperparameters.learning_rate, or leave it out to have the study's best"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compare=[]"], "compare=[] names no table; for example compare=[mup,sp]."),
        (["compare=[sp,sp]"], "compare=['sp', 'sp'] repeats a table"),
        (["compare=[spp]"], "has an unknown table; known tables: btlm, completep, mup"),
        (["compare=[sp]", "study=published"], "runs ladders of a study; for example study=proxy"),
        (["compare=[sp]", "runs=x.csv"], "runs ladders of a study; for example study=proxy"),
        (["compare=[mup_table3]"], "the study's run cannot be one of mup_table3 ("),
        (["budget_minutes=1", "runs=x.csv"], "budget_minutes=1.0 limits the ladder of a study, and there is none here"),
        (["budget_fraction=1", "study=published"], "leave it out, or take a study, for example study=proxy."),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused(
    arguments: list[str], sentence: str, out: Path, study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transfer(out, *arguments, expect=2)
    assert sentence in capsys.readouterr().err


def test_a_ladder_stops_early_where_its_verdict_is_clear_and_says_so(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    designed = [*DESIGNED, "target.stages=[{context_length: 64, batch_sequences: 4, num_steps: 20}]"]
    designed += ["budget_fraction=20"]
    folder = transfer(out, *designed)
    said = capsys.readouterr()
    assert certificate(folder)["verdict"] == "GO"
    assert f"stopped early, after {len(training.ran)} runs" in said.out
    assert "ladder: rung w64, 5 runs, lowest mean loss 4.0000 at 0.0156" in said.err
    assert {rung["width"] for rung in certificate(folder)["rungs"]} == {16, 32, 64}


def test_what_no_run_can_certify_is_said_before_any_run(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = ["target.stages=[{context_length: 64, batch_sequences: 64, num_steps: 20}]", "budget_fraction=2"]
    transfer(out, *DESIGNED, *huge, "dry_run=true")
    said = capsys.readouterr().out
    reason = "batch: the target's 4,096 is 4.0 doublings from the proxy's 256, unmeasured"
    assert "foreseen   NOT CERTIFIED, if not NO-GO, whatever the ladder finds:\n           - " in said
    assert f"           - {reason}\n" in said
    data = certificate(transfer(out, *DESIGNED, *huge))
    assert data["verdict"] == "NOT CERTIFIED"
    assert reason in data["reasons"]
    capsys.readouterr()
    transfer(out, *DESIGNED, *huge, "ladder=[width,tokens,batch]", "dry_run=true")
    assert "batch: the target" not in capsys.readouterr().out


@pytest.mark.parametrize("after", [0, 3, 8, 21])
def test_a_ladder_that_was_killed_goes_on_to_what_it_would_have_been(
    after: int, tmp_path: Path, training: Training
) -> None:
    outs = [tmp_path / "undisturbed", tmp_path / "killed"]
    for out in outs:
        studies.write_study(out, "mine")
    folder = transfer(outs[0], *DESIGNED)
    undisturbed, training.ran = sorted(training.ran), []
    training.dies_after = after
    transfer(outs[1], *DESIGNED, expect=130)
    training.dies_after = None
    again = transfer(outs[1], *DESIGNED)
    assert sorted(training.ran) == undisturbed
    assert certificate(again)["rungs"] == certificate(folder)["rungs"]
    assert certificate(again)["verdict"] == certificate(folder)["verdict"]


def test_axes_are_named_in_short(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    for word, rungs in (
        ("ladder=[width,batch]", {"w16", "w32", "w64", "w16_b512"}),
        ("ladder=width", {"w16", "w32", "w64"}),
    ):
        transfer(out, *DESIGNED, word, "dry_run=true")
        said = {word for line in capsys.readouterr().out.splitlines() for word in line.split()}
        assert rungs <= said
        assert not any("_t" in word for word in said)
    transfer(out, *DESIGNED, "ladder=[hieght]", expect=2)
    assert "known axes: width, tokens, batch, depth" in capsys.readouterr().err
    assert training.ran == []


def test_what_the_budget_has_no_room_for_is_said_in_the_certificate(
    out: Path, study: Path, training: Training, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = transfer(out, *DESIGNED, "ladder.widths=[32,1024]")
    assert {rung["width"] for rung in certificate(folder)["rungs"]} == {16, 32}
    assert certificate(folder)["notes"] == ["left out of the ladder, for its budget or want of finished runs: w1024"]


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
