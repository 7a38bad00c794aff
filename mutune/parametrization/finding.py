"""What an audit says: one finding per mismatch, and the error that stops a run. No torch."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mutune.parametrization.plan import kind

#: Relative error up to which two rates, decays, ε or multipliers are the same number; float32 rounds at 6e-8.
TOLERANCE = 1e-6
#: Sentences that a message shows before it counts the rest.
SHOWN = 12


@dataclass(frozen=True)
class Finding:
    """One mismatch between a live run and its plan.

    Attributes:
        tensor: the parameter's canonical name; for a multiplier, its module; `optimizer` where it is about the whole.
        quantity: what was compared, with its unit where it has one.
        expected, found: the plan's value and the live one.
        diagnosis: what probably happened.
    """

    tensor: str
    quantity: str
    expected: float | str
    found: float | str
    diagnosis: str

    def __str__(self) -> str:
        return self.sentence()

    def sentence(self, alike: int = 0) -> str:
        """The finding in one sentence; `alike` counts tensors of other blocks with the same finding."""
        others = f" (and {alike} like it)" if alike else ""
        return (
            f"{self.tensor}{others}: {self.quantity} is {_shown(self.found)}, expected {_shown(self.expected)}; "
            f"{self.diagnosis}."
        )


class AuditError(Exception):
    """The live run is not the one that its plan describes. The message has one sentence per kind of finding."""

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(findings)
        self.findings = list(findings)

    def __str__(self) -> str:
        lines = _sentences(self.findings)
        shown = [f"- {line}" for line in lines[:SHOWN]]
        if len(lines) > SHOWN:
            more = len(lines) - SHOWN
            shown.append(f"- and {more} finding{'s' if more > 1 else ''} more")
        count = len(self.findings)
        return "\n".join([f"the audit found {count} mismatch{'es' if count > 1 else ''} with the plan:", *shown])


def same(found: float, expected: float) -> bool:
    """Whether two values of the optimizer or the forward pass are the same number; zero equals zero only."""
    return math.isclose(found, expected, rel_tol=TOLERANCE)


def common_ratio(ratios: Iterable[float]) -> float:
    """The value that most of them have, up to the tolerance; 1 where there is none."""
    clusters: Counter[float] = Counter()
    for ratio in ratios:
        clusters[next((known for known in clusters if same(ratio, known)), ratio)] += 1
    return clusters.most_common(1)[0][0] if clusters else 1.0


def _sentences(findings: Sequence[Finding]) -> list[str]:
    """One sentence for all blocks in which the same is wrong, in the order of the findings."""
    alike: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        shown = (_shown(finding.expected), _shown(finding.found))
        alike.setdefault((kind(finding.tensor), finding.quantity, *shown, finding.diagnosis), []).append(finding)
    return [group[0].sentence(len(group) - 1) for group in alike.values()]


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
