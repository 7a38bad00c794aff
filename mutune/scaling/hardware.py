"""Accelerators as data: what a data sheet says of each, and a price that is a setting and no quote.

Every number can be overridden where it is used. Peaks are dense (no structured sparsity), of the whole device.
"""

import re
from dataclasses import dataclass

from mutune.errors import require

MFU = 0.4  # share of the peak that training is assumed to use, where none was measured
RESERVED = 0.08  # of a GPU's memory, for CUDA's context, NCCL's buffers and fragmentation: assumed, not measured
CURRENCY = "USD"  # of the prices below
EXAMPLE = "h100-sxm"  # what defaults and messages take


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
        bf16_flops: dense peak of products of bfloat16 matrices, FLOP/s.
        fp32_flops: peak in float32 without TF32, which torch leaves off.
        memory_bytes: as sold, 1 GB = 10^9.
        gpu_hour: what an hour of it is taken to cost, in `CURRENCY`.
        words: all are words of the name that torch reports of it.
    """

    bf16_flops: float
    fp32_flops: float
    memory_bytes: float
    gpu_hour: float
    words: tuple[str, ...]

    def peak_flops(self, dtype: str) -> float:
        """Peak of products in `float32` or `bfloat16`, FLOP/s."""
        return self.bf16_flops if dtype == "bfloat16" else self.fp32_flops


# Where a data sheet gives bfloat16 with sparsity only, its half is written.
ACCELERATORS = {
    # NVIDIA H100 Tensor Core GPU data sheet: SXM, PCIe; NVL
    "h100-sxm": Accelerator(989.4e12, 67e12, 80e9, 2.5, ("h100", "hbm3")),
    "h100-pcie": Accelerator(756e12, 51e12, 80e9, 2.0, ("h100", "pcie")),
    "h100-nvl": Accelerator(835e12, 60e12, 94e9, 2.3, ("h100", "nvl")),
    # NVIDIA H200 Tensor Core GPU data sheet: SXM, NVL
    "h200": Accelerator(989.4e12, 67e12, 141e9, 3.0, ("h200",)),
    "h200-nvl": Accelerator(835e12, 60e12, 141e9, 2.8, ("h200", "nvl")),
    # NVIDIA DGX B200 data sheet, an eighth of the system
    "b200": Accelerator(2.25e15, 75e12, 180e9, 5.0, ("b200",)),
    # NVIDIA A100 Tensor Core GPU data sheet
    "a100-80gb": Accelerator(312e12, 19.5e12, 80e9, 1.5, ("a100", "80gb")),
    "a100-40gb": Accelerator(312e12, 19.5e12, 40e9, 1.2, ("a100", "40gb")),
    # NVIDIA L40S data sheet
    "l40s": Accelerator(362e12, 91.6e12, 48e9, 0.9, ("l40s",)),
    # AMD Instinct MI300X data sheet
    "mi300x": Accelerator(1307.4e12, 163.4e12, 192e9, 2.5, ("mi300x",)),
}


def accelerator(key: str) -> Accelerator:
    """The accelerator of that name.

    Raises:
        Refusal: there is none.
    """
    require(key in ACCELERATORS, f"hardware={key} is unknown; known: {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[key]


def recognised(device_name: str) -> str | None:
    """The key of the device that torch reports under this name (`NVIDIA H100 80GB HBM3`); None where none is sure.

    A part of a device (MIG) is none of them.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    fitting = [key for key, device in ACCELERATORS.items() if words.issuperset(device.words)]
    if "mig" in words or not fitting:
        return None
    return max(fitting, key=lambda key: len(ACCELERATORS[key].words))


def default_flops_per_gpu_second(key: str = EXAMPLE) -> float:
    """What training in bfloat16 is assumed to get out of a device, to two digits."""
    return float(f"{MFU * ACCELERATORS[key].bf16_flops:.2g}")
