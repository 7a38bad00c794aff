"""The table of accelerators: what torch reports is recognised, and no number is stated twice."""

import pytest

from mutune.certificate.config import PriceConfig
from mutune.errors import Refusal
from mutune.scaling.hardware import ACCELERATORS, EXAMPLE, MFU, accelerator, recognised

REPORTED = [
    ("NVIDIA H100 80GB HBM3", "h100-sxm"),
    ("NVIDIA H100 PCIe", "h100-pcie"),
    ("NVIDIA H100 NVL", "h100-nvl"),
    ("NVIDIA H200", "h200"),
    ("NVIDIA H200 NVL", "h200-nvl"),
    ("NVIDIA B200", "b200"),
    ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
    ("NVIDIA A100 80GB PCIe", "a100-80gb"),
    ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
    ("NVIDIA L40S", "l40s"),
    ("AMD Instinct MI300X", "mi300x"),
]


@pytest.mark.parametrize(("name", "key"), REPORTED)
def test_the_name_that_torch_reports_is_recognised(name: str, key: str) -> None:
    assert recognised(name) == key


def test_every_kind_in_the_table_is_recognised_by_some_name() -> None:
    assert {key for _, key in REPORTED} == set(ACCELERATORS)


@pytest.mark.parametrize(
    "name", ["NVIDIA GH200 480GB", "NVIDIA L40", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla V100-SXM2-16GB", "cpu", ""]
)
def test_what_only_looks_like_it_is_not(name: str) -> None:
    assert recognised(name) is None


def test_unknown_hardware_is_refused_with_what_is_known() -> None:
    with pytest.raises(Refusal, match=r"^hardware=h100 is unknown; known: h100-sxm, h100-pcie, .*mi300x\.$"):
        accelerator("h100")


def test_bfloat16_is_the_faster_format_everywhere_and_its_peak_is_the_dense_one() -> None:
    for kind in ACCELERATORS.values():
        assert kind.peak_flops("bfloat16") > 2 * kind.peak_flops("float32") > 1e13
    assert accelerator("h100-sxm").bf16_flops == pytest.approx(1979e12 / 2, rel=1e-3)  # its data sheet, with sparsity


def test_the_prices_of_a_certificate_are_those_of_the_table() -> None:
    prices, kind = PriceConfig(), accelerator(EXAMPLE)
    assert prices.flops_per_gpu_second == pytest.approx(MFU * kind.bf16_flops, rel=0.02)
    assert prices.gpu_hour == kind.gpu_hour
