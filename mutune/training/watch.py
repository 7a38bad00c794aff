"""The guard's eyes: at every probe step a record is completed by what is measured of the live run, then judged."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from mutune.data.fingerprint import fingerprint
from mutune.training.alarms import Alarm
from mutune.training.guard import Guard
from mutune.training.loop import Record
from mutune.training.probes import Probe


class Watch:
    """Judges each record of a run, with probes in between. In a distributed run every process has one.

    Args:
        guard: what judges.
        probe: what measures.
        forward: as `Probe.measure` takes it.
        tokens: → what batches are read from, corpus by corpus.
        audit: step → nothing, or `AuditError`; called at each probe.
    """

    def __init__(
        self,
        guard: Guard,
        probe: Probe,
        *,
        forward: Callable[[], Any],
        tokens: Callable[[], Iterable[np.ndarray]],
        audit: Callable[[int], None],
    ) -> None:
        self.guard, self.probe = guard, probe
        self._forward, self._tokens, self._audit = forward, tokens, audit
        probe.remember()

    def observe(self, record: Record) -> list[Alarm]:
        """What is wrong after this step; completes the record.

        Raises:
            AuditError: the model or the optimizer is not what the plan says.
        """
        every, step = self.guard.config.every, record["step"]
        if every and step % every == 0 and not record["diverged"]:
            self._audit(step)
            record |= self.probe.measure(self._forward)
            record["data_fingerprint"] = agreed(" ".join(map(fingerprint, self._tokens())))
        return self.guard.observe(record)


def agreed(mark: str) -> str:
    """A word that every process should have; where some have another than the first one, theirs."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return mark
    marks = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(marks, mark)
    others = [f"{other} at rank {rank}" for rank, other in enumerate(marks) if other != marks[0]]
    return ", ".join(others) or mark
