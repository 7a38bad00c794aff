"""Slopes of coordinates over width or depth, what they must be, and what is probably wrong where they are not.

A slope is the exponent p of `RMS ∝ size^p`, least squares on log2 by seed. The bounds are measured, not derived: see
`benchmarks/check.md` for correct runs and for how far the nearest wrong rules lie. No torch.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mutune.parametrization.plan import Plan, TensorPlan
from mutune.verification.places import (
    ATTENTION_LOGITS,
    LAST_BLOCK,
    LOGITS,
    OUTPUT,
    RESIDUAL,
    Coordinate,
    tensor_places,
)

#: Student's t, 97.5 % quantile, by degrees of freedom; 2 beyond.
T_QUANTILES = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26, 10: 2.23}

WIDTH, DEPTH = "width", "depth"


@dataclass(frozen=True)
class Slope:
    """How one coordinate scales.

    Attributes:
        quantity, place, step, order: as in `Coordinate`.
        mean: mean over seeds of the exponent.
        half_width: half of its 95 % interval over seeds; NaN with one seed.
    """

    quantity: str
    place: str
    step: int
    order: int
    mean: float
    half_width: float


@dataclass(frozen=True)
class Bound:
    """What a slope must keep to, `low` to `high`, and `why`."""

    low: float
    high: float
    why: str

    def moved(self, by: float) -> "Bound":
        """The same bound around another exponent."""
        return Bound(self.low + by, self.high + by, self.why)


@dataclass(frozen=True)
class Finding:
    """A slope out of bounds, what is probably wrong, and whether it is rather a consequence of another."""

    slope: Slope
    bound: Bound
    diagnosis: str
    consequence: bool


@dataclass(frozen=True)
class Judgement:
    """Every judged slope with its bound, and the failures, the likely cause first."""

    axis: str
    judged: list[tuple[Slope, Bound]]
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        """Whether every slope keeps to its bound, and updates were seen at all."""
        return not self.findings and any(slope.quantity == "weight_update" for slope, _ in self.judged)


def slopes(coordinates: Iterable[Coordinate]) -> list[Slope]:
    """The exponent of every coordinate over size.

    One that is zero everywhere, or that some size does not have, is left out; one that is not finite somewhere has
    +inf, one that is zero somewhere -inf.
    """
    coordinates = list(coordinates)
    sizes = {c.size for c in coordinates}
    series: dict[tuple[str, str, int], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    orders: dict[tuple[str, str, int], int] = {}
    for c in coordinates:
        key = (c.quantity, c.place, c.step)
        series[key][c.seed][c.size] = c.value
        orders.setdefault(key, c.order)
    found = []
    for (quantity, place, step), seeds in series.items():
        values = [value for points in seeds.values() for value in points.values()]
        if any(points.keys() != sizes for points in seeds.values()):
            continue  # over depth, a layer unlike the others that only the deeper models have
        if not all(map(math.isfinite, values)):
            found.append(Slope(quantity, place, step, orders[quantity, place, step], math.inf, math.nan))
            continue
        if max(values) <= 0:
            continue  # a zero initial value, or a tensor that nothing reaches, at every size
        if min(values) <= 0:
            found.append(Slope(quantity, place, step, orders[quantity, place, step], -math.inf, math.nan))
            continue
        by_seed = [_slope(points) for points in seeds.values()]
        found.append(Slope(quantity, place, step, orders[quantity, place, step], fmean(by_seed), _half_width(by_seed)))
    return found


def judge(axis: str, found: Sequence[Slope], plans: Mapping[int, Plan]) -> Judgement:
    """Hold every slope against its bound.

    Args:
        axis: `width` or `depth`.
        found: from `slopes`.
        plans: size → the plan at that size; ε is held against the gradient by it, and it words the diagnosis.
    """
    steps = sorted({slope.step for slope in found if slope.step > 0})
    rules = _PlanSlopes(plans, sum(slope.mean for slope in found if slope.quantity == "head_size"))
    bounds = [(slope, _bound(axis, slope, rules, flatter)) for slope, flatter in _settled(axis, found, steps, rules)]
    judged = [(slope, bound.moved(-rules.multiplied_after(slope))) for slope, bound in bounds if bound is not None]
    inputs = {slope.place: slope.mean for slope in found if slope.quantity == "input"}
    outside = [(s, b) for s, b in judged if not b.low <= s.mean <= b.high]
    explain = _Explainer(axis, rules, inputs, any(s.quantity == "activation" for s, _ in outside))
    findings = [explain.finding(s, b) for s, b in outside]
    return Judgement(axis, judged, sorted(findings, key=_suspicion))


def _settled(
    axis: str, found: Sequence[Slope], steps: Sequence[int], rules: "_PlanSlopes"
) -> Iterator[tuple[Slope, bool]]:
    """The slopes that are judged, and whether each is held to its lower bound too.

    Of the trained steps: over depth, and of gains and biases, whose first update is exactly their rate, the first one.
    Else the last two, of which only the flatter one is held to the lower bound: what flows through a narrow model at a
    high rate needs a few steps to settle, and growth is the stricter fault.
    """
    for slope in found:
        if slope.step == 0 or (slope.step == steps[0] and (axis == DEPTH or rules.is_vector(slope.place))):
            yield slope, True
    if axis == WIDTH:
        late: dict[tuple[str, str], list[Slope]] = defaultdict(list)
        for slope in found:
            if slope.step in steps[-2:] and not rules.is_vector(slope.place):
                late[slope.quantity, slope.place].append(slope)
        for pair in late.values():
            flatter = min(pair, key=lambda slope: abs(slope.mean + rules.multiplied_after(slope)))
            yield from ((slope, slope is flatter) for slope in pair)


def _bound(axis: str, slope: Slope, rules: "_PlanSlopes", flatter: bool) -> Bound | None:
    """The bound of one slope; None where it says nothing."""
    if slope.quantity in ("input", "head_size"):
        return None
    if slope.quantity == "gradient":
        return _gradient_bound(slope, rules)
    if axis == DEPTH and f"({RESIDUAL}." in slope.place:
        return None  # a branch is multiplied by a power of the depth, so that the sum is not
    if slope.quantity != "weight_update" and (slope.place.endswith("(output)") or rules.role(slope.place) == "output"):
        return None  # the logits are judged, wherever they are multiplied
    if slope.quantity == "activation":
        why = f"activations at initialisation must not depend on the {axis}"
        if slope.place == ATTENTION_LOGITS:  # random queries and keys of growing heads, under 1/d_head
            return Bound(-0.25 - 0.5 * rules.head_size, 0.25 - 0.5 * rules.head_size, why)
        return Bound(-0.75 if slope.place == LOGITS else -0.25, 0.25, why)  # a random head gives m^-1/2
    return _width_bound(slope, rules, flatter) if axis == WIDTH else _depth_bound(slope)


def _width_bound(slope: Slope, rules: "_PlanSlopes", flatter: bool) -> Bound:
    if slope.quantity == "update":
        may_vanish = slope.place == LOGITS or (slope.place == ATTENTION_LOGITS and rules.head_size > 0)
        low = -0.4 if flatter and not may_vanish else -math.inf
        return Bound(low, 0.4, "what updates change must not depend on the width")
    if rules.is_vector(slope.place):
        return Bound(-0.25, 0.25, "a gain or bias must move by the same amount at every width")
    low = -0.38 if flatter else -math.inf
    return Bound(low, 0.35, "a tensor's updates must change its product by the same amount at every width")


def _depth_bound(slope: Slope) -> Bound | None:
    if slope.quantity == "weight_update":
        return Bound(-0.25, 0.25, "a tensor's update must change its product by the same amount at every depth")
    if slope.place == LAST_BLOCK:
        return Bound(-0.25, 0.25, "what an update changes at the end of the stack must not depend on the depth")
    if slope.place == LOGITS:
        return Bound(-math.inf, 0.25, "what an update changes must not grow with the depth")
    return None


def _gradient_bound(slope: Slope, rules: "_PlanSlopes") -> Bound | None:
    """ε must scale as the gradient does, in a table that scales ε at all.

    The final norm's gain is left out: at init its gradient is a small remainder of the logits' noise. A matrix whose
    outputs do not grow (keys and values of grouped-query attention) sums the gradients of a growing number of heads,
    which adds up to m^1/2; a tensor whose ε falls faster than its gradient comes to no harm.
    """
    expected = rules.eps(slope.place)
    if expected is None or not rules.scales_eps or (rules.is_vector(slope.place) and "*" not in slope.place):
        return None
    shared = 0.5 if rules.fan_out_is_fixed(slope.place) else 0.0
    return Bound(expected - 0.3, expected + 0.3 + shared, f"ε of this tensor scales with exponent {expected:+.2f}")


class _PlanSlopes:
    """Exponents of the plan itself over size, by place of tensor, and that of the head size."""

    def __init__(self, plans: Mapping[int, Plan], head_size: float) -> None:
        self.head_size = head_size
        self.sizes = sorted(plans)
        rows: dict[str, dict[int, TensorPlan]] = defaultdict(dict)
        for size, plan in plans.items():
            for name, place in tensor_places(plan).items():
                rows[place].setdefault(size, plan.parameters[name])
        self.rows = {place: found for place, found in rows.items() if len(found) == len(plans)}
        self.sites = {
            site: [plan.multipliers[site].value for _, plan in sorted(plans.items())]
            for site in plans[self.sizes[0]].multipliers
        }
        self.scales_eps = any(abs(self.exponent(place, "eps_mult")) > 1e-9 for place in self.rows)

    def exponent(self, place: str, column: str) -> float:
        """Exponent over size of one column of the plan, at one kind of tensor."""
        values = {size: getattr(row, column) for size, row in self.rows[place].items()}
        return _slope(values) if min(values.values()) > 0 else 0.0

    def eps(self, place: str) -> float | None:
        return self.exponent(place, "eps_mult") if place in self.rows else None

    def is_vector(self, place: str) -> bool:
        return place in self.rows and "x" not in next(iter(self.rows[place].values())).shape

    def multiplied_after(self, slope: Slope) -> float:
        """Exponent of what multiplies an embedding's own output, which its coordinates do not hold yet."""
        embeds = "embedding" in self.role(slope.place)
        return self.site("embedding") if embeds and slope.quantity != "gradient" else 0.0

    def role(self, place: str) -> str:
        """The role of a tensor, or of the weight of a module; empty for every other place."""
        rows = self.rows.get(place) or self.rows.get(f"{place}.weight")
        return next(iter(rows.values())).role if rows else ""

    def fan_out_is_fixed(self, place: str) -> bool:
        """Whether a hidden matrix has one dimension that is the same at every size."""
        shapes = [row.shape.split("x") for row in self.rows[place].values()]
        fixed = [len(set(sizes)) == 1 for sizes in zip(*shapes, strict=True)]
        return self.role(place) in ("hidden", "residual_output") and len(fixed) > 1 and any(fixed) and not all(fixed)

    def site(self, name: str) -> float:
        """Exponent over size of one site's multiplier."""
        return _slope(dict(zip(self.sizes, self.sites[name], strict=True))) if name in self.sites else 0.0


def _suspicion(finding: Finding) -> tuple[bool, int, float]:
    """Likely causes first: what its own input does not explain, then in the order of the forward pass."""
    slope, bound = finding.slope, finding.bound
    rank = ("activation", "weight_update", "gradient", "update").index(slope.quantity)
    excess = max(slope.mean - bound.high, bound.low - slope.mean)
    return finding.consequence, rank, slope.order if slope.quantity == "activation" else -excess


class _Explainer:
    """Puts a slope out of bounds into words: what scales how, and which rule is probably missing."""

    def __init__(self, axis: str, rules: _PlanSlopes, inputs: Mapping[str, float], init_is_off: bool) -> None:
        self.axis, self.rules, self.inputs, self.init_is_off = axis, rules, inputs, init_is_off
        self.symbol = "m" if axis == WIDTH else "m_L"

    def finding(self, slope: Slope, bound: Bound) -> Finding:
        """The finding, with its diagnosis."""
        power = f"as {self.axis}^{slope.mean:+.2f}" if math.isfinite(slope.mean) else _NO_POWER[slope.mean > 0]
        what = _PHRASES[slope.quantity].format(place=slope.place, step=slope.step)
        excess = slope.mean - (bound.low + bound.high if math.isfinite(bound.low) else 0.0) / 2
        excess -= self.inputs.get(slope.place.removesuffix(".weight"), 0.0)
        cause = self._cause(slope, excess)
        said = cause or "probably a consequence of what comes before it"
        return Finding(slope, bound, f"{what} {power}: {said}", consequence=cause is None)

    def _cause(self, slope: Slope, excess: float) -> str | None:
        """The rule that is probably wrong; None where the input explains it, or nothing here does."""
        about = f"{round(2 * excess) / 2:+g}" if math.isfinite(excess) else "unknown"
        if slope.quantity == "gradient":
            return f"its ε scales as {self.symbol}^{self.rules.eps(slope.place):+.2f} and must follow the gradient"
        if slope.place == ATTENTION_LOGITS and slope.quantity == "activation":
            return f"the attention scale, or the query and key before it, have {about} too many (μP divides by d_head)"
        if slope.place in (LOGITS, OUTPUT):
            now = self.rules.site("output")
            return (
                f"the output multiplier scales as {self.symbol}^{now:+.2f}; it, or the std or rate of the output "
                f"matrix, has an exponent of about {about} too many (μP: 1/m on the logits)"
            )
        if abs(excess) < 0.25:
            return None
        tensor = slope.place if slope.place in self.rules.rows else f"{slope.place}.weight"
        if slope.place.endswith(")") and slope.quantity == "activation":
            return f"what multiplies there has an exponent of about {about} too many"
        if tensor not in self.rules.rows:
            return None
        if slope.quantity == "activation":
            return self._exponent(tensor, "init_std", "initial std", about)
        if slope.quantity != "weight_update":
            return None
        if self.init_is_off:
            about = f"{'+' if excess > 0 else '-'}1/2 or more (read it again once the initial values are right)"
        return self._exponent(tensor, "lr_mult", "learning rate", about)

    def _exponent(self, tensor: str, column: str, name: str, about: str) -> str:
        now = self.rules.exponent(tensor, column)
        return f"the {name} of {tensor} scales as {self.symbol}^{now:+.2f}, an exponent of about {about} too many"


_NO_POWER = {True: "without bound: it is not finite at some size", False: "with no power: it is zero at some size"}
_PHRASES = {
    "activation": "at init, {place} scales",
    "update": "after {step} steps, the change of {place} scales",
    "weight_update": "after {step} steps, (W_t - W_0)·x of {place} scales",
    "gradient": "the gradient of {place} scales",
}


def _slope(points: Mapping[int, float]) -> float:
    x = [math.log2(size) for size in points]
    y = [math.log2(value) for value in points.values()]
    mean_x, mean_y = fmean(x), fmean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def _half_width(by_seed: Sequence[float]) -> float:
    if len(by_seed) < 2:
        return math.nan
    return T_QUANTILES.get(len(by_seed) - 1, 2.0) * stdev(by_seed) / math.sqrt(len(by_seed))
