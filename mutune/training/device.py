"""Where runs compute, and how much memory is free and taken there."""

import math
import re
import resource
import runpy
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

#: The files of a control group: its limit, what it holds, and what of that Linux would give back.
V2 = ("memory.max", "memory.current", "inactive_file")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")

if TYPE_CHECKING:
    import torch


def device_name(device: str) -> str:
    """`auto` is CUDA where there is one, else the CPU. A torch that was built for CPUs alone is not loaded for that."""
    if device != "auto":
        return device
    if _is_for_cpus():
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_device(device: str) -> "torch.device":
    """The device of that name, as `device_name` has it."""
    import torch

    return torch.device(device_name(device))


def kind_of(device: str) -> str:
    """`cuda` of `cuda:1`."""
    return device.partition(":")[0]


def free_memory(device: str) -> int:
    """Bytes that are free on `device`."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return int(min(psutil.virtual_memory().available, left_to_group()))


def left_to_group(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that a container or a Slurm job (`--mem`) leaves this process: the least of its control groups' limits less
    what they hold, what Linux would give back not counted; infinite where no limit is set.

    Args:
        groups, own: where Linux has the groups (v2, or v1's below `memory/`), and those of this process.
    """
    left = math.inf
    for line in own.read_text().splitlines() if own.is_file() else ():
        kinds, path = line.split(":", 2)[1:]
        if kinds and "memory" not in kinds.split(","):
            continue
        root, names = (groups / "memory", V1) if kinds else (groups, V2)
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(root):
                left = min(left, _left(group, *names))
    return max(0, left)


def _left(group: Path, limit: str, used: str, cached: str) -> float:
    """Bytes that one control group leaves; infinite where it has no limit, or is not to be seen here."""
    try:
        most, now = ((group / name).read_text().strip() for name in (limit, used))
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(most) - int(now) + int(held[cached])
    except (OSError, ValueError, KeyError):  # ValueError: "max"
        return math.inf


def used_memory(device: str) -> tuple[int, int]:
    """Bytes that this process holds on `device`, now and at its peak: torch's tensors on a GPU, all of the process
    elsewhere.
    """
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.memory_allocated(device)), int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss), _peak_resident()


def _peak_resident() -> int:
    """Linux's own count of this program; `getrusage` also knows that of the program it was forked from."""
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@cache
def _is_for_cpus() -> bool:
    """Whether the installed torch says of itself that it was built for neither CUDA nor ROCm."""
    spec = find_spec("torch")
    assert spec is not None, "torch is one of mutune's requirements"
    assert spec.origin is not None
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return build.get("cuda", "?") is None and build.get("hip", "?") is None
