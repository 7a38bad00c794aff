"""What a proxy needs for its target, and the smallest proxy that has it: where the adviser's cures come from."""

import math
import shlex
from dataclasses import replace
from typing import Any

from mutune.certificate.verdict import MAX_RATIO
from mutune.model.shape import ModelConfig, tensor_specs
from mutune.scaling.arithmetic import parameter_count
from mutune.scaling.heuristics import (
    COMPUTE_OPTIMAL_TPP,
    FURTHEST_TOKENS,
    MIN_DEPTH,
    MIN_STEPS,
    MIN_WIDTH,
    critical_batch,
    steepest_alibi_slope,
    tokens_at_critical_batch,
)
from mutune.training.config import RunSpec, StageConfig, total_tokens

SHAPE = ("model.width", "model.head_size", "model.num_heads", "model.ffn_width")
DEPTH = ("model.depth",)
RUN = ("run.batch_sequences", "run.num_steps")
TABLE = ("parametrization.table",)
TOKENIZER = ("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path")
SCHEDULE = ("schedule.kind", "schedule.decay_fraction", "schedule.end_ratio")


def better(proxy: RunSpec, target: RunSpec, keys: tuple[str, ...]) -> str:
    """Those of the sweep's `keys` that a better proxy sets otherwise, as words of a command line."""
    now, then = _settings(proxy), _better_settings(proxy, target)
    changed = [key for key in keys if then[key] != now[key]]
    return shlex.join(f"{key}={'null' if then[key] is None else then[key]}" for key in changed)


def enough_width(target: RunSpec) -> int:
    """The smallest width from which the target's is no long way, or that is enough for any."""
    return min(MIN_WIDTH, math.ceil(target.model.width / MAX_RATIO))


def enough_depth(target: RunSpec) -> int:
    """The smallest depth from which a table transfers over depth."""
    return min(MIN_DEPTH, target.model.depth)


def enough_heads(target: RunSpec) -> int:
    """The smallest head count whose steepest ALiBi slope is at least a quarter of the target's; 1 without ALiBi.

    Where the target's can be halved down to there, such a half: its doublings have the target's spectrum.
    """
    heads = target.model.heads
    if target.model.positions != "alibi":
        return 1
    least = steepest_alibi_slope(heads) / MAX_RATIO
    smallest = next(count for count in range(1, heads + 1) if steepest_alibi_slope(count) >= least)
    halves = [heads >> k for k in range(1, heads.bit_length()) if heads % (1 << k) == 0]
    return min((half for half in halves if half >= smallest), default=smallest)


def enough_steps(target: RunSpec) -> int:
    """As `enough_width`, of steps."""
    return min(MIN_STEPS, math.ceil(target.num_steps / MAX_RATIO))


def enough_tokens_per_parameter(target: RunSpec) -> float:
    """As `enough_width`, of tokens per parameter."""
    return min(COMPUTE_OPTIMAL_TPP, tokens_per_parameter(target) / MAX_RATIO)


def tokens_per_parameter(spec: RunSpec) -> float:
    """TPP, every parameter counted, a tied table once."""
    return total_tokens(spec.stages) / _parameters(spec.model, spec.tokenizer.num_ids)


def largest_batch(spec: RunSpec) -> int:
    """The most tokens of one step."""
    return max(stage.tokens_per_step for stage in spec.stages)


def end_ratio(spec: RunSpec) -> float:
    """The rate at the end of the run over the peak's."""
    own = spec.stages[-1].end_ratio
    return spec.schedule.end_ratio if own is None else own


def _settings(proxy: RunSpec) -> dict[str, Any]:
    """The sweep's keys that a better proxy may set otherwise."""
    rooms = {
        "model": proxy.model,
        "run": proxy.stages[0],
        "parametrization": proxy.parametrization,
        "tokenizer": proxy.tokenizer,
        "schedule": proxy.schedule,
    }
    keys = (key.split(".") for key in (*SHAPE, *DEPTH, *RUN, *TABLE, *TOKENIZER, *SCHEDULE))
    return {f"{room}.{name}": getattr(rooms[room], name) for room, name in keys}


def _better_settings(proxy: RunSpec, target: RunSpec) -> dict[str, Any]:
    model = _better_model(proxy, target)
    run = _better_run(proxy, target, model)
    kept = _settings(proxy)
    vocab_size = target.tokenizer.vocab_size if target.tokenizer.kind == "bpe" else kept["tokenizer.vocab_size"]
    share = target.schedule.decay_share(target.num_steps)
    decay = share if target.schedule.kind == "wsd" else kept["schedule.decay_fraction"]
    return {
        **{key: getattr(model, key.removeprefix("model.")) for key in (*SHAPE, *DEPTH)},
        **{key: getattr(run, key.removeprefix("run.")) for key in RUN},
        "parametrization.table": "mup",
        "tokenizer.kind": target.tokenizer.kind,
        "tokenizer.vocab_size": vocab_size,
        "tokenizer.path": target.tokenizer.path,
        "schedule.kind": target.schedule.kind,
        "schedule.decay_fraction": decay,
        "schedule.end_ratio": end_ratio(target),
    }


def _better_model(proxy: RunSpec, target: RunSpec) -> ModelConfig:
    """The smallest model, from the proxy's size up, that no rule about shapes finds wanting."""
    old, head = proxy.model, target.model.size_per_head
    least = max(enough_width(target), enough_heads(target) * head)
    width = math.ceil(max(old.width, least) / head) * head
    over_depth = "depth" in proxy.parametrization.theory().transfers_over
    depth = max(old.depth, enough_depth(target)) if over_depth else target.model.depth
    if (width, head) == (old.width, old.size_per_head):
        return replace(old, depth=depth)
    ffn_width = old.ffn_width_at(width)
    return replace(old, width=width, depth=depth, head_size=head, num_heads=None, ffn_width=ffn_width)


def _better_run(proxy: RunSpec, target: RunSpec, model: ModelConfig) -> StageConfig:
    """The shortest run, of no fewer tokens than the proxy's, that no rule about runs finds wanting for `model`."""
    run, steps = proxy.stages[0], enough_steps(target)
    largest = max(run.tokens_per_step, math.ceil(largest_batch(target) / MAX_RATIO))
    vocab_size = max(proxy.tokenizer.num_ids, target.tokenizer.num_ids)
    parameters = max(_parameters(shape, vocab_size) for shape in (model, proxy.model))
    tokens = max(
        run.tokens,
        enough_tokens_per_parameter(target) * parameters,
        total_tokens(target.stages) / FURTHEST_TOKENS,
        steps * min(largest, critical_batch(tokens_at_critical_batch(steps))),
    )
    rounded_up = tokens + 2 * (critical_batch(tokens) + run.context_length)  # at the most, by the two below
    batch = max(run.tokens_per_step, min(largest, critical_batch(rounded_up)))
    sequences = math.ceil(batch / run.context_length)
    return replace(
        run,
        batch_sequences=sequences,
        num_steps=max(steps, math.ceil(tokens / (sequences * run.context_length))),
    )


def _parameters(model: ModelConfig, vocab_size: int) -> int:
    return parameter_count(tensor_specs(model, vocab_size))
