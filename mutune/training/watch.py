"""The guard's eyes: at every probe step a record is completed by what is measured of the live run, then judged."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from mutune.data.fingerprint import fingerprint
from mutune.training.alarms import Alarm
from mutune.training.guard import Guard
from mutune.training.guard_rules import DIFFERS
from mutune.training.loop import Record
from mutune.training.probes import Probe

OWN = "dtype."  # of what a probe says, what each process has for itself


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
            measured = self.probe.measure(self._forward)
            words = {key: str(value) for key, value in measured.items() if key.startswith(OWN)}
            words["data_fingerprint"] = " ".join(map(fingerprint, self._tokens()))
            record |= measured | agreed(words)
        return self.guard.observe(record)


def agreed(words: dict[str, str]) -> dict[str, str]:
    """What every process should say alike, as the first says it; under `differs.<what>` what others say who do not."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return words
    of_all = [dict[str, str]()] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(of_all, words)
    first, found = of_all[0], dict(of_all[0])
    for key in sorted({key for each in of_all for key in each}):
        said = [each.get(key, "nothing") for each in of_all]
        others = [f"{other} at rank {rank}" for rank, other in enumerate(said) if other != first.get(key, "nothing")]
        if others:
            found[f"{DIFFERS}{key}"] = ", ".join(others)
    return found
