"""Numbers on the way: tokens per second, MFU, memory, cost and time left, from a record's own tokens and seconds."""

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mutune.errors import require
from mutune.scaling.hardware import accelerator, recognised
from mutune.training.config import RunSpec
from mutune.training.device import used_memory
from mutune.training.price import price

WINDOW = 20  # records over which the time left is reckoned
HOUR = 3600.0


@dataclass(frozen=True)
class Rates:
    """What a device's numbers are held against; None where it is not known.

    Attributes:
        peak_flops: of one, FLOP/s.
        gpu_hour: price of one's hour.
    """

    peak_flops: float | None = None
    gpu_hour: float | None = None


def rates(
    device: str,
    dtype: str,
    *,
    hardware: str | None = None,
    peak_flops: float | None = None,
    gpu_hour: float | None = None,
) -> Rates:
    """Peak and price of the present device: what is set by hand, else that of `hardware`, else that of the GPU that
    torch reports, where the table knows it. A CPU has none of its own.

    Raises:
        Refusal: the table has no such hardware.
    """
    key = hardware or (recognised(_reported(device)) if device.startswith("cuda") else None)
    kind = accelerator(key) if key else None
    return Rates(
        peak_flops=peak_flops if peak_flops is not None or kind is None else kind.peak_flops(dtype),
        gpu_hour=gpu_hour if gpu_hour is not None or kind is None else kind.gpu_hour,
    )


def _reported(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_name(device))


class Throughput:
    """Adds to each record what it says of speed, memory and cost. Feed it every record, in order.

    Args:
        spec: the run.
        device: of this process, for its memory.
        against: peak and price of one device.
        processes: devices that compute the run.
        start_step: updates done before the first record.
        cost: what the run had cost by then.
    """

    def __init__(
        self,
        spec: RunSpec,
        device: str,
        against: Rates,
        *,
        processes: int = 1,
        start_step: int = 0,
        cost: float = 0.0,
    ) -> None:
        require(processes >= 1, f"processes={processes} must be at least 1; for example processes=1.")
        self._device, self._against, self._processes = device, against, processes
        self._ends = list(accumulate(stage.num_steps for stage in spec.stages))
        self._tokens_per_step = [stage.tokens_per_step for stage in spec.stages]
        self._flops_per_token = [stage.flops_per_token for stage in price(spec).stages]
        self._cost_before = cost
        self._start = (start_step, 0.0)
        self._past = deque([self._start], maxlen=WINDOW + 1)  # (step, seconds since start)

    def of(self, record: dict[str, Any]) -> dict[str, float]:
        """The numbers of a record with `step` and `seconds` since the run was started or resumed.

        `tokens_per_second`, of all processes, and `mfu` are those of the steps since the record before, with all that
        was done between them (evaluation, checkpoints); `memory_bytes` is this process's peak so far; `cost`, of all
        processes, is in the currency of the price. `mfu` and `cost` are left out where peak or price is not known.
        """
        before, then = self._past[-1]
        step, now = int(record["step"]), float(record["seconds"])
        seconds = now - then
        self._past.append((step, now))
        found: dict[str, float] = {"memory_bytes": used_memory(self._device)[1]}
        if seconds > 0:
            found["tokens_per_second"] = self._between(before, step, self._tokens_per_step) / seconds
            if self._against.peak_flops is not None:
                done = self._flops_between(before, step)
                found["mfu"] = done / seconds / (self._processes * self._against.peak_flops)
        if self._against.gpu_hour is not None:
            found["cost"] = self._cost_before + now / HOUR * self._processes * self._against.gpu_hour
        return found

    @property
    def seconds_left(self) -> float | None:
        """At the speed of the last records, by FLOPs: a later stage's tokens cost more. None before there is one."""
        begins = len(self._past) > 2 and self._past[0] == self._start  # with an audit, and maybe by compiling
        (first, then), (last, now) = self._past[1 if begins else 0], self._past[-1]
        done = self._flops_between(first, last)
        return self._flops_between(last, self._ends[-1]) * (now - then) / done if done else None

    def _flops_between(self, first: int, last: int) -> float:
        per_step = [a * b for a, b in zip(self._tokens_per_step, self._flops_per_token, strict=True)]
        return self._between(first, last, per_step)

    def _between(self, first: int, last: int, per_step: list[float] | list[int]) -> float:
        """The sum of a number per step, by stage, over the steps after `first` up to `last`."""
        total, start = 0.0, 0
        for end, each in zip(self._ends, per_step, strict=True):
            total += each * max(0, min(last, end) - max(first, start))
            start = end
        return total
