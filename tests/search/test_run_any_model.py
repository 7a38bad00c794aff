"""`mutune.search.run`: a user's own model gets the study and the ladder, from functions defined anywhere."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn

import mutune
from examples.llama import LlamaShape
from examples.llama import build as build_llama
from mutune import reporting
from mutune.door import WorkFailed
from mutune.errors import Refusal
from mutune.parametrization.finding import AuditError
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.reporting import figures
from mutune.search.results import load_study
from mutune.search.workers import WorkError
from tests import doors
from tests.search import own
from tests.search.own import SPACE, search, train

Report = Callable[[int, float], None]


def folder(out: Path) -> Path:
    return out / "sweeps" / "mine"


def stored(out: Path) -> dict[int, tuple[dict[str, Any], float]]:
    """Trial number → (parameters, value) of every finished trial."""
    path = folder(out) / "study.db"
    if not path.exists():
        return {}
    try:
        study = optuna.load_study(study_name="mine", storage=f"sqlite:///{path}")
    except KeyError:  # about to be made
        return {}
    return {t.number: (t.params, t.value) for t in study.trials if t.state.is_finished() and t.value is not None}


def times(out: Path) -> dict[Path, int]:
    """When every record was written."""
    return {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}


# ------------------------------------------------------------------------------------------------ a study and a ladder
def test_a_study_and_a_ladder_of_functions_that_live_in_a_function(out: Path, tmp_path: Path) -> None:
    class Local(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.body = own.Net(width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    steps = 10

    def local_train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        return train(model, optimizer, seed, report, steps)

    def again(n_trials: int = 4, workers: int = 0, out: Path = out, **ladder: Any) -> Any:
        return search(out, lambda width: Local(width), local_train, workers=workers, n_trials=n_trials, **ladder)

    ladder: dict[str, Any] = {"widths": [32], "seeds": 2}
    result = again(workers=2, **ladder)
    assert len(result.trials) == 4
    names = {p.name for p in folder(out).iterdir() if not p.name.startswith((".", "study.db-"))}  # SQLite's own
    assert names == {"best.yaml", "config.yaml", "figures", "ladder", "study.db", "trials"}
    assert {p.name for p in (folder(out) / "trials" / "0").iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "parametrization.csv", "multipliers.csv"
    }  # fmt: skip
    assert len(list((folder(out) / "ladder").iterdir())) == 2 * 5 * 2
    assert sorted(zip(result.ladder.width, result.ladder.num_seeds, strict=True)) == [(16, 2), (32, 2)]
    assert result.best.heldout_loss == own.best_of(list(result.trials.value))
    assert result.best.hyperparameters.learning_rate == result.best.params["learning_rate"]
    assert [path.name for path in result.figures] == ["history.png", "slices.png", "valley.png", "drift.png"]
    assert result._repr_html_().count("<img") == 4
    before, first = times(out), stored(out)
    assert str(again(**ladder)) == str(result)
    assert times(out) == before  # a finished study returns at once
    again(5)
    assert {number: stored(out)[number] for number in first} == first
    assert len(stored(out)) == 5
    again(5, out=tmp_path / "here")
    assert stored(tmp_path / "here") == stored(out)  # and a study in this process is the same


def test_a_transformer_of_named_roles_is_searched_and_climbed(out: Path) -> None:
    def train_llama(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        ids = torch.randint(0, 31, (4, 17), generator=torch.Generator().manual_seed(seed))
        for step in range(3):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            report(step, loss)  # type: ignore[arg-type]  # a tensor will do
        return loss  # type: ignore[return-value]

    result = search(
        out,
        lambda width: build_llama(LlamaShape(width)),
        train_llama,
        SPACE | {"output_multiplier": {"values": [0.5, 1.0]}},
        base=32,
        widths=[64],
        seeds=1,
        offsets=[-1, 0, 1],
        n_trials=2,
        head_size=16,
        roles={"*.wo.weight": "residual_output", "*.w2.weight": "residual_output"},
    )
    rows = (folder(out) / "ladder").glob("w64*/parametrization.csv")
    assert all(",residual_output," in path.read_text() for path in rows)
    assert len(result.ladder) == 2


def test_the_house_reads_the_records(out: Path) -> None:
    search(out, widths=[32], seeds=1, offsets=[-1, 0, 1])
    runs = reporting.load_runs(folder(out))
    assert runs.finished.all()
    assert (len(runs), runs.trial.notna().sum(), set(runs.width)) == (4 + 6, 4, {16, 32})
    assert len(reporting.history(runs)) == 4
    assert len(reporting.valleys(runs[runs.trial.isna()])) == 6
    figure = figures._unit(figures.history_figure(runs), runs)
    assert [axes.get_ylabel() for axes in figure.axes] == ["held-out loss"]  # in the user's own unit
    assert "nats" not in figure.axes[0].get_title(loc="left")
    records = reporting.load_records(folder(out) / "trials" / "0")
    assert list(records.step) == list(range(1, 9))
    assert records.lr.iloc[0] == pytest.approx(runs.learning_rate[0] * 7 / 8)
    assert records.heldout_loss.notna().sum() == 1


# ---------------------------------------------------------------------------------------------------------- divergence
def wild(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
    """Diverges above a rate of 0.02, at once above 0.05, and in silence above 0.08."""
    rate = float(optimizer.param_groups[0]["peak_lr"])
    if rate < 0.08:
        report(1, math.nan if rate > 0.05 else 3.0)
    if 0.02 < rate <= 0.05:
        report(2, 7.0)
        report(3, 5.0)
        report(4, math.inf)
    return math.nan if rate > 0.02 else rate


def test_a_diverged_trial_is_an_observation_and_cannot_win(out: Path) -> None:
    space = {"learning_rate": {"values": [0.09, 0.06, 0.03, 0.01]}}
    result = search(
        out, train=wild, space=space, sampler="grid", n_trials=None, widths=[32], seeds=1, offsets=[-1, 0, 1]
    )
    assert [value for _, value in stored(out).values()] == [math.inf, math.inf, 7.0, 0.01]
    assert list(result.trials.value) == [math.inf, math.inf, 7.0, 0.01]
    assert list(result.trials.diverged) == [True, True, True, False]
    assert result.best.trial == 3
    records = (folder(out) / "trials/2/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["diverged"] for line in records] == [False, False, False, True]
    assert len(result.figures) == 4  # infinite values are drawn


def test_a_run_without_a_finite_loss_counts_as_the_worst_of_its_valley(out: Path) -> None:
    result = search(
        out, train=wild, space={"learning_rate": {"values": [0.015]}}, n_trials=1,
        widths=[32], seeds=1, offsets=[-2, -1, 0, 1, 2],
    )  # fmt: skip
    assert list(result.ladder.edge) == ["low", "low"]
    points = reporting.valleys(reporting.load_runs(folder(out) / "ladder"))
    assert list(points.loss) == pytest.approx(2 * [0.00375, 0.0075, 0.015, 7.0, 7.0])


def test_a_search_in_which_all_diverge_says_so(out: Path) -> None:
    with pytest.raises(WorkFailed, match="all 2 trials diverged; lower the learning rates"):
        search(out, train=lambda *_: math.nan, n_trials=2)


# ------------------------------------------------------------------------------------------------------------ the audit
def test_a_one_cycle_schedule_is_caught_in_the_rehearsal(out: Path) -> None:
    def one_cycle(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=10)
        report(0, 1.0)
        return 1.0

    with pytest.raises(AuditError, match=r"hidden\.weight.*learning rate is .*, expected"):
        search(out, train=one_cycle)
    assert not folder(out).exists()


def test_a_schedule_that_breaks_the_rates_late_is_caught_at_the_end_of_the_run(out: Path) -> None:
    def late(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        for step in range(3):
            report(step, 1.0)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] *= 2.0**number
        return 1.0

    with pytest.raises(AuditError, match="learning rate is") as caught:
        search(out, train=late, widths=[32])
    assert caught.value.__notes__[0].startswith("in trial 0 of study mine (learning_rate=")


def test_rates_that_are_wrong_in_between_and_right_at_the_end_are_caught_at_a_report(out: Path) -> None:
    def in_between(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(1, 1.0)
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = 0.01 * 2.0**number
        report(2, 1.0)
        mutune.set_rates(optimizer, 0.0)
        return 1.0

    with pytest.raises(AuditError, match="learning rate is"):
        search(out, train=in_between)


def test_a_tensor_that_the_loop_froze_is_caught(out: Path) -> None:
    def thaw(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        model.first.weight.requires_grad_(False)  # type: ignore[union-attr]
        report(0, 1.0)
        return 1.0

    with pytest.raises(AuditError, match=r"first\.weight: requires_grad is False"):
        search(out, train=thaw)


def test_a_loop_that_makes_an_optimizer_of_its_own_is_refused(out: Path) -> None:
    def own_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        mine = torch.optim.SGD(model.parameters(), 0.1)
        x, y = own.batch(seed)
        for step in range(3):
            loss = F.mse_loss(model(x), y)
            mine.zero_grad()
            loss.backward()
            mine.step()
            report(step, loss.item())
        return loss.item()

    with pytest.raises(Refusal, match="train changed the model without a step of the optimizer that it was given"):
        search(out, train=own_optimizer)


# ------------------------------------------------------------------------------------------------- errors of the user's
def test_an_exception_stops_the_run_with_the_users_traceback_and_a_mended_one_continues(out: Path) -> None:
    def broken(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(1, 1.0)
        if optimizer.param_groups[0]["lr"] < 0.02:
            raise KeyError("no such key")
        return 1.0

    def mended(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(1, 1.0)
        return 1.0

    space = {"learning_rate": {"values": [0.03, 0.01, 0.02]}}
    grid: dict[str, Any] = {"space": space, "sampler": "grid", "n_trials": None, "workers": 1}
    with pytest.raises(WorkError) as caught:
        search(out, train=broken, **grid, hyperparameters={"learning_rate": 0.05})
    text = str(caught.value)
    assert text.startswith("trial 1 of study mine (learning_rate=0.01) failed:\nTraceback (most recent call last):\n")
    assert "KeyError: 'no such key'" in text
    assert text.count('File "') == 1
    assert 'raise KeyError("no such key")' in text
    assert list(stored(out)) == [0]
    assert "KeyError" in (folder(out) / "failure.txt").read_text()
    before = times(out)[folder(out) / "trials/0/metrics.jsonl"]
    search(out, train=mended, **{**grid, "workers": 0}, hyperparameters={"learning_rate": 0.05})
    assert times(out)[folder(out) / "trials/0/metrics.jsonl"] == before
    assert not (folder(out) / "failure.txt").exists()
    config = yaml.safe_load((folder(out) / "config.yaml").read_text())
    assert [set(code) for code in config["earlier_code"]] == [{"build", "train", "Net.__init__", "Net.forward"}]
    assert config["earlier_code"][0]["train"] != config["inputs"]["code"]["train"]


def test_a_loss_that_was_not_returned_stops_the_study_and_a_mended_loop_continues_it(out: Path) -> None:
    def forgets(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> None:
        train(model, optimizer, seed, report)

    with pytest.raises(Refusal, match=r"^train returned None; return"):
        search(out, train=forgets)
    assert len(search(out, train=train).trials) == 4
    with pytest.raises(Refusal, match=r"code\.train: "):  # of a finished study it is another
        search(out, train=forgets)


@pytest.mark.parametrize("given", [("x", 1.0), (1, None), (1, torch.ones(3)), (math.nan, 1.0)])
def test_a_report_of_what_is_no_number_is_refused(out: Path, given: tuple[Any, Any]) -> None:
    def reports(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(*given)
        return train(model, optimizer, seed, report)

    with pytest.raises(Refusal, match=r"^report was given step=.* and loss=.*; give it two numbers"):
        search(out, train=reports)
    assert not out.exists()


def test_a_loop_that_catches_exceptions_does_not_hold_up_the_rehearsal_or_hide_a_divergence(out: Path) -> None:
    steps: list[int] = []

    def catches(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        for step in range(3):
            with contextlib.suppress(Exception):
                steps.append(step)
                report(step, math.nan)
        return 1.0

    with pytest.raises(WorkFailed, match="all 2 trials diverged"):
        search(out, train=catches, n_trials=2)
    assert steps == [0, 0]


def test_a_loop_that_leaves_python_is_an_error_of_the_users_and_no_dying_worker(out: Path) -> None:
    def leaves(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(0, 1.0)
        sys.exit(3)

    with pytest.raises(WorkError, match=r"(?s)^trial 0 of study mine .* failed:\nTraceback .*SystemExit: 3"):
        search(out, train=leaves, workers=1, n_trials=1)


def test_in_this_process_the_users_exception_comes_as_it_is(out: Path) -> None:
    def broken(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(1, 1.0)
        raise KeyError("no such key")

    with pytest.raises(KeyError, match="no such key") as caught:
        search(out, train=broken)
    assert caught.value.__notes__ == ["in trial 0 of study mine " + caught.value.__notes__[0].partition("mine ")[2]]
    assert caught.traceback[-1].name == "broken"


def test_an_interrupted_search_says_that_it_continues(out: Path) -> None:
    calls: list[int] = []

    def interrupted(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        report(1, 1.0)
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt, match="run it again to continue"):
        search(out, train=interrupted)
    assert list(stored(out)) == [0, 1]
    search(out, train=interrupted)
    assert len(calls) == 3 + 2
    assert list(stored(out)) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- refusals
def returns_none(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> None:
    return None


def grow(width: int) -> nn.Module:
    if width > 20:
        raise RuntimeError("too wide")
    return own.Net(width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"space": {}}, r"^space=\{\} is empty; for example space="),
        (
            {"space": {"lerning_rate": {"low": 1, "high": 2}}},
            r"^space\.lerning_rate is unknown; what can be searched: ",
        ),
        ({"space": {"learning_rate": {"low": 0.1, "high": 0.01}}}, r"^space\.learning_rate is empty: low=0\.1"),
        ({"space": {"width": {"values": [8, 16]}}}, r"^space\.width is not searched but climbed; for example widths="),
        ({"space": {"decay_timescale": {"values": [0.1]}}}, r"^space\.decay_timescale is read by decay=horizon only"),
        ({"space": {"table": {"values": ["mupp"]}}}, "mupp.* is unknown"),
        ({"space": {"embedding_multiplier": {"low": 1, "high": 2}}}, "embedding"),
        ({"space": {"seed": {"values": [-1]}}}, r"^space\.seed\.values=-1 must be a whole number"),
        ({"n_trials": None}, r"^n_trials=None is for sampler=grid only"),
        ({"n_trials": 0}, r"^n_trials=0 must be a whole number at least 1"),
        ({"sampler": "sa"}, r"^sampler=sa is unknown; known samplers: random, qmc, tpe, gp, grid\.$"),
        ({"initial": [{"learning_rate": 1.0}]}, r"^initial\[0\]\.learning_rate=1\.0 lies outside space\.learning_rate"),
        ({"widths": [16]}, r"^widths=\[16\] holds only the base's own width; for example widths=\[32, 64\]\.$"),
        ({"widths": [32], "offsets": [0]}, r"^offsets=\[0\] must hold at least three"),
        ({"widths": [32], "seeds": 0}, r"^seeds=0 must be"),
        ({"base": 16.0}, r"^base=16\.0 must be a whole number"),
        ({"delta": 16}, r"^delta=16 is the base; for example delta=32\.$"),
        ({"workers": -1}, r"^workers=-1 must be a whole number at least 0"),
        ({"name": "a/b"}, r"^name=a/b must be a plain folder name"),
        ({"hyperparameters": {"lr": 1.0}}, r"^hyperparameters\.lr is unknown; known: learning_rate,"),
        ({"hyperparameters": {"init_std": -1.0}}, r"^hyperparameters\.init_std=-1\.0 must be"),
        ({"build": lambda width: None}, r"^build\(16\) returned NoneType, not a torch\.nn\.Module\.$"),
        ({"build": grow}, r"^build\(32\) raised RuntimeError: too wide; it must make a model at every width\.$"),
        ({"build": lambda width: nn.Linear(3, 5)}, "base"),
        ({"space": [1]}, r"^space=\[1\] must be a dict; for example space=\{'learning_rate': \{'low'"),
        ({"space": None}, "^space=None must be a dict"),
        ({"space": {"learning_rate": {"values": 0.1}}}, r"^space\.learning_rate\.values=0\.1 must be a list"),
        ({"widths": 32}, r"^widths=32 must be a list; for example widths=\[32, 64\]\.$"),
        ({"widths": "32"}, r"^widths='32' must be a list"),
        ({"widths": [32.5]}, r"^widths=32\.5 must be a whole number"),
        ({"widths": [32], "offsets": None}, r"^offsets=None must be a list"),
        ({"seeds": None}, r"^seeds=None must be a whole number"),
        ({"base": None}, r"^base=None must be a whole number"),
        ({"base": "16"}, r"^base='16' must be a whole number"),
        ({"n_trials": "4"}, r"^n_trials='4' must be a whole number"),
        ({"initial": {"learning_rate": 0.01}}, r"^initial=\{'learning_rate': 0\.01\} must be a list"),
        ({"initial": [3]}, r"^initial\[0\]=3 must be a dict"),
        ({"table": None}, "^table=None must be the name of a table"),
        ({"hyperparameters": None}, "^hyperparameters=None must be a dict"),
        (
            {"hyperparameters": {"decay_timescale": 0.1}},
            r"^hyperparameters\.decay_timescale=0\.1 is read by decay=horizon",
        ),
        ({"depth": 3}, "^depth=3 must be a function"),
        ({"roles": None}, "^roles=None must be a dict"),
        ({"out": ""}, "^out='' is empty"),
        ({"out": 3}, "^out=3 must be"),
        ({"name": None}, "^name=None must be"),
        ({"overwrite": "no"}, "^overwrite='no' must be True or False"),
        ({"build": None}, "^build is a NoneType and must be a function"),
        ({"build": own.Net(16)}, "^build is a Net and must be a function"),
        ({"train": None}, "^train is a NoneType and must be a function"),
        ({"train": lambda model, optimizer: 1.0}, r"^train cannot be called with four arguments \(too many positional"),
        (
            {"train": lambda *a, steps: 1.0},
            r"^train cannot be called with four arguments \(missing a required argument",
        ),
        ({"train": returns_none}, r"^train returned None; return the final held-out loss as a number"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    arguments: dict[str, Any], message: str, out: Path
) -> None:
    with pytest.raises(Refusal, match=message) as caught:
        search(**{"out": out, **arguments})
    assert str(caught.value).count("\n") == 0
    assert not out.exists()


def test_numbers_and_sequences_of_numpy_are_taken_for_what_they_are(out: Path) -> None:
    """And the folder is the same as from plain ones: running it again with those returns at once."""
    numbers: dict[str, Any] = {
        "space": {"learning_rate": {"low": np.float64(1e-3), "high": torch.tensor(0.125)}},
        "base": np.int64(16), "n_trials": np.int64(2), "seed": np.int64(1), "widths": np.array([32]),
        "seeds": np.int64(1), "offsets": np.linspace(-1, 1, 3), "hyperparameters": {"weight_decay": np.float32(0.5)},
    }  # fmt: skip
    first = search(out, **numbers)
    before = times(out)
    plain: dict[str, Any] = {
        "space": {"learning_rate": {"low": 1e-3, "high": 0.125}}, "n_trials": 2, "seed": 1,
        "widths": range(32, 33), "seeds": 1, "offsets": (-1.0, 0.0, 1.0), "hyperparameters": {"weight_decay": 0.5},
    }  # fmt: skip
    again = search(out, **plain)
    assert times(out) == before
    assert again.best == first.best
    taken = search(out, name="mine", **{**plain, "hyperparameters": replace(BaseHyperparameters(), weight_decay=0.5)})
    assert taken.best == first.best


def test_a_value_list_may_be_a_tuple(out: Path) -> None:
    space = {"learning_rate": {"values": (0.01, 0.02)}}
    assert set(search(out, space=space, sampler="grid", n_trials=None).trials.learning_rate) == {0.01, 0.02}


def test_functions_that_cannot_be_sent_are_refused_and_run_here(out: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:

        def logs(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
            log.write("x")
            return 1.0

        with pytest.raises(Refusal, match=r"cannot be sent to worker processes \(.*\); open files, locks"):
            search(out, train=logs, workers=1)
        search(out, train=logs, workers=0)
    assert (tmp_path / "log").read_text() == "x" * (1 + 4)  # the rehearsal, and the trials


def test_a_lock_is_no_hindrance_in_this_process(out: Path) -> None:
    lock = threading.Lock()

    def locked(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        with lock:
            return train(model, optimizer, seed, report)

    assert len(search(out, train=locked, workers=0, n_trials=2).trials) == 2


def test_a_memo_that_fills_up_is_no_other_code(out: Path) -> None:
    batches: dict[int, Any] = {}

    def remembers(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, report: Report) -> float:
        if seed not in batches:
            batches[seed] = own.batch(seed)
        return train(model, optimizer, seed, report)

    search(out, train=remembers, n_trials=2)
    assert list(batches) == [0]
    before = times(out)
    search(out, train=remembers, n_trials=3)
    assert before.items() <= times(out).items()


def test_what_changed_since_is_refused_with_the_difference(out: Path) -> None:
    search(out)
    before = times(out)
    space = {"learning_rate": {"low": 1e-3, "high": 0.2}}
    with pytest.raises(Refusal, match=r"config\.search\.space\.learning_rate\.high: 0\.1 → 0\.2\); .*overwrite=True"):
        search(out, space=space)
    with pytest.raises(Refusal, match=r"\(own_model\.table: mup → sp\); choose another name=NAME"):
        search(out, table="sp")

    class Other(own.Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    with pytest.raises(Refusal, match=r"code\.Other\.forward: absent → [0-9a-f]{12}"):
        search(out, build=lambda width: Other(width))
    assert times(out) == before
    search(out, space=space, overwrite=True)
    assert not set(times(out).values()) & set(before.values())


def test_a_transfer_of_such_a_study_is_refused(out: Path) -> None:
    search(out)
    with pytest.raises(Refusal, match="study=mine searched a model that only its author's code can build; its ladder"):
        load_study(out / "sweeps", "mine")


# ----------------------------------------------------------------------------------------------------- kill -9, scripts
SCRIPT = """
import sys
import mutune
from tests.search import own
mutune.search.run(own.build, own.slowly, own.SPACE, base=16, n_trials=4, n_startup_trials=2, cohort=2, workers=2,
                  name="mine", out=sys.argv[1])
"""


def start(script: Path, out: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(script), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(doors.ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_killed_parent_takes_its_workers_along_and_a_rerun_equals_an_undisturbed_study(tmp_path: Path) -> None:
    """The script has no `if __name__ == "__main__"`: workers do not run it again."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = start(script, tmp_path / "killed")

    def mid_study() -> bool:
        begun = list((tmp_path / "killed").glob("sweeps/mine/trials/*/metrics.jsonl"))
        # in this order: while no trial has begun, Optuna may still be making study.db, and a second maker would fail it
        return sum(p.stat().st_size > 0 for p in begun) > 2 and len(stored(tmp_path / "killed")) >= 2

    doors.wait_until(mid_study, process)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    finished = stored(tmp_path / "killed")
    assert 2 <= len(finished) < 4
    deadline = time.monotonic() + 10
    while alive := [p for p in children if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]:
        assert time.monotonic() < deadline, f"workers outlived their parent: {alive}"
        time.sleep(0.1)
    for out in ("killed", "calm"):
        search(tmp_path / out, train=own.slowly, n_startup_trials=2, cohort=2)
    assert {number: stored(tmp_path / "killed")[number] for number in finished} == finished
    assert stored(tmp_path / "killed") == stored(tmp_path / "calm")


def test_the_room_hands_out_run_without_loading_torch_or_optuna() -> None:
    code = "import sys, mutune; mutune.search; print([n for n in ('torch', 'optuna') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=doors.ROOT, check=True)
    assert done.stdout == "[]\n"
    assert mutune.search.run.__module__ == "mutune.own_model"
    with pytest.raises(AttributeError, match=r"module mutune\.search has no attribute ran"):
        mutune.search.ran  # noqa: B018
