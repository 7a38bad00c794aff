"""Whether runs fit into the memory that is free, before any of them allocates it."""

from collections.abc import Sequence

import psutil
import torch

from mutune.errors import require
from mutune.training.config import RunSpec
from mutune.training.price import price
from mutune.training.run import resolve_device


def require_memory(specs: Sequence[RunSpec], device: str, cure: str) -> None:
    """Refuse runs that do not fit side by side: parameters, gradients, Adam's moments, activations.

    Args:
        specs: what runs at the same time on `device`.
        cure: what to do where they do not fit, for the message.
    """
    where, need = resolve_device(device), sum(price(spec).bytes for spec in specs)
    have = free_memory(where)
    at_once = f"{len(specs)} runs at once need" if len(specs) > 1 else "this run needs"
    require(
        need <= have,
        f"device={where} has {have / 2**30:.1f} GiB free and {at_once} about {need / 2**30:.1f} GiB on it; {cure}.",
    )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`."""
    return int(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
