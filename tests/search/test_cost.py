"""What a search costs, part by part, beside the recipe that others publish. Ratios of one run, never a test of
seconds.
"""

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import psutil
import pytest

from mutune.search.storage import open_storage
from tests import doors
from tests.soak import record

TRIALS, STEPS = 16, 80
SEARCH = [
    *("+sweep=proxy", "model.width=64", f"run.num_steps={STEPS}", "run.batch_sequences=8", "loop.heldout_windows=8"),
    *("search.sampler=random", f"search.n_trials={TRIALS}", "search.confirm=0", "workers=2"),
]
PR_SET_CHILD_SUBREAPER = 36  # of Linux' prctl.h
PLAIN = ["loop.dtype=float32", "loop.attention=sdpa", "loop.compile=false"]
#: Eight trials of one length, so that two workers can have half each: none diverges.
ALIKE = ["search.n_trials=8", "search.pruner=none", "search.initial=[]"]
ALIKE += ["search.space.learning_rate.low=0.004", "search.space.learning_rate.high=0.016"]
ONE = """
import json, sys
from dataclasses import replace
from pathlib import Path
from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.search.trial import Trial, run_trial
words, params, folder = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
import torch
torch.set_num_threads(1)
result = run_trial(compose("sweep", SweepConfig, words).spec(), "cpu", Trial(0, params, Path(folder), "one"))
print(json.dumps([result.value, result.diverged]))
"""


@pytest.fixture(autouse=True)
def adopts_orphans() -> None:
    """Workers outlive the command for an instant, and what forked them: they become this process's to wait for, so that
    their CPU time counts.
    """
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def cpu_seconds() -> float:
    """Of all processes that this one has begun, directly or not; all have to end."""
    deadline = time.monotonic() + 60
    while psutil.Process().children(recursive=True):
        assert time.monotonic() < deadline, "a process outlives its command"
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        time.sleep(0.05)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def searched(out: Path, *words: str) -> tuple[float, float, list[dict[str, Any]]]:
    """CPU seconds of a whole sweep, its best loss, and the parameters of its trials."""
    before = cpu_seconds()
    doors.run_apart("sweep", *SEARCH, *words, f"out={out}")
    spent, made = cpu_seconds() - before, sum(recorded(path) for path in out.rglob("metrics.jsonl"))
    assert spent > 0.7 * made, f"{spent} CPU-seconds are fewer than the {made} seconds of the trials themselves"
    study = optuna.load_study(study_name="proxy", storage=open_storage(out / "sweeps/proxy", "sqlite"))
    return spent, study.best_value, [trial.params for trial in study.trials]


def recorded(path: Path) -> float:
    """Seconds that a trial took by its own records, which are hardly more than its CPU time where cores are free."""
    return float(json.loads(path.read_text().splitlines()[-1])["seconds"])


def each_apart(out: Path, params: list[dict[str, Any]], *words: str) -> tuple[float, float]:
    """CPU seconds and the best loss of a process for each trial, two at a time as in mutune's rows."""

    def trial(number: int) -> tuple[float, bool]:
        command = [sys.executable, "-c", ONE, json.dumps([*SEARCH, *PLAIN, *words]), json.dumps(params[number])]
        done = subprocess.run(
            [*command, str(out / str(number))], cwd=doors.ROOT, capture_output=True, text=True, check=True
        )
        value, diverged = json.loads(done.stdout)
        return value, diverged

    before = cpu_seconds()
    with ThreadPoolExecutor(2) as pool:
        losses = [value for value, diverged in pool.map(trial, range(len(params))) if not diverged]
    return cpu_seconds() - before, min(losses)


@pytest.mark.soak
def test_soak_the_cost_of_a_search(tmp_path: Path) -> None:
    """The rows turn by turn, some of them three times; a ratio is of rows of the same round."""
    found: dict[str, list[tuple[float, float]]] = {}
    compiled = ["loop.dtype=float32", "loop.attention=explicit", "loop.compile=true"]
    careful, recipe = "careful: a process a trial, whole batches", "recipe: a process a trial, sequence by sequence"
    for round_ in range(3):
        out = tmp_path / str(round_)
        spent, best, params = searched(out / "none", *PLAIN, "search.pruner=none")
        rows = {
            "mutune: workers that stay, no pruning": (spent, best),
            "+ pruning: halving (the default)": searched(out / "halving", *PLAIN)[:2],
            "+ pruning: wide": searched(out / "wide", *PLAIN, "search.pruner=wide")[:2],
            f"{careful}, evaluated at the end": each_apart(out / "careful", params),
            f"{recipe}, evaluated at every step": each_apart(
                out / "recipe", params, "loop.micro_sequences=1", "loop.eval_every=1"
            ),
        }
        if round_ == 0:
            rows["+ halving, compiled: first time"] = searched(out / "cold", *compiled)[:2]
            rows["+ halving, compiled: again, code kept on disk"] = searched(out / "warm", *compiled)[:2]
            rows[f"{recipe}, evaluated at the end"] = each_apart(out / "rarely", params, "loop.micro_sequences=1")
        for name, row in rows.items():
            found.setdefault(name, []).append(row)

    def times(rival: str, name: str) -> str:
        ratios = [theirs / ours for (theirs, _), (ours, _) in zip(found[rival], found[name], strict=False)]
        return _spread(ratios, ".2f")

    record(
        "search_cost",
        f"{TRIALS} random trials of a proxy (d=64, {STEPS} steps of 1,024 tokens), two at a time: all CPU seconds, "
        "imports too",
        [
            {
                "search": name,
                "CPU s": _spread([seconds for seconds, _ in rounds], ".0f"),
                "the recipe costs so many times": times(f"{recipe}, evaluated at every step", name),
                "the careful variant": times(f"{careful}, evaluated at the end", name),
                "best loss": f"{rounds[0][1]:.4f}",
            }
            for name, rounds in found.items()
        ],
    )
    for name, rounds in found.items():
        for _, loss in rounds:
            if name != "+ pruning: wide":
                assert loss == pytest.approx(best, abs=1e-3), name


def _spread(values: list[float], form: str) -> str:
    """The median, with the lowest and the highest."""
    low, high = min(values), max(values)
    return f"{median(values):{form}}" + (f" ({low:{form}} to {high:{form}})" if len(values) > 1 else "")


@pytest.mark.soak
def test_soak_two_workers_and_the_engine(tmp_path: Path) -> None:
    walls: dict[int, list[float]] = {1: [], 2: []}
    trained: dict[int, list[float]] = {1: [], 2: []}
    idle, losses = [], set()
    for round_ in range(5):
        for workers in walls:
            out = tmp_path / f"{round_}-{workers}"
            doors.run("sweep", *SEARCH, *PLAIN, *ALIKE, f"workers={workers}", f"out={out}")
            stamps = [path.stat().st_mtime for path in out.glob("sweeps/proxy/trials/*/metrics.jsonl")]
            begun = min(path.stat().st_mtime for path in out.glob("sweeps/proxy/trials/*/config.yaml"))
            seconds = [
                json.loads(path.read_text().splitlines()[-1])["seconds"]
                for path in out.glob("sweeps/proxy/trials/*/metrics.jsonl")
            ]
            study = optuna.load_study(study_name="proxy", storage=open_storage(out / "sweeps/proxy", "sqlite"))
            losses.add(tuple(trial.value for trial in study.trials))
            assert [trial.user_attrs["diverged"] for trial in study.trials] == [False] * 8
            walls[workers].append(max(stamps) - begun)
            idle.append(1 - sum(seconds) / workers / (max(stamps) - begun))
            trained[workers].append(sum(seconds) / workers)
    assert len(losses) == 1, "one worker and two ran different trials"
    help_ = []
    for _ in range(5):
        started = time.monotonic()
        doors.run_apart("sweep", "--help")
        help_.append(time.monotonic() - started)
    gained, cores = ([o / t for o, t in zip(x[1], x[2], strict=True)] for x in (walls, trained))
    rows = [
        {"what": name, "median (lowest to highest)": _spread(values, form)}
        for name, values, form in (
            ("wall time of eight trials, one worker over two", gained, ".2f"),
            ("the same of their steps alone: what two of these cores give", cores, ".2f"),
            ("share of that time in which a worker does not train", idle, ".3f"),
            ("--help, s", help_, ".2f"),
        )
    ]
    record("engine", "Two workers, the engine's own share, and --help", rows)
