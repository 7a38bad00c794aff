"""Every way in which the proxy's and the target's run differ, as a table."""

from dataclasses import dataclass, replace

from mutune.model.shape import tensor_specs
from mutune.scaling.arithmetic import parameter_count
from mutune.training.config import RunSpec, total_tokens

FFN = "feed-forward width over width"
#: The axis of the difference table that each axis of a ladder is.
AXIS_NAMES = {"width": "width", "depth": "depth", "tokens": "tokens", "batch": "batch, tokens per step"}


@dataclass(frozen=True)
class Difference:
    """One way in which proxy and target differ.

    Attributes:
        axis: what differs.
        proxy, target: the two values; `proxy` is None where it is not published.
        ratio: target / proxy for numbers, else None.
        measured_to: the ladder's value of this axis that is nearest to the target's, else None.
    """

    axis: str
    proxy: float | str | None
    target: float | str
    ratio: float | None
    measured_to: float | None = None


def difference_table(
    proxy: RunSpec, target: RunSpec, proxy_vocab: int, target_vocab: int, measured: dict[str, float]
) -> list[Difference]:
    """Every way in which the proxy's and the target's run differ; equal ones are left out.

    Args:
        measured: for each axis that the ladder measured, its value nearest to the target's.
    """
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
        ("dtype", str(proxy.loop.settled().dtype), str(target.loop.settled().dtype)),
    ]
    return [_difference(axis, a, b, measured) for axis, a, b in pairs if a != b]


def published_differences(base_width: float, target: RunSpec) -> list[Difference]:
    """What is known of published values: the base width; the proxy's own training is not published."""
    width = target.model.width
    known = [Difference("width", base_width, width, width / base_width)] if width != base_width else []
    return [*known, Difference("everything else of the proxy's run", None, "see the target", None)]


def _difference(axis: str, proxy: float | str, target: float | str, measured: dict[str, float]) -> Difference:
    numbers = isinstance(proxy, (int, float)) and isinstance(target, (int, float)) and proxy != 0
    ratio = float(target) / float(proxy) if numbers else None
    ladder = next((key for key, name in AXIS_NAMES.items() if name == axis), "")
    return Difference(axis, proxy, target, ratio, measured.get(ladder))


def _data(spec: RunSpec) -> str:
    mixed = [each.path or each.source for stage in spec.stages for each in stage.data or ()]
    texts = dict.fromkeys([str(spec.data.path or spec.data.source), *mixed])
    return f"{' + '.join(texts)}, {spec.tokenizer.kind}"


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
    return spec.schedule.decay_share(spec.num_steps) if spec.schedule.kind == "wsd" else "the schedule's own"


def _end_ratio(spec: RunSpec) -> float:
    own = spec.stages[-1].end_ratio
    return round(spec.schedule.end_ratio if own is None else own, 6)
