"""From a study to a trained target: published values, a real ladder, a target with two contexts, kill and resume."""

import csv
import hashlib
import html
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mutune.certificate.config import TransferFile
from mutune.compose import build
from tests import doors
from tests.test_train_processes import OF_A_PROCESS

TINY_SWEEP = ["+sweep=smoke", "study=proxy", "model.width=16", "run.num_steps=20", "search.n_trials=2"]
TINY_TARGET = [
    "target=small",
    "target.name=tiny",
    "target.model.width=32",
    "target.model.depth=2",
    "target.stages=[{context_length: 64, batch_sequences: 8, num_steps: 30},"
    "{context_length: 256, batch_sequences: 2, num_steps: 10}]",
    "target.loop.heldout_windows=8",
    "target.loop.eval_every=10",
]
TINY_LADDER = ["ladder.widths=[32]", "ladder.offsets=[-1,0,1]", "ladder.seeds=2"]


def rows(path: Path) -> dict[str, dict[str, str]]:
    """A CSV keyed by its first column."""
    with path.open() as lines:
        table = list(csv.DictReader(lines))
    return {next(iter(row.values())): row for row in table}


def published(tmp_path: Path, *arguments: str) -> Path:
    """Run the transfer of published values; returns its folder."""
    from mutune.transfer import main

    assert main(["study=published", f"out={tmp_path}", *arguments]) == 0
    return tmp_path / "transfer/published--btlm_3b"


def test_published_values_give_btlm_s_own_table(tmp_path: Path) -> None:
    folder = published(tmp_path)
    table, sites = rows(folder / "parametrization.csv"), rows(folder / "multipliers.csv")
    assert len(table) == 451
    for name, std, rate, decay in [
        ("wte.weight", 0.073, 0.012, 0.1),
        ("h.31.attn.c_attn.weight", 0.023084626919229165, 0.0012, 0.1),
        ("h.0.mlp.c_fc2.weight", 0.023084626919229165, 0.0012, 0.1),
        ("h.7.attn.c_proj.weight", 0.0028855783649036457, 0.0012, 0.1),
        ("h.7.mlp.c_proj.weight", 0.0028855783649036457, 0.0012, 0.1),
        ("ln_f.bias", 0.0, 0.012, 0.0),
    ]:
        assert float(table[name]["init_std"]) == std
        assert float(table[name]["peak_lr"]) == pytest.approx(rate, rel=1e-15)
        assert float(table[name]["weight_decay"]) == decay
        assert float(table[name]["adam_eps"]) == 1e-8
    assert float(sites["embedding"]["value"]) == 14.6
    assert float(sites["output"]["value"]) == pytest.approx(0.222, rel=1e-15)
    assert float(sites["attention_logits"]["value"]) == 0.0125
    assert json.loads((folder / "certificate.json").read_text())["verdict"] == "NOT CERTIFIED"


def test_another_value_or_another_width_moves_the_published_table_as_the_theory_says(tmp_path: Path) -> None:
    wide = rows(
        published(
            tmp_path, "target.model.width=4096", "target.model.ffn_width=null", "hyperparameters.learning_rate=0.006"
        )
        / "parametrization.csv"
    )
    assert float(wide["h.0.attn.c_attn.weight"]["init_std"]) == 0.01825
    assert float(wide["h.0.attn.c_proj.weight"]["init_std"]) == 0.00228125
    assert float(wide["h.0.attn.c_attn.weight"]["peak_lr"]) == pytest.approx(0.006 / 16, rel=1e-15)
    assert float(wide["wte.weight"]["peak_lr"]) == 0.006


def test_the_dry_run_of_the_3b_target_prices_it_without_allocating_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.train import main

    folder = published(tmp_path)
    capsys.readouterr()
    assert main([f"transfer={folder / 'transfer.yaml'}", "dry_run=true", "device=cpu", f"out={tmp_path / 'none'}"]) == 2
    printed, refused = capsys.readouterr()
    for fact in ("2,646,255,744 in 451 tensors", "119,727 steps", "39,909 steps", "627,714,293,760 tokens"):
        assert fact in printed
    assert "1.217e+22 FLOPs" in printed
    assert refused.startswith("mutune.train: device=cpu has ")  # so a script does not start it
    assert printed.endswith("dry run: nothing was written.\n")
    assert not (tmp_path / "none").exists()


def test_the_3b_target_is_not_started_where_it_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mutune.train import main

    folder = published(tmp_path)
    capsys.readouterr()
    assert main([f"transfer={folder / 'transfer.yaml'}", "device=cpu", f"out={tmp_path / 'none'}"]) == 2
    assert "dry_run=true" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_second_different_transfer_to_the_same_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mutune.transfer import main

    folder = published(tmp_path)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert published(tmp_path) == folder  # the same again is no conflict
    capsys.readouterr()
    assert main(["study=published", f"out={tmp_path}", "hyperparameters.learning_rate=0.006"]) == 2
    sentence = capsys.readouterr().err
    assert "transfer.hyperparameters.learning_rate: 0.012 → 0.006" in sentence
    assert "overwrite=true" in sentence
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert main(["study=published", f"out={tmp_path}", "hyperparameters.learning_rate=0.006", "overwrite=true"]) == 0


def test_require_go_exits_with_3(tmp_path: Path) -> None:
    from mutune.transfer import main

    assert main(["study=published", f"out={tmp_path}", "require_go=true"]) == 3


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A swept study and its transfer to a tiny target, made by the commands."""
    out = tmp_path_factory.mktemp("house")
    doors.run("sweep", *TINY_SWEEP, f"out={out}")
    doors.run("transfer", *TINY_TARGET, *TINY_LADDER, f"out={out}")
    return out


def test_a_transfer_leaves_every_file_of_the_contract(house: Path) -> None:
    folder = house / "transfer/proxy--tiny"
    names = ("transfer.yaml", "certificate.json", "certificate.md", "parametrization.csv", "multipliers.csv")
    for name in (*names, "report.html"):
        assert (folder / name).stat().st_size > 0
    certificate = json.loads((folder / "certificate.json").read_text())
    keys = {"verdict", "reasons", "target", "rungs", "drift", "prediction", "regret", "differences", "advice"}
    assert keys <= certificate.keys()
    assert [rung["width"] for rung in certificate["rungs"]] == [16, 32]
    assert all(len(rung["points"]) == 6 for rung in certificate["rungs"])
    assert {path.name for path in (folder / "figures").iterdir()} == {"valley.png", "drift.png", "optima.png"}
    (tuning,) = (note for note in certificate["notes"] if note.startswith("study proxy made"))
    assert "made 22 steps" in tuning  # two trials of 20, one of them pruned at the first stop
    assert html.escape(certificate["reasons"][0]) in (folder / "report.html").read_text()
    assert "trials" in (house / "sweeps/proxy/report.html").read_text()


def test_a_target_that_is_another_run_gets_no_number_and_the_outcome_says_so(house: Path, undisturbed: Path) -> None:
    data = json.loads((house / "transfer/proxy--tiny/certificate.json").read_text())
    assert "in more than the width (its stages" in data["prediction"]["reason"]
    assert data["prediction"]["loss"] is None
    outcome = json.loads((undisturbed / "train/tiny/prediction.json").read_text())
    assert outcome["measured"] == records(undisturbed)[-1]["heldout_loss"]
    assert outcome["inside"] is None


LIKE_ITS_LADDER = [
    "target=small",
    "target.name=wide",
    "target.model.width=96",
    "target.model.depth=2",
    "target.stages=[{context_length: 64, batch_sequences: 4, num_steps: 20}]",
    "target.loop.heldout_windows=32",
    "ladder.widths=[32,48,64,80]",
    "ladder.offsets=[-1,0,1]",
]


def test_a_prediction_is_sealed_before_the_run_and_meets_its_outcome(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house / "sweeps", tmp_path / "sweeps")
    folder = tmp_path / "transfer/proxy--wide"
    said = doors.run("transfer", *LIKE_ITS_LADDER, f"out={tmp_path}").stdout
    sealed = (folder / "transfer.yaml").read_text()
    prediction = yaml.safe_load(sealed)["prediction"]
    assert prediction["low"] < prediction["loss"] < prediction["high"]
    assert f"prediction {prediction['loss']:.4f} ({prediction['low']:.4f}-{prediction['high']:.4f})" in said
    assert f"{prediction['loss']:.4f} (" in (folder / "certificate.md").read_text()
    first, *_, last = prediction["band"]
    assert (first[0], last[0]) == (0.1, 1.0)
    assert f"{last[2]:.3f} ({last[1]:.3f}-{last[3]:.3f}) after 100%" in (folder / "certificate.md").read_text()
    train = ["train", f"transfer={folder / 'transfer.yaml'}", f"out={tmp_path}"]
    for _ in "ab":  # finished, and looked at again
        said = doors.run(*train).stdout
    measured = json.loads((tmp_path / "train/wide/metrics.jsonl").read_text().splitlines()[-1])["heldout_loss"]
    inside = prediction["low"] <= measured <= prediction["high"]
    assert f"measured {measured:.4f}: {'inside' if inside else 'outside'}" in said
    assert json.loads((tmp_path / "train/wide/prediction.json").read_text())["prediction"] == prediction
    doors.run("transfer", *LIKE_ITS_LADDER, f"out={tmp_path}")  # again, which forgets no outcome
    (outcome,) = json.loads((folder / "certificate.json").read_text())["outcome"]
    assert (outcome["measured"], outcome["inside"], outcome["seed"]) == (measured, inside, 0)
    assert (folder / "transfer.yaml").read_text() == sealed
    doors.edit_yaml(folder / "transfer.yaml", "prediction", "high", value=99.0)  # said after the event
    assert "is not that of the transfer file's other keys" in doors.run(*train, expect=2).stderr


def test_a_ladder_by_design_takes_the_study_s_trials_as_they_are(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house / "sweeps", tmp_path / "sweeps")
    doors.run("transfer", *TINY_TARGET, "ladder=width", "target.model.width=16", f"out={tmp_path}")
    ladder = tmp_path / "transfer/proxy--tiny/ladder"
    results = [json.loads(path.read_text())["value"] for path in ladder.glob("w16_*/result.json")]
    records = [path.read_text().splitlines() for path in (house / "sweeps/proxy/trials").glob("*/metrics.jsonl")]
    trials = [json.loads(lines[-1])["heldout_loss"] for lines in records if len(lines) == 20]
    assert 1 <= len(trials) < len(records)  # of the others there is no final loss: they were pruned
    assert set(trials) <= set(results)
    assert len(results) > len(trials)
    best = yaml.safe_load((house / "sweeps/proxy/best.yaml").read_text())
    rate = best["params"]["learning_rate"]
    (copied,) = ladder.glob(f"w16_lr{rate:.4g}_s0/metrics.jsonl")
    assert copied.read_text() == (house / f"sweeps/proxy/trials/{best['trial']}/metrics.jsonl").read_text()
    note = yaml.safe_load((copied.parent / "config.yaml").read_text())
    assert (note["rung"], note["offset"], "trial" in note) == (16, 0.0, False)
    assert (tmp_path / "transfer/proxy--tiny/figures/valley.png").exists()  # tokens' rungs do not stand in its way


def test_another_target_of_the_study_takes_the_runs_of_the_ladder_that_is_there(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    longer = "target.stages=[{context_length: 64, batch_sequences: 8, num_steps: 50}]"  # as a branch of its trunk is
    words = [*TINY_TARGET, "target.name=branch", longer, *TINY_LADDER, "ladder.offsets=[-1,0,1,2]", f"out={tmp_path}"]
    before = files_of(tmp_path)
    known = "runs of other transfers, which are copied: 11\n"  # and one is a trial of the study
    assert known in doors.run("transfer", *words, "dry_run=true").stdout
    assert files_of(tmp_path) == before
    done = doors.run("transfer", *words)
    assert "ladder: runs of other transfers, copied: 11\n" in done.stderr
    ladder, theirs = tmp_path / "transfer/proxy--branch/ladder", house / "transfer/proxy--tiny/ladder"
    ours = {path.parent.name: json.loads(path.read_text()) for path in ladder.glob("*/result.json")}
    made = {path.parent.name: json.loads(path.read_text()) for path in theirs.glob("*/result.json")}
    assert len(ours) == 16
    assert {name: ours[name] for name in made} == made  # with the seconds that they took
    assert {path: path.stat().st_mtime_ns for path in before if "proxy--tiny" in str(path)} == {
        path: when for path, when in before.items() if "proxy--tiny" in str(path)
    }
    notes = [yaml.safe_load((ladder / name / "config.yaml").read_text()) for name in made]
    assert {(note["rung"], note["offset"]) for note in notes} == {(w, o) for w in (16, 32) for o in (-1.0, 0.0, 1.0)}
    rungs = json.loads((tmp_path / "transfer/proxy--branch/certificate.json").read_text())["rungs"]
    assert [len(rung["points"]) for rung in rungs] == [8, 8]


def test_runs_of_other_values_code_or_devices_or_that_did_not_end_are_not_taken(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    theirs = tmp_path / "transfer/proxy--tiny/ladder"
    first, second, third, fourth, *_ = sorted(theirs.glob("w32*/result.json"))  # the others have one of the study's
    first.unlink()
    second.write_text(json.dumps({**json.loads(second.read_text()), "fingerprint": "another"}))
    for path, key, value in ((third, "device", "cuda"), (fourth, "versions", {"torch": "2.6.0"})):
        doors.edit_yaml(path.parent / "config.yaml", key, value=value)
    words = [*TINY_TARGET, "target.name=branch", *TINY_LADDER, f"out={tmp_path}", "dry_run=true"]
    assert "runs of other transfers, which are copied: 7\n" in doors.run("transfer", *words).stdout
    said = doors.run("transfer", *words, "hyperparameters.init_std=0.07").stdout
    assert "runs of other transfers" not in said


def test_tables_are_compared_in_figure_page_and_certificate(house: Path, tmp_path: Path) -> None:
    shutil.copytree(house / "sweeps", tmp_path / "sweeps")
    done = doors.run("transfer", *TINY_TARGET, *TINY_LADDER, "ladder.seeds=1", "compare=[sp]", f"out={tmp_path}")
    folder = tmp_path / "transfer/proxy--tiny"
    data = json.loads((folder / "certificate.json").read_text())
    assert {row["table"] for row in data["comparison"]} == {"mup", "sp"}
    best = "trains best at width 32, each at its own best rate: "
    for text in (done.stdout, (folder / "certificate.md").read_text(), (folder / "report.html").read_text()):
        assert best in text
    assert len(list((folder / "compare/sp").glob("*/result.json"))) == 6
    assert (folder / "figures/valley.png").exists()


@pytest.mark.parametrize("known", [(), ("prediction",)], ids=["predictions", "bands"])
def test_a_transfer_file_from_before_there_were_these_keeps_its_seal(tmp_path: Path, known: tuple[str, ...]) -> None:
    data = yaml.safe_load((published(tmp_path) / "transfer.yaml").read_text())
    assert data["prediction"]["reason"] == "published values come without a ladder"
    if not known:
        del data["prediction"]
    old = build(TransferFile, data).sealed(data["verdict"])
    text: dict[str, Any] = {**old.as_dict(), "seal": ""}
    if not known:
        text.pop("prediction", None)
    assert "band" not in text.get("prediction", {})
    written = json.loads(json.dumps(text))
    build(TransferFile, {**written, "seal": old.seal}).check_seal()
    assert old.seal == hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:16]


def test_advice_is_given_before_the_money_is_spent_and_kept_in_the_certificate(house: Path) -> None:
    folder = house / "transfer/proxy--tiny"
    advice = json.loads((folder / "certificate.json").read_text())["advice"]
    assert [each["axis"] for each in advice] == ["target's tokens per parameter", "ALiBi spectrum"]
    assert advice[0].keys() == {"axis", "severity", "finding", "cure", "source"}
    section = (folder / "certificate.md").read_text().partition("## Advice")[2]
    assert all(value in section for value in advice[0].values())
    spent = files_of(house)
    dry = doors.run("transfer", *TINY_TARGET, *TINY_LADDER, f"out={house}", "target.model.depth=9", "dry_run=true")
    assert "stop       depth: 2 at the proxy, 9 at the target" in dry.stdout
    assert "\ncure       at the sweep: model.depth=9" in dry.stdout
    longer = [f"target.stages=[{{context_length: 64, batch_sequences: 8, num_steps: {num}}}]" for num in (3000, 3001)]
    for stages, said in zip(longer, (False, True), strict=True):  # 75 times the ladder's four times the study's tokens
        ladder = ["ladder=[width,tokens]", "ladder.widths=[32]", "ladder.tokens=[4]", stages]
        dry = doors.run("transfer", *TINY_TARGET, *ladder, f"out={house}", "dry_run=true")
        assert ("stop       tokens: 20,480 at the most in proxy and ladder" in dry.stdout) == said
    assert files_of(house) == spent


def files_of(folder: Path) -> dict[Path, int]:
    """When each file was written, but for the database, which whoever opened it may tidy up as late as it likes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("study.db")]
    return {path: path.stat().st_mtime_ns for path in files}


def test_published_values_are_given_advice_on_the_target_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = published(tmp_path)
    (only,) = json.loads((folder / "certificate.json").read_text())["advice"]
    assert (only["axis"], only["severity"]) == ("text", "care")  # 628 billion tokens of 2.3 million
    told = r"sotu has (about )?2,2\d\d,\d{3} training tokens, which the run reads 27\d,\d{3} times over"
    assert re.match(told, only["finding"])
    capsys.readouterr()
    published(tmp_path / "decay", "hyperparameters.weight_decay=1", "dry_run=true")
    printed = capsys.readouterr().out
    assert "care       decay timescale:" in printed
    assert "cure       at the transfer: hyperparameters.weight_decay=0.086" in printed


def test_the_transfer_file_carries_the_best_trial(house: Path) -> None:
    transfer = yaml.safe_load((house / "transfer/proxy--tiny/transfer.yaml").read_text())
    best = yaml.safe_load((house / "sweeps/proxy/best.yaml").read_text())
    assert transfer["hyperparameters"] == best["hyperparameters"]
    assert transfer["provenance"]["trial"] == best["trial"]
    assert transfer["base"] == {"width": 16.0, "depth": 2, "ffn_width": 42.0}
    assert transfer["provenance"]["data_hash"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_ladder_continues_where_it_was_killed(signum: signal.Signals, code: int, house: Path, tmp_path: Path) -> None:
    doors.run("sweep", *TINY_SWEEP, f"out={tmp_path}")
    arguments = [*TINY_TARGET, *TINY_LADDER, f"out={tmp_path}"]
    process = doors.start("transfer", *arguments)
    ladder = tmp_path / "transfer/proxy--tiny/ladder"
    doors.wait_until(lambda: len(list(ladder.glob("*/result.json"))) >= 3, process)
    os.killpg(process.pid, signum)
    process.communicate(timeout=60)
    assert process.returncode == code
    done = {path: path.stat().st_mtime_ns for path in ladder.glob("*/result.json")}
    doors.run("transfer", *arguments)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    ours, theirs = (
        json.loads((out / "transfer/proxy--tiny/certificate.json").read_text())["rungs"] for out in (tmp_path, house)
    )
    assert ours == theirs


def train_arguments(house: Path, out: Path) -> list[str]:
    return [f"transfer={house / 'transfer/proxy--tiny/transfer.yaml'}", f"out={out}", "checkpoint_every=5"]


def state(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "train/tiny/checkpoints/40/state.safetensors")


def records(out: Path) -> list[dict[str, Any]]:
    lines = (out / "train/tiny/metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in OF_A_PROCESS} for line in lines]


@pytest.fixture(scope="module")
def undisturbed(house: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target trained without interruption."""
    out = tmp_path_factory.mktemp("undisturbed")
    doors.run("train", *train_arguments(house, out))
    return out


def test_the_target_trains_through_both_contexts(undisturbed: Path) -> None:
    history = records(undisturbed)
    assert [record["step"] for record in history] == list(range(1, 41))
    assert [record["context_length"] for record in history] == [64] * 30 + [256] * 10
    assert history[-1]["tokens"] == 40 * 512
    assert history[-1]["heldout_loss"] < history[0]["loss"]
    assert (undisturbed / "train/tiny/figures/loss.png").stat().st_size > 0
    last = json.loads((undisturbed / "train/tiny/metrics.jsonl").read_text().splitlines()[-1])
    assert f"{last['heldout_loss']:.5g}" in (undisturbed / "train/tiny/report.html").read_text()
    kept = sorted(path.name for path in (undisturbed / "train/tiny/checkpoints").iterdir())
    assert kept == [
        "30",
        "35",
        "40",
        "5",
    ]  # the newest, the end of the first stage, and one for the guard to go back to


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_target_resumes_to_the_same_weights(
    signum: signal.Signals, house: Path, undisturbed: Path, tmp_path: Path
) -> None:
    arguments = train_arguments(house, tmp_path)
    metrics = tmp_path / "train/tiny/metrics.jsonl"
    process = doors.start("train", *arguments)
    doors.wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 10, process)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum]
    assert re.search(r"^training   tiny: [\d,]+ parameters, 40 steps, by \d+ thread", stderr)
    assert "tiny step 4/40 · loss " in stderr  # long before a twentieth of a long run
    if signum != signal.SIGKILL:
        assert "the same command continues" in stderr
        why = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[signum]
        last = metrics.read_text().count("\n")
        kept = f"{tmp_path}/train/tiny/checkpoints/{last}"
        assert f"stopped    after step {last} of 40: {why}; the newest checkpoint is {kept}, from which" in stderr
        assert "Traceback" not in stderr
    resumed = doors.run("train", *arguments)
    assert "resuming" in resumed.stderr
    ours, theirs = state(tmp_path), state(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert records(tmp_path) == records(undisturbed)


def test_a_finished_target_is_not_trained_again(house: Path, undisturbed: Path) -> None:
    before = records(undisturbed)
    again = doors.run("train", *train_arguments(house, undisturbed))
    assert "finished   step 40" in again.stdout
    assert records(undisturbed) == before


def test_a_run_of_another_shape_in_the_same_folder_is_refused(house: Path, undisturbed: Path, tmp_path: Path) -> None:
    path = tmp_path / "transfer.yaml"
    path.write_text((house / "transfer/proxy--tiny/transfer.yaml").read_text())
    doors.edit_yaml(path, "target", "model", "width", value=48)
    doors.seal(path)
    refused = doors.run("train", f"transfer={path}", f"out={undisturbed}", expect=2)
    assert "run.model.width: 32 → 48" in refused.stderr


def test_weights_of_another_seed_are_never_taken_for_this_ones(house: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "train", tmp_path / "train")
    (tmp_path / "train/tiny/config.yaml").unlink()
    refused = doors.run("train", *train_arguments(house, tmp_path), "seed=5", expect=2)
    assert "but no config.yaml, so what made them is unknown" in refused.stderr
    theirs = yaml.safe_load((undisturbed / "train/tiny/config.yaml").read_text())
    theirs["inputs"]["run"]["seed"] = 5  # even a config that lies does not help
    (tmp_path / "train/tiny/config.yaml").write_text(yaml.safe_dump(theirs))
    refused = doors.run("train", *train_arguments(house, tmp_path), "seed=5", expect=2)
    assert "run.seed is 0 there and 5 now" in refused.stderr


def test_a_finished_target_without_its_records_is_refused_and_left_alone(
    house: Path, undisturbed: Path, tmp_path: Path
) -> None:
    shutil.copytree(undisturbed / "train", tmp_path / "train")
    (tmp_path / "train/tiny/metrics.jsonl").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    refused = doors.run("train", *train_arguments(house, tmp_path), expect=2)
    assert refused.stderr.count("\n") == 1
    assert "metrics.jsonl lacks the whole record of step 1, though there is a checkpoint of step 40" in refused.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_checkpoint_of_another_plan_is_refused(house: Path, undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed / "train", tmp_path / "train")
    meta = tmp_path / "train/tiny/checkpoints/40/meta.json"
    data = json.loads(meta.read_text())
    data["plan"]["parameters"]["wte.weight"]["lr_mult"] = 0.5
    meta.write_text(json.dumps(data))
    refused = doors.run("train", *train_arguments(house, tmp_path), expect=2)
    assert "plan.parameters.wte.weight.lr_mult" in refused.stderr
    assert "Traceback" not in refused.stderr
