"""How proxy and target differ, and what that and the ladder allow to be said. The rules are data.

Octaves are of the base learning rate. The thresholds are judgements, stated once, here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from mutune.certificate.config import TransferFile
from mutune.certificate.ladder import Rung, optima
from mutune.certificate.valley import Drift, expected_optimum
from mutune.model.shape import tensor_specs
from mutune.parametrization.rules import get_table
from mutune.scaling.arithmetic import parameter_count
from mutune.training.config import RunSpec, total_tokens

GO_OCTAVES = 0.5  # the optimum at the target is expected, uncertainty included, this close to the transferred rate
NO_GO_OCTAVES = 1.0  # it is expected, uncertainty taken off, further from the transferred rate than this
MAX_RESIDUAL = 0.5  # the furthest, in octaves, that an optimum may lie from the line that is extrapolated
MAX_WIDTH_RATIO = 4.0  # target width over the widest rung: two doublings of extrapolation
FFN = "feed-forward width over width"
MAX_RATIO = 4.0  # target over proxy, or the inverse, on an axis that the ladder did not measure


@dataclass(frozen=True)
class Difference:
    """One way in which proxy and target differ.

    Attributes:
        axis: what differs.
        proxy, target: the two values; `proxy` is None where it is not published.
        ratio: target / proxy for numbers, else None.
        measured_to: the furthest value at which the ladder measured this axis, else None.
    """

    axis: str
    proxy: float | str | None
    target: float | str
    ratio: float | None
    measured_to: float | None = None


@dataclass(frozen=True)
class Verdict:
    """The verdict and its reasons, each a sentence with numbers in it."""

    verdict: str
    reasons: list[str]


def difference_table(
    proxy: RunSpec, target: RunSpec, proxy_vocab: int, target_vocab: int, widest: int
) -> list[Difference]:
    """Every way in which the proxy's and the target's run differ; equal ones are left out."""
    pairs: list[tuple[str, float | str, float | str]] = [
        ("width", proxy.model.width, target.model.width),
        ("depth", proxy.model.depth, target.model.depth),
        ("heads (and so the ALiBi spectrum)", proxy.model.heads, target.model.heads),
        ("head size", proxy.model.size_per_head, target.model.size_per_head),
        *_ffn(proxy, target),
        ("positions", proxy.model.positions, target.model.positions),
        ("activation", proxy.model.activation, target.model.activation),
        ("vocabulary", proxy_vocab, target_vocab),
        ("data", _data(proxy), _data(target)),
        ("tokens", total_tokens(proxy.stages), total_tokens(target.stages)),
        (
            "tokens per parameter",
            _tokens_per_parameter(proxy, proxy_vocab),
            _tokens_per_parameter(target, target_vocab),
        ),
        ("batch, tokens per step", _batch(proxy), _batch(target)),
        ("context", _context(proxy), _context(target)),
        ("schedule", proxy.schedule.kind, target.schedule.kind),
        ("warm-up share", _warmup(proxy), _warmup(target)),
        ("decay share", _decay(proxy), _decay(target)),
        ("end ratio", _end_ratio(proxy), _end_ratio(target)),
        ("clip norm", proxy.loop.clip_norm, target.loop.clip_norm),
    ]
    return [_difference(axis, a, b, widest) for axis, a, b in pairs if a != b]


def published_differences(base_width: float, target: RunSpec) -> list[Difference]:
    """What is known of published values: the base width; the proxy's own training is not published."""
    width = target.model.width
    known = [Difference("width", base_width, width, width / base_width)] if width != base_width else []
    return [*known, Difference("everything else of the proxy's run", None, "see the target", None)]


def judge(
    transfer_table: str,
    differences: list[Difference],
    rungs: list[Rung],
    drift: Drift,
    learning_rate: float,
    target_width: int,
) -> Verdict:
    """The verdict of a ladder, for the transferred base `learning_rate`.

    What decides is how far from that rate the optimum is expected at the target: too far is NO-GO whatever else
    holds; then what was not measured makes NOT CERTIFIED; then the distance decides between GO and GO WITH CARE. Its
    uncertainty is the spread over seeds or the largest residual of the fit, whichever is larger.
    """
    optimum, spread = expected_optimum(optima(rungs), target_width)
    distance = optimum - math.log2(learning_rate)
    uncertainty = max(drift.residual, spread) if math.isfinite(spread) else drift.residual
    said = (
        f"the optimum moves {drift.octaves_per_doubling:+.2f} ± {drift.spread:.2f} octaves per doubling of the width "
        f"over widths {rungs[0].width}-{rungs[-1].width} ({drift.num_seeds} seeds); at width {target_width} it is "
        f"expected {distance:+.2f} ± {uncertainty:.2f} octaves from the transferred rate"
    )
    missing = [rule.reason(differences, rungs, drift, transfer_table) for rule in NOT_CERTIFIED]
    reasons = [reason for reason in missing if reason]
    if abs(distance) - uncertainty > NO_GO_OCTAVES:
        return Verdict("NO-GO", [f"{said}: more than {NO_GO_OCTAVES:g} octave", *reasons])
    if reasons:
        return Verdict("NOT CERTIFIED", [*reasons, said])
    if abs(distance) + uncertainty <= GO_OCTAVES:
        return Verdict("GO", [f"{said}: within {GO_OCTAVES:g} octave"])
    return Verdict("GO WITH CARE", [f"{said}: not within {GO_OCTAVES:g} octave, but not beyond {NO_GO_OCTAVES:g}"])


@dataclass(frozen=True)
class Rule:
    """A reason for NOT CERTIFIED: a function of what is known that returns a sentence, or an empty string."""

    name: str
    reason: Callable[[list[Difference], list[Rung], Drift, str], str]


def _beyond(axis: str, cure: str) -> Rule:
    """The target is further than `MAX_RATIO` from the proxy on an axis that the ladder did not measure."""

    def reason(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
        found = next((d for d in differences if d.axis == axis), None)
        if found is None or found.ratio is None or 1 / MAX_RATIO <= found.ratio <= MAX_RATIO:
            return ""
        return f"{axis}: {found.proxy:,} → {found.target:,} ({found.ratio:.3g}×) was not measured; {cure}"

    return Rule(axis, reason)


def _differs(axis: str, cure: str) -> Rule:
    """The axis differs at all."""

    def reason(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
        found = next((d for d in differences if d.axis == axis), None)
        return f"{axis}: {found.proxy} → {found.target}; {cure}" if found else ""

    return Rule(axis, reason)


def _width(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
    found = next((d for d in differences if d.axis == "width"), None)
    widest = rungs[-1].width
    if found is None or float(found.target) <= MAX_WIDTH_RATIO * widest:
        return ""
    ratio = float(found.target) / widest
    need = math.ceil(float(found.target) / MAX_WIDTH_RATIO)
    return f"width: the target is {ratio:.3g}× the widest rung ({widest}); a rung at width {need} would settle it"


def _depth(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
    found = next((d for d in differences if d.axis == "depth"), None)
    if found is None or "depth" in get_table(table).transfers_over:
        return ""
    only = f"table {table} transfers over {' and '.join(get_table(table).transfers_over) or 'nothing'} only"
    return f"depth: {found.proxy} → {found.target}, and {only}; sweep at the target's depth"


def _edge(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
    edges = [f"{rung.width} ({valley.edge})" for rung in rungs for valley in rung.valleys.values() if valley.edge]
    if not edges:
        return ""
    return f"the optimum lies at the edge of the tried rates at width {', '.join(edges)}; widen ladder.offsets"


def _seeds(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
    return "" if drift.num_seeds > 1 else "one seed gives no spread; set ladder.seeds=2"


def _line(differences: list[Difference], rungs: list[Rung], drift: Drift, table: str) -> str:
    if drift.residual <= MAX_RESIDUAL:
        return ""
    return (
        f"the optimum does not follow the width: it lies up to {drift.residual:.2f} octaves from its fitted line "
        f"(range {drift.range:.2f}), so nothing can be extrapolated; raise ladder.seeds, or sweep at larger widths"
    )


NOT_CERTIFIED = (
    Rule("width", _width),
    Rule("depth", _depth),
    _differs("head size", "ladders fix the head size; sweep with the target's"),
    _differs(FFN, "ladders keep this ratio; sweep with the target's"),
    _differs("positions", "sweep with the target's"),
    _differs("activation", "sweep with the target's"),
    _beyond("vocabulary", "sweep with the target's tokenizer"),
    _beyond("tokens", "the best rate also moves with the horizon under μP (arXiv:2409.19913); lengthen run.num_steps"),
    _beyond("batch, tokens per step", "the best rate also moves with the batch; raise run.batch_sequences"),
    _beyond("context", "sweep at a longer run.context_length"),
    _differs("schedule", "the best rate belongs to its schedule; sweep with the target's"),
    _beyond("decay share", "the best rate belongs to its schedule; sweep with the target's schedule.decay_fraction"),
    Rule("edge", _edge),
    Rule("seeds", _seeds),
    Rule("line", _line),
)


def published_verdict(transfer: TransferFile) -> Verdict:
    """Published values come without a ladder."""
    reason = f"the values are published ones ({transfer.provenance.source}); no ladder was run for them here"
    return Verdict("NOT CERTIFIED", [reason])


def _difference(axis: str, proxy: float | str, target: float | str, widest: int) -> Difference:
    numbers = isinstance(proxy, (int, float)) and isinstance(target, (int, float)) and proxy != 0
    ratio = float(target) / float(proxy) if numbers else None
    return Difference(axis, proxy, target, ratio, widest if axis == "width" else None)


def _data(spec: RunSpec) -> str:
    return f"{spec.data.path or spec.data.source}, {spec.tokenizer.kind}"


def _tokens_per_parameter(spec: RunSpec, vocab_size: int) -> float:
    return round(total_tokens(spec.stages) / parameter_count(tensor_specs(spec.model, vocab_size)), 4)


def _batch(spec: RunSpec) -> int:
    return max(stage.tokens_per_step for stage in spec.stages)


def _context(spec: RunSpec) -> int:
    return max(stage.context_length for stage in spec.stages)


def _warmup(spec: RunSpec) -> float:
    return round(spec.schedule.warmup(spec.num_steps) / spec.num_steps, 6)


def _ffn(proxy: RunSpec, target: RunSpec) -> list[tuple[str, float | str, float | str]]:
    """The ratio's row, unless the target has the feed-forward width of the proxy's family up to its rounding."""
    width, ffn = target.model.width, target.model.ffn
    family = proxy.model.ffn_width_at(width) or replace(proxy.model, width=width, num_heads=1).ffn
    if abs(ffn - family) <= 1:
        return []
    return [(FFN, round(proxy.model.ffn / proxy.model.width, 3), round(ffn / width, 3))]


def _decay(spec: RunSpec) -> float | str:
    """Share of the run in which the rate falls; only `wsd` has one of its own."""
    return spec.schedule.decay_fraction if spec.schedule.kind == "wsd" else "the schedule's own"


def _end_ratio(spec: RunSpec) -> float:
    own = spec.stages[-1].end_ratio
    return round(spec.schedule.end_ratio if own is None else own, 6)
