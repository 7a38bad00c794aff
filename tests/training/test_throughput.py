"""Speed, memory, cost and time left, from a record's own tokens and seconds."""

import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.model.shape import ModelConfig, base_config
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import ParametrizationConfig
from mutune.scaling.hardware import ACCELERATORS
from mutune.training.config import LoopConfig, RunSpec, StageConfig
from mutune.training.price import price
from mutune.training.schedule import ScheduleConfig
from mutune.training.throughput import Rates, Throughput, rates

STAGES = (StageConfig(32, 8, 10), StageConfig(64, 2, 10))  # 256 tokens per step, then 128


def tiny_spec(stages: tuple[StageConfig, ...]) -> RunSpec:
    model = ModelConfig()
    return RunSpec(
        model=model,
        data=DataConfig(),
        tokenizer=TokenizerConfig(kind="bytes"),
        parametrization=ParametrizationConfig(),
        base=base_config(model),
        hyperparameters=BaseHyperparameters(),
        schedule=ScheduleConfig(),
        stages=stages,
        loop=LoopConfig(),
    )


def fed(throughput: Throughput, *records: tuple[int, float]) -> list[dict[str, Any]]:
    return [throughput.of({"step": step, "seconds": seconds}) for step, seconds in records]


def test_tokens_per_second_are_those_since_the_record_before() -> None:
    records = fed(Throughput(tiny_spec(stages=STAGES), "cpu", Rates()), (1, 2.0), (3, 3.0), (12, 5.0))
    assert [record["tokens_per_second"] for record in records] == [
        256 / 2,
        2 * 256 / 1,
        (7 * 256 + 2 * 128) / 2,  # over the end of the first stage
    ]


def test_mfu_is_model_flops_over_the_peak_of_all_processes() -> None:
    spec = tiny_spec(stages=STAGES)
    (record,) = fed(Throughput(spec, "cpu", Rates(peak_flops=1e9), processes=4), (2, 4.0))
    assert record["mfu"] == pytest.approx(2 * 256 * price(spec).stages[0].flops_per_token / 4 / (4 * 1e9))


def test_cost_counts_every_process_and_what_was_paid_before() -> None:
    throughput = Throughput(tiny_spec(stages=STAGES), "cpu", Rates(gpu_hour=3.0), processes=2, start_step=4, cost=10.0)
    first, second = fed(throughput, (5, 3600.0), (6, 7200.0))
    assert (first["cost"], second["cost"]) == (16.0, 22.0)


def test_time_left_reckons_with_the_stages_to_come() -> None:
    spec = tiny_spec(stages=STAGES)
    throughput = Throughput(spec, "cpu", Rates())
    assert throughput.seconds_left is None
    fed(throughput, (1, 1.0), (2, 2.0))
    first, second = (stage.flops_per_token for stage in price(spec).stages)
    assert second > first
    assert throughput.seconds_left == pytest.approx((8 * 256 * first + 10 * 128 * second) / (256 * first))
    fed(throughput, (20, 30.0))
    assert throughput.seconds_left == 0


def test_only_the_last_records_say_how_fast_it_is() -> None:
    throughput = Throughput(tiny_spec(stages=(StageConfig(32, 8, 1000),)), "cpu", Rates())
    fed(throughput, *((step, 100.0 * step) for step in range(1, 11)))
    fed(throughput, *((10 + step, 1000.0 + step) for step in range(1, 31)))
    assert throughput.seconds_left == pytest.approx(960)


def test_after_a_resume_steps_before_it_count_as_no_work() -> None:
    (record,) = fed(Throughput(tiny_spec(stages=STAGES), "cpu", Rates(), start_step=5), (6, 2.0))
    assert record["tokens_per_second"] == 128


def test_a_cpu_has_no_peak_and_no_price_unless_they_are_given() -> None:
    assert rates("cpu", "float32") == Rates()
    (record,) = fed(Throughput(tiny_spec(stages=STAGES), "cpu", rates("cpu", "float32")), (1, 1.0))
    assert record.keys() == {"memory_bytes", "tokens_per_second"}
    assert rates("cpu", "float32", peak_flops=1e11, gpu_hour=0.1) == Rates(1e11, 0.1)
    kind = ACCELERATORS["l40s"]
    assert rates("cpu", "bfloat16", hardware="l40s") == Rates(kind.bf16_flops, kind.gpu_hour)


def test_a_gpu_s_peak_is_looked_up_by_the_name_that_torch_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, key in (("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA H100 PCIe", "h100-pcie")):
        cuda = SimpleNamespace(get_device_name=lambda _, name=name: name)
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
        assert rates("cuda", "bfloat16").peak_flops == ACCELERATORS[key].bf16_flops
        assert rates("cuda", "bfloat16", peak_flops=1.0).peak_flops == 1.0
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(get_device_name=lambda _: "NVIDIA X1"))
    )
    assert rates("cuda", "bfloat16") == Rates()


def test_memory_is_the_peak_of_this_process() -> None:
    (record,) = fed(Throughput(tiny_spec(stages=STAGES), "cpu", Rates()), (1, 1.0))
    now = psutil.Process().memory_info().rss
    assert 0.9 * now < record["memory_bytes"] < psutil.virtual_memory().total
