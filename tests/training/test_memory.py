"""The arithmetic of memory against torch: its trackers on fake tensors, and processes that really train."""

import json
import subprocess
import sys
from typing import Any

import pytest

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.model.shape import ModelConfig, base_config, tensor_specs
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.scaling.memory import ForwardPass, Sharding, decoder_size, logits_at_once, peak_memory
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.peak import measure_step
from mutune.training.price import COMPUTE_BYTES, price
from mutune.training.schedule import ScheduleConfig
from tests.doors import ROOT
from tests.soak import record

WITHIN = 0.15
GPT2 = 50257
BTLM = {"width": 2560, "depth": 32, "num_heads": 32, "ffn_width": 6826}
NARROW = {"width": 384, "depth": 6, "num_heads": 6}

ALONE: dict[str, Any] = {"processes": 1, "vocab_size": GPT2, "recomputed": "none"}
SHORT = {**ALONE, "shape": NARROW, "sequences": 2, "context_length": 256}
LONG = {**ALONE, "shape": NARROW, "vocab_size": 256, "sequences": 2, "context_length": 1024}
#: One process, without FSDP.
LONE_CASES = [
    {**case, "bf16": bf16, "attention": attention, "passes": passes}
    for case in (SHORT, LONG)
    for bf16, attention, passes in (
        (False, "sdpa", 1),
        (False, "sdpa", 2),
        (False, "explicit", 1),
        (True, "sdpa", 1),
        (True, "explicit", 1),
    )
]
ON_EIGHT: dict[str, Any] = {
    "shape": BTLM,
    "processes": 8,
    "vocab_size": GPT2,
    "sequences": 1,
    "context_length": 8192,
    "bf16": True,
    "attention": "causal",
    "on_gpus": True,
}
#: BTLM-3B's shape on eight processes.
BTLM_CASES = [{**ON_EIGHT, "recomputed": how} for how in ("none", "selective", "full")]
#: The same blocks, fewer of them, in other ways.
ON_EIGHT_8 = {**ON_EIGHT, "shape": {**BTLM, "depth": 8}, "sequences": 2, "context_length": 2048, "recomputed": "none"}
OTHER_CASES: list[dict[str, Any]] = [
    {**ON_EIGHT_8, "reshard": False},
    {**ON_EIGHT_8, "bf16": False},
    {**ON_EIGHT_8, "recomputed": "full", "sequences": 8, "passes": 2},
    {**ON_EIGHT_8, "recomputed": "selective", "passes": 2},
    {**ON_EIGHT_8, "attention": "sdpa", "sequences": 1},
    {**ON_EIGHT_8, "attention": "explicit", "sequences": 1},
    {**ON_EIGHT_8, "processes": 64, "recomputed": "full"},
]


def track(cases: list[dict[str, Any]]) -> list[int]:
    """What torch's trackers count of each."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.tracked", json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout.splitlines()[-1]))


def estimated(case: dict[str, Any]) -> int:
    """What the arithmetic says of it."""
    shape = ModelConfig(**case["shape"])
    size = decoder_size(
        tensor_specs(shape, case["vocab_size"]),
        width=shape.width,
        ffn_width=shape.ffn,
        heads=shape.heads,
        depth=shape.depth,
        gated=True,
        alibi=True,
    )
    run = ForwardPass(
        case["sequences"],
        case["context_length"],
        2 if case["bf16"] else 4,
        case["attention"],
        case["recomputed"],
        accumulates=case.get("passes", 1) > 1,
        logits_at_once=logits_at_once("cuda" if case.get("on_gpus") else "cpu"),
    )
    return peak_memory(size, run, Sharding(case["processes"], reshard=case.get("reshard", True))).total


def ratios(cases: list[dict[str, Any]]) -> list[float]:
    """Estimated over counted, of each."""
    return [estimated(case) / count for case, count in zip(cases, track(cases), strict=True)]


def test_one_process_holds_what_the_tracker_counts() -> None:
    small = [{**case, "shape": {**NARROW, "depth": 2}} for case in (LONE_CASES[1], LONE_CASES[3], LONE_CASES[7])]
    assert ratios(small) == pytest.approx([1.0] * 3, abs=0.05)


def test_blocks_of_btlm_on_eight_processes_hold_what_the_tracker_counts() -> None:
    few = [{**case, "shape": {**BTLM, "depth": 3}} for case in BTLM_CASES]  # all 32 of them are in the soak
    assert ratios(few) == pytest.approx([1.0] * 3, abs=0.1)


def spec_of(width: int, depth: int, sequences: int, context: int, batch: int, **loop: Any) -> RunSpec:
    """A run of a model with GPT-2's vocabulary and heads of 64."""
    model = ModelConfig(width=width, depth=depth, head_size=64)
    return RunSpec(
        model=model,
        data=DataConfig(),
        tokenizer=TokenizerConfig(kind="gpt2"),
        parametrization=ParametrizationConfig(),
        base=base_config(model),
        hyperparameters=BaseHyperparameters(),
        schedule=ScheduleConfig(),
        stages=(StageConfig(context, batch, 10),),
        loop=LoopConfig(micro_sequences=sequences, **loop),
    )


def test_a_process_that_trains_grows_by_what_is_estimated() -> None:
    spec = spec_of(width=384, depth=4, sequences=1, context=256, batch=2)
    measured = measure_step(spec, 0, sequences=1, device="cpu", heap=False)
    assert measured is not None
    assert price(spec).bytes == pytest.approx(measured, rel=WITHIN)


#: width, depth, sequences at a time, context, sequences of a step; number format, attention
MEASURED: list[tuple[int, int, int, int, int, str, str]] = [
    (448, 12, 2, 256, 2, "float32", "sdpa"),
    (448, 12, 2, 256, 4, "float32", "sdpa"),
    (448, 12, 2, 256, 4, "bfloat16", "explicit"),
    (832, 12, 2, 512, 2, "float32", "sdpa"),
    (960, 22, 1, 256, 2, "float32", "sdpa"),
]


@pytest.mark.soak
def test_models_of_50_to_300_million_parameters_hold_what_is_estimated_within_15_percent() -> None:
    rows: list[dict[str, Any]] = []
    off: dict[bool, list[float]] = {False: [], True: []}  # by heap
    for width, depth, sequences, context, batch, dtype, attention in MEASURED:
        spec = spec_of(width, depth, sequences, context, batch, dtype=dtype, attention=attention)
        for heap in (False, True):
            measured, counted = measure_step(spec, 0, sequences, "cpu", heap=heap), price(spec, heap=heap)
            assert measured is not None
            off[heap].append(counted.bytes / measured - 1)
            rows.append(
                {
                    "where": f"this CPU, {'a heap that keeps what is freed' if heap else 'freed memory given back'}",
                    "parameters": f"{counted.parameters / 1e6:.0f}M",
                    "width × depth": f"{width} × {depth}",
                    "one forward pass": f"{sequences} × {context}",
                    "passes": batch // sequences,
                    "way": f"{dtype} {attention}",
                    "recomputed": "none",
                    "measured, MiB": f"{measured / 2**20:,.0f}",
                    "estimated, MiB": f"{counted.bytes / 2**20:,.0f}",
                    "ratio": f"{counted.bytes / measured:.3f}",
                }
            )
    cases = [*LONE_CASES, *BTLM_CASES, *OTHER_CASES]
    tracked = track(cases)
    rows += [_tracked_row(case, count) for case, count in zip(cases, tracked, strict=True)]
    record("target_memory", "Memory of a process that trains: estimated, and measured or tracked", rows)
    off[False] += [estimated(case) / count - 1 for case, count in zip(cases, tracked, strict=True)]
    assert max(map(abs, off[False])) < WITHIN
    assert max(map(abs, off[True])) < WITHIN


def _tracked_row(case: dict[str, Any], counted: int) -> dict[str, Any]:
    shape, need = ModelConfig(**case["shape"]), estimated(case)
    parameters = sum(spec.size for spec in tensor_specs(shape, case["vocab_size"]))
    dtype = next(name for name, count in COMPUTE_BYTES.items() if (count == 2) == case["bf16"])
    kept = "" if case.get("reshard", True) else ", blocks stay gathered"
    return {
        "where": f"fake tensors, 1 of {case['processes']} processes{kept}",
        "parameters": f"{parameters / 1e6:,.0f}M",
        "width × depth": f"{shape.width} × {shape.depth}",
        "one forward pass": f"{case['sequences']} × {case['context_length']}",
        "passes": case.get("passes", 1),
        "way": f"{dtype} {case['attention']}",
        "recomputed": case["recomputed"],
        "measured, MiB": f"{counted / 2**20:,.0f}",
        "estimated, MiB": f"{need / 2**20:,.0f}",
        "ratio": f"{need / counted:.3f}",
    }
