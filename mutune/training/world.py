"""One process of a run among the others, and what they tell each other.

Numbers go over gloo, whatever the model computes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from mutune.errors import Refusal
from mutune.parametrization.finding import AuditError, Finding

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`, and where it computes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether it is the process that writes records and speaks."""
        return self.rank == 0

    def gather(self, value: float) -> list[float]:
        """Everybody's number, by rank."""
        if self.size == 1:
            return [value]
        parts = [torch.zeros(1, dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(parts, torch.tensor([value], dtype=torch.float64))
        return [part.item() for part in parts]

    def total(self, value: float) -> float:
        """The sum of everybody's numbers, in the order of ranks, so that each process has the same bits."""
        return sum(self.gather(value))

    def any(self, flag: bool) -> bool:
        """Whether it is so for anybody."""
        return self.total(float(flag)) > 0

    def share(self, thing: T) -> T:
        """What the first process has."""
        if self.size == 1:
            return thing
        box = [thing]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Until all are here."""
        self.gather(0.0)

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here, once it has succeeded everywhere.

        Raises:
            Refusal, OSError, AuditError: the first process's that has one, to all of them, as `shared`.
        """
        if self.size == 1:
            return work()
        result, failure = None, None
        try:
            result = work()
        except (Refusal, OSError, AuditError) as error:
            failure = error
        failures: list[Exception | None] = [None] * self.size
        dist.all_gather_object(failures, failure)
        for rank, found in enumerate(failures):
            if found is not None:
                raise shared(found, "" if rank == 0 else f"process {rank} of {self.size}: ")
        return cast(T, result)

    def agree(self, what: str, value: str, cure: str) -> None:
        """Refuse what is not the same everywhere.

        Args:
            what: `data` of `process 1 has other data`.
            cure: what to do about it.

        Raises:
            Refusal: to all, as `shared`.
        """
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if other != values[0]:
                first = f"the first has {values[0]}"
                raise shared(Refusal(f"process {rank} of {self.size} has other {what} ({other}; {first}); {cure}."))


class SharedAuditError(AuditError):
    """What the audit of one process found, raised by all."""

    def __init__(self, findings: Sequence[Finding], whose: str) -> None:
        super().__init__(findings)
        self.whose = whose

    def __str__(self) -> str:
        return f"{self.whose}{super().__str__()}"


def shared(error: Exception, whose: str = "") -> Exception:
    """The same error, marked as one that all processes raise: the first says it.

    Args:
        whose: put before its sentence.
    """
    if isinstance(error, AuditError):
        error = SharedAuditError(error.findings, whose)
    elif whose:
        error = (Refusal if isinstance(error, Refusal) else OSError)(f"{whose}{error}")
    error.shared = True  # type: ignore[attr-defined]
    return error


def alone(device: torch.device) -> World:
    """A run of one process."""
    return World(0, 1, device)


def reduce_last(model: nn.Module, last: bool) -> None:
    """Before a backward pass: whether it is the step's last, at which replicas add up their gradients (FSDP2)."""
    if hasattr(model, "set_requires_all_reduce"):
        fsdp = cast(Any, model)
        fsdp.set_is_last_backward(last)
        fsdp.set_requires_all_reduce(last)


def whole(value: torch.Tensor) -> torch.Tensor:
    """The number or tensor itself, where it is sharded or partial (DTensor): a collective."""
    return cast(Any, value).full_tensor() if is_sharded(value) else value


def is_sharded(value: torch.Tensor) -> bool:
    """Whether this process has a part of it (DTensor)."""
    return hasattr(value, "full_tensor")
