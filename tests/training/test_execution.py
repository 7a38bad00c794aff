"""Ways of computing a step: they train the same model up to rounding, and one compilation serves all trials."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.training import execution
from mutune.training.config import LoopConfig, RunSpec
from mutune.training.execution import TracedMultiplier, ways
from mutune.training.run import Run, run_to_end

CPU = torch.device("cpu")


def spec(*words: str) -> RunSpec:
    return compose("sweep", SweepConfig, ["+sweep=smoke", "run.num_steps=8", *words]).spec()


def losses(asked: RunSpec) -> list[float]:
    records = list(Run(asked, CPU).records())
    return [record["loss"] for record in records] + [records[-1]["heldout_loss"]]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiled by Dynamo, but run by torch itself: what is recompiled, and when, does not hang on the rest."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_attention_written_out_trains_as_the_fused_kernel_does() -> None:
    assert losses(spec("loop.attention=explicit")) == pytest.approx(losses(spec()), abs=1e-4)


def test_a_run_has_the_threads_of_its_study_and_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, steps = [], Run.steps

    def watched(run: Run, start_step: int) -> Iterator[Any]:
        seen.append(torch.get_num_threads())
        return steps(run, start_step)

    monkeypatch.setattr(Run, "steps", watched)
    before = torch.get_num_threads()
    values = [
        run_to_end(spec(f"loop.threads={threads}"), tmp_path / str(threads), "cpu", {}).value for threads in (1, 2)
    ]
    assert seen == [1, 2]
    assert torch.get_num_threads() == before
    assert values[1] == pytest.approx(values[0], abs=1e-4)


def test_bfloat16_trains_almost_as_float32_with_float32_weights() -> None:
    low = Run(spec("loop.dtype=bfloat16"), CPU)
    made = [record["loss"] for record in low.records()]
    full = losses(spec())[:-1]
    assert made == pytest.approx(full, abs=0.05)
    assert made != pytest.approx(full, abs=1e-5)  # it is another format
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in low.optimizer.state.values()} == {torch.float32}


def test_a_compiled_run_is_audited_and_trains_as_one_that_is_not(traced: None) -> None:
    run = Run(spec("loop.compile=true", "hyperparameters.embedding_multiplier=3.1"), CPU)
    assert sum(isinstance(module, TracedMultiplier) for module in run.model.modules()) == 2 + 3 * 2
    records = list(run.records())
    plain = losses(spec("hyperparameters.embedding_multiplier=3.1"))
    assert [r["loss"] for r in records] == pytest.approx(plain[:-1], abs=1e-4)
    assert counters["stats"]["unique_graphs"] > 0  # it was compiled


def test_no_trial_compiles_anew_what_another_has(traced: None) -> None:
    seen = []
    for rate, embedding, output, std in ((0.01, 1.0, 1.0, 0.1), (0.02, 3.1, 0.7, 0.2), (0.005, 8.0, 2.2, 0.3)):
        hyper = {"learning_rate": rate, "embedding_multiplier": embedding, "output_multiplier": output, "init_std": std}
        asked = spec("loop.compile=true")
        asked = replace(asked, hyperparameters=replace(asked.hyperparameters, **hyper))
        list(Run(asked, CPU).records())
        seen.append(counters["stats"]["unique_graphs"])
    assert seen[0] > 0
    assert seen == [seen[0]] * 3


@pytest.mark.parametrize(
    ("given", "device", "expected"),
    [
        ({}, "cpu", [("float32", "sdpa"), ("float32", "explicit"), ("bfloat16", "sdpa"), ("bfloat16", "explicit")]),
        ({"dtype": "bfloat16"}, "cuda", [("bfloat16", "sdpa"), ("bfloat16", "causal")]),
        ({"dtype": "bfloat16", "document_mask": True}, "cuda", [("bfloat16", "sdpa")]),
        ({"dtype": "bfloat16"}, "cpu", [("bfloat16", "sdpa"), ("bfloat16", "explicit")]),
        ({"dtype": "float32", "attention": "explicit"}, "cpu", [("float32", "explicit")]),
    ],
)
def test_what_is_left_open_is_tried(given: dict[str, Any], device: str, expected: list[tuple[str, str]]) -> None:
    found = ways(LoopConfig(**given), torch.device(device))
    assert [(way.dtype, way.attention) for way in found] == expected
    assert not any(way.compile for way in found)


@pytest.mark.parametrize(
    ("clocked", "seconds", "made"),
    [
        ([2.5, 0.04, 0.04, 0.04, 0.04, 0.04], 0.04, 6),  # the first sets everything up
        ([5.0, 3.0], 3.0, 2),
        ([20.0], 20.0, 1),
    ],
)
def test_a_slow_first_step_is_not_taken_for_all_of_them(
    clocked: list[float], seconds: float, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(clocked)
    monkeypatch.setattr(execution, "_clocked", lambda steps, clock: left.pop(0))
    loop = LoopConfig(dtype="float32", attention="sdpa", compile=False)
    timing = execution.time_steps(loop, lambda loop: iter(()), CPU)
    assert timing.seconds == pytest.approx(seconds)
    assert len(clocked) - len(left) == made
