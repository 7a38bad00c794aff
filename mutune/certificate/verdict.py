"""What a ladder, and how proxy and target differ, allow to be said. The rules are data.

Octaves are of the base learning rate. The thresholds are judgements, stated once, here; how often they err is measured
in benchmarks/calibration.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from mutune.certificate.assessment import Assessment
from mutune.certificate.config import TransferFile
from mutune.certificate.differences import FFN, Difference
from mutune.certificate.drift import MAX_DOUBLINGS, Slope
from mutune.certificate.points import AXES
from mutune.certificate.settle import deciding_rung, settling_rung
from mutune.certificate.valleys import Valleys
from mutune.parametrization.rules import get_table

GO_OCTAVES = 0.5  # the expected optimum lies this close to the transferred rate
FAR_OCTAVES = 1.0  # further than this from it, the rate does not transfer
GO_RISK = 0.07  # the chance that it lies further than that, with which GO may be said
CARE_RISK = 0.25  # the same for GO WITH CARE
NO_GO_OCTAVES, NO_GO_CHANCE = 0.75, 0.85  # NO-GO: it is expected beyond the first, and beyond GO_OCTAVES so surely
CLEAR = 0.5  # of GO's risk and distance, and of NO-GO's doubt: within it a ladder stops early
FLAT_CHANCE = 0.02  # that noise alone looks like the valleys, from which on there are none to speak of
MIN_RUNGS = 3  # values of the width with an optimum inside their rates, where the target's lies beyond them
MAX_RATIO = 4.0  # target over proxy, or the inverse, on an axis that the ladder did not measure


@dataclass(frozen=True)
class Verdict:
    """The verdict and its reasons, each a sentence with numbers in it; `settle`: what would make it firmer."""

    verdict: str
    reasons: list[str]
    settle: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """What a verdict is given on.

    Attributes:
        differences: between proxy and target.
        assessment: of the ladder; None without one.
        table: the parametrization's name; None where it is not known.
    """

    differences: list[Difference]
    assessment: Assessment
    table: str | None = None

    def difference(self, axis: str) -> Difference | None:
        """The row of an axis, None where proxy and target agree."""
        return next((d for d in self.differences if d.axis == axis), None)


def verdict_of(case: Case) -> str:
    """The verdict of a ladder, without its sentences.

    Its two questions are how far the optimum at the target is expected from the transferred rate, and how likely it
    is further than `FAR_OCTAVES`. Where there are no valleys to speak of, nothing is said. Too far, as far towards the
    target as was measured and calibrated, is NO-GO whatever else holds; then what was not measured makes NOT CERTIFIED.
    """
    drift = case.assessment.drift
    if drift is None or _flat(case):
        return "NOT CERTIFIED"
    chance, centre = _far(case.assessment)
    if chance > NO_GO_CHANCE and abs(centre) > NO_GO_OCTAVES:
        return "NO-GO"
    if any(rule.reason(case) for rule in NOT_CERTIFIED):
        return "NOT CERTIFIED"
    sure = _is_near(case.assessment) and not case.assessment.unmeasured
    return "GO" if sure and not _diverged(case.assessment) else "GO WITH CARE"


def judge(case: Case) -> Verdict:
    """The verdict of a ladder, with its reasons and what would settle it."""
    verdict, assessment = verdict_of(case), case.assessment
    found = [(reason, rule) for rule in NOT_CERTIFIED if (reason := rule.reason(case))]
    missing = [reason for reason, _ in found]
    settle = [cure for _, rule in found if (cure := rule.cure(case))]
    if assessment.drift is None:
        return Verdict(verdict, missing, settle)
    decided = _decided(assessment)
    if verdict == "NO-GO":
        settle = [*_instead(assessment), *settle]
        chance, said = _percent(_far(assessment)[0]), _said(assessment.within_reach())
        return Verdict(verdict, [f"{said}: more than {GO_OCTAVES:g} octave with {chance}", *decided, *missing], settle)
    said = _said(assessment)
    if missing:
        return Verdict(verdict, [*missing, said, *decided], settle)
    risk = assessment.drift.chance(abs(assessment.distance) > FAR_OCTAVES)
    near = f"{said}: within {FAR_OCTAVES:g} octave with {_percent(1 - risk)}"
    if verdict == "GO":
        return Verdict(verdict, [near, *decided])
    short = []
    if alone := assessment.unmeasured:
        short.append(f"no rung varies its {' and '.join(alone)}, and laws alone make no GO")
        settle = [_next_rung(case)]
    if lost := _diverged(assessment):
        short.append(lost)
        lower = 2.0 ** (assessment.log2_rate - 1)
        settle = [*settle, f"hyperparameters.learning_rate={lower:.4g}, an octave lower, judged in its place"]
    if not _is_near(assessment):
        short.insert(0, f"that is short of GO ({GO_OCTAVES:g} and {_percent(1 - GO_RISK)})")
    return Verdict(verdict, [f"{near}, but {'; '.join(short)}", *decided], settle)


def _is_near(assessment: Assessment, margin: float = 1.0) -> bool:
    """Whether the target's optimum is as near, and as surely, as GO asks; within `margin` of its distance and risk."""
    drift, distance = assessment.drift, assessment.distance
    assert drift is not None
    risk, centre = drift.chance(abs(distance) > FAR_OCTAVES), drift.quantiles(distance)[1]
    return bool(risk <= margin * GO_RISK and abs(centre) <= margin * GO_OCTAVES)


def _diverged(assessment: Assessment) -> str:
    """How many runs diverged so close to the transferred rate that others may; empty where none did."""
    if assessment.points.empty:
        return ""
    points = assessment.points
    near = points[(np.log2(points.learning_rate) - assessment.log2_rate).abs() <= GO_OCTAVES + 1e-9]
    lost = near[near.diverged.astype(bool)]
    if lost.empty:
        return ""
    where = ", ".join(f"{width:,.10g}" for width in sorted(set(lost.width)))
    return (
        f"{len(lost)} of {len(near)} runs within {GO_OCTAVES:g} octave of the transferred rate diverged (width {where})"
    )


def _far(assessment: Assessment) -> tuple[float, float]:
    """The chance of more than `GO_OCTAVES` to one side, and the octaves expected, as far towards the target as was
    measured. What may lie anywhere is not known to be far.
    """
    reached = assessment.within_reach()
    assert reached.drift is not None
    centre = reached.drift.quantiles(reached.distance)[1]
    return reached.drift.chance(math.copysign(1.0, centre) * reached.distance > GO_OCTAVES), centre


def foreseen(
    differences: list[Difference],
    rungs: pd.DataFrame,
    target: dict[str, float],
    table: str,
    slopes: Mapping[str, Slope] | None = None,
) -> list[str]:
    """Why a ladder of these rungs, the base first, cannot be certified whatever its runs say.

    Args:
        slopes: what laws say of the axes.
    """
    count = len(rungs)
    valleys = Valleys(rungs, (None,) * count, np.zeros(count), (), np.zeros(0))
    nothing = Assessment(pd.DataFrame(), AXES, target, 0, 0.0, slopes, valleys, None, None)
    case = Case(differences, nothing, table)
    rules = [rule for rule in NOT_CERTIFIED if rule.lasting or rule.name == "rungs"]  # at best all optima lie inside
    return [reason for rule in rules if (reason := rule.reason(case))]


def is_clear(case: Case) -> bool:
    """Whether a ladder's verdict stands by a margin (`CLEAR`), so that further rates and seeds can hardly change it.

    What no run of the ladder can mend is clear as soon as NO-GO is less likely than not.
    """
    drift = case.assessment.drift
    if drift is None:
        return False
    (far, _), said = _far(case.assessment), verdict_of(case)
    if said == "NO-GO":
        return far > 1 - CLEAR * (1 - NO_GO_CHANCE)
    if any(rule.lasting and rule.reason(case) for rule in NOT_CERTIFIED):
        return far < CLEAR
    return said == "GO" and _is_near(case.assessment, CLEAR)


def _said(assessment: Assessment) -> str:
    """Slope and distance in words."""
    drift, rungs = assessment.drift, assessment.valleys.rungs
    assert drift is not None
    slopes = []
    for i, axis in enumerate(AXES):
        if assessment.measured(axis) > 1:
            low, middle, high = drift.quantiles(drift.slopes[:, i])
            reach = f"{rungs[axis].min():,.10g}-{rungs[axis].max():,.10g}"
            slopes.append(f"{middle:+.2f} ({low:+.2f} to {high:+.2f}) octaves per doubling of the {axis} over {reach}")
    varied = [axis for axis in AXES if rungs[axis].nunique() > 1 or axis in assessment.unmeasured]
    where = ", ".join(f"{axis} {assessment.target[axis]:,.10g}" for axis in varied)
    laws = [
        f"; of that {middle:+.2f} ({low:+.2f} to {high:+.2f}) by published laws for its {axis}, which no rung varies"
        for axis in assessment.unmeasured
        if axis in (assessment.slopes or {})
        for low, middle, high in [drift.quantiles(assessment.by_laws(axis))]
    ]
    low, middle, high = drift.quantiles(assessment.distance)
    return (
        f"the optimum moves {' and '.join(slopes) or 'with one rung only'}; at {where or 'the target'} it is expected "
        f"{middle:+.2f} octaves from the transferred rate, between {low:+.2f} and {high:+.2f} with 90 %{''.join(laws)}"
    )


def _instead(assessment: Assessment) -> list[str]:
    """What to do where the transferred rate is not to be used, a sentence or none."""
    if assessment.regret is None or not assessment.is_calibrated:
        return []
    rate = 2.0 ** (assessment.log2_rate + assessment.regret.offset)
    return [
        f"hyperparameters.learning_rate={rate:.4g}, the rate of least expected cost ({assessment.regret.offset:+.2f} "
        "octaves), judged in its place"
    ]


def _decided(assessment: Assessment) -> list[str]:
    """The rung that decided, a sentence or none."""
    if (found := deciding_rung(assessment)) is None:
        return []
    rung, shift = found
    axes = [axis for axis in AXES if assessment.valleys.rungs[axis].nunique() > 1]
    where = ", ".join(f"{axis} {rung[axis]:,.10g}" for axis in axes)
    return [
        f"the rung that decides most is {where}: without it, the target's optimum would be expected "
        f"{shift:+.2f} octaves from where it is"
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


@dataclass(frozen=True)
class Rule:
    """A reason for NOT CERTIFIED: functions of the case that return a sentence, or an empty string.

    `lasting`: no further rate or seed of the same rungs takes it away.
    """

    name: str
    reason: Callable[[Case], str]
    cure: Callable[[Case], str] = lambda case: ""
    lasting: bool = True


def _beyond(axis: str, cure: str) -> Rule:
    """The target is further than `MAX_RATIO` from the proxy on an axis that no ladder measures."""

    def reason(case: Case) -> str:
        found = case.difference(axis)
        if found is None or found.ratio is None or 1 / MAX_RATIO <= found.ratio <= MAX_RATIO:
            return ""
        return f"{axis}: {found.proxy:,} → {found.target:,} ({found.ratio:.3g}×) was not measured; {cure}"

    return Rule(axis, reason)


def _differs(axis: str, cure: str) -> Rule:
    """The axis differs at all."""

    def reason(case: Case) -> str:
        found = case.difference(axis)
        return f"{axis}: {found.proxy} → {found.target}; {cure}" if found else ""

    return Rule(axis, reason)


def _axis(axis: str) -> Rule:
    """An axis of the ladder on which the target is too far from what was measured."""

    def reason(case: Case) -> str:
        ladder, target = case.assessment.valleys.rungs[axis], case.assessment.target[axis]
        doublings, reach = case.assessment.beyond(axis), case.assessment.reach(axis)
        if doublings <= reach + 1e-9:
            return ""
        nearest = ladder.max() if target > ladder.max() else ladder.min()
        what = f"the ladder's {nearest:,.10g}" if ladder.nunique() > 1 else f"the proxy's {nearest:,.10g}, unmeasured"
        long = f", which is {reach:.2g} doublings long" if reach < MAX_DOUBLINGS else ""
        return f"{axis}: the target's {target:,.10g} is {doublings:.1f} doublings from {what}{long}"

    def cure(case: Case) -> str:
        target, larger = (
            case.assessment.target[axis],
            case.assessment.target[axis] > case.assessment.valleys.rungs[axis].max(),
        )
        need = math.ceil(target / 2**MAX_DOUBLINGS if larger else target * 2**MAX_DOUBLINGS)
        times = need / case.assessment.valleys.rungs[axis].iloc[case.assessment.base]
        return f"a rung with {axis} {need:,}" + (f", {times:.3g} times the base's" if axis != "width" else "")

    return Rule(axis, reason, cure)


def _lawless(case: Case) -> str:
    """An axis that the target differs in, no rung varies, and no law speaks of."""
    assessment = case.assessment
    axes = [a for a in assessment.unmeasured if a not in (assessment.slopes or {})]
    axes = [a for a in axes if a != "depth" or case.table is None]  # of a known table `_depth` speaks
    if not axes:
        return ""
    base = assessment.valleys.rungs.iloc[assessment.base]
    ways = " and ".join(f"{axis} ({base[axis]:,.10g} → {assessment.target[axis]:,.10g})" for axis in axes)
    return f"the target differs in {ways}, which no rung varies, and no law says what follows"


def _depth(case: Case) -> str:
    found = case.difference("depth")
    if found is None or case.table is None or "depth" in get_table(case.table).transfers_over:
        return ""
    if case.assessment.measured("depth") > 1:
        return ""
    only = f"table {case.table} transfers over {' and '.join(get_table(case.table).transfers_over) or 'nothing'} only"
    return f"depth: {found.proxy} → {found.target}, and {only}; sweep at the target's depth, or ladder=[width,depth]"


def _edges(case: Case) -> str:
    edges = case.assessment.valleys.edges
    found = [f"{name} ({edges[rung]})" for rung, name in _at_edges(case).items()]
    return f"the optimum is at the edge of the tried rates, or beyond it, at {' and '.join(found)}" if found else ""


def _past_edges(case: Case) -> str:
    valleys = case.assessment.valleys
    rates = [
        f"{'below' if valleys.edges[rung] == 'low' else 'above'} {2 ** valleys.bounds[rung]:.3g} at {name}"
        for rung, name in _at_edges(case).items()
    ]
    return f"learning rates {' and '.join(rates)}"


def _at_edges(case: Case) -> dict[int, str]:
    """Rung → its name, of those next to the target and the base, where its optimum is at an edge of its rates."""
    valleys, found = case.assessment.valleys, dict[int, str]()
    for axis in AXES:
        nearest = case.assessment.nearest(axis)
        if nearest != case.assessment.base and valleys.edges[nearest]:
            found.setdefault(nearest, f"{axis} {valleys.rungs[axis].iloc[nearest]:,.10g}")
    return found | ({case.assessment.base: "the base"} if valleys.edges[case.assessment.base] else {})


def _flat(case: Case) -> str:
    chance = case.assessment.chance_of_none
    if chance <= FLAT_CHANCE:
        return ""
    return (
        "beside their noise, the losses hardly depend on the rate: such a dependence would come about by chance "
        f"{_percent(chance)} of the time"
    )


def _rungs(case: Case) -> str:
    assessment = case.assessment
    rungs, valleys = assessment.valleys.rungs["width"], assessment.valleys
    count, needed = assessment.measured("width"), MIN_RUNGS if assessment.beyond("width") > 0 else 2
    if count >= needed or assessment.target["width"] == rungs.iloc[assessment.base]:
        return ""
    inside = rungs[[edge is None for edge in valleys.edges]].nunique()
    if inside >= needed:
        return f"{inside} widths have an optimum inside the tried rates, but other axes change with them: {count} alone"
    return f"{count} width{' has' if count == 1 else 's have'} an optimum inside the tried rates, of {needed} needed"


def _more_widths(case: Case) -> str:
    rungs, target = case.assessment.valleys.rungs, case.assessment.target["width"]
    others = [axis for axis in AXES[1:] if rungs[axis].nunique() > 1]
    same = f" at the same {' and '.join(others)}" if others else ""
    wider, narrower = 2 * rungs["width"].max(), rungs["width"].min() / 2
    one = wider if wider < target else narrower  # a run of the target's own width would be the target
    return f"more widths{same}" + (f", for example {one:,.10g}" if one >= 1 and one == int(one) else "")


def _wide(case: Case) -> str:
    assessment = case.assessment
    if assessment.drift is None:
        return "too few optima were measured to say where the target's lies"
    risk = assessment.drift.chance(abs(assessment.distance) > FAR_OCTAVES)
    if risk <= CARE_RISK:
        return ""
    laws = []
    for axis in assessment.unmeasured:
        low, middle, high = assessment.drift.quantiles(assessment.by_laws(axis))
        source = "by published laws" if axis in (assessment.slopes or {}) else "for want of any law"
        laws.append(f"for its {axis}, which no rung varies, {middle:+.2f} ({low:+.2f} to {high:+.2f}) {source}")
    why = f"; {', and '.join(laws)}" if laws else ""
    return f"the optimum at the target may be more than {FAR_OCTAVES:g} octave away ({_percent(risk)}){why}"


def _next_rung(case: Case) -> str:
    if (unmeasured := case.assessment.unmeasured) and case.table is None:
        return f"runs that vary the {' and the '.join(unmeasured)} too, all else equal"
    if unmeasured:
        axes = [axis for axis in AXES if axis in unmeasured or case.assessment.valleys.rungs[axis].nunique() > 1]
        return f"a ladder that varies the {' and the '.join(unmeasured)} too: 'ladder=[{','.join(axes)}]'"

    of_width = [rule for rule in NOT_CERTIFIED if rule.name in ("width", "rungs", "interval")]

    def settled(assessment: Assessment) -> bool:
        return not any(rule.reason(replace(case, assessment=assessment)) for rule in of_width)

    return settling_rung(case.assessment, settled) if case.assessment.drift else ""


NOT_CERTIFIED = (
    _axis("width"),
    _axis("tokens"),
    _axis("batch"),
    _axis("depth"),
    Rule("depth", _depth),
    Rule("unmeasured", _lawless),
    _differs("head size", "ladders fix the head size; sweep with the target's"),
    _differs(FFN, "ladders keep this ratio; sweep with the target's"),
    _differs("positions", "sweep with the target's"),
    _differs("activation", "sweep with the target's"),
    _beyond("vocabulary", "sweep with the target's tokenizer"),
    _beyond("context", "sweep at a longer run.context_length"),
    _differs("schedule", "the best rate belongs to its schedule; sweep with the target's"),
    _beyond("decay share", "the best rate belongs to its schedule; sweep with the target's schedule.decay_fraction"),
    Rule("edge", _edges, _past_edges, lasting=False),
    Rule("flat", _flat, lambda case: "rates further apart, or more seeds", lasting=False),
    Rule("rungs", _rungs, _more_widths, lasting=False),
    Rule("interval", _wide, _next_rung, lasting=False),
)


def published_verdict(transfer: TransferFile) -> Verdict:
    """Published values come without a ladder."""
    reason = f"the values are published ones ({transfer.provenance.source}); no ladder was run for them here"
    return Verdict("NOT CERTIFIED", [reason])
