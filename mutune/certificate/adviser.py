"""The adviser: what is unwise about a proxy, its target and their ladder, before money is spent. The rules are data.

A rule returns a finding with its numbers and a cure, or None. Cures are `key=value` of the sweep or of the transfer;
those of the sweep all come from one better proxy, so that they go together. Laws and their sources are in
`scaling/heuristics.py`; thresholds without a source are judgements, and say so.
"""

import math
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mutune.certificate.proxy import (
    DEPTH,
    RUN,
    SCHEDULE,
    SHAPE,
    TABLE,
    TOKENIZER,
    better,
    end_ratio,
    enough_depth,
    enough_heads,
    enough_steps,
    enough_tokens_per_parameter,
    enough_width,
    largest_batch,
    tokens_per_parameter,
)
from mutune.certificate.verdict import MAX_RATIO
from mutune.compose import written
from mutune.scaling.heuristics import (
    COMPUTE_OPTIMAL_TPP,
    FURTHEST_TOKENS,
    MIN_DEPTH,
    MIN_STEPS,
    MIN_WIDTH,
    critical_batch,
    steepest_alibi_slope,
)
from mutune.scaling.horizon import power_lines_timescale, timescale
from mutune.training.config import RunSpec, StageConfig, total_tokens
from mutune.training.passes import MOST_PASSES, Reading
from mutune.training.schedule import ScheduleConfig

STOP, CARE, NOTE = SEVERITIES = ("stop", "care", "note")  # do not spend before; a known cause of loss; worth knowing
SWEEP, TRANSFER = "at the sweep", "at the transfer"
MAX_SHOWN = 8

MAX_DEPTH_RATIO = 2.0  # a judgement: of depths, where the table does not transfer over them
MAX_TIMESCALE_RATIO = 2.0  # a judgement: the decay timescale over its optimum, or the inverse
MAX_BATCH_RATIO = 2.0  # a judgement, about the error of the fit: the target's batch over its critical one
MAX_END_DIFFERENCE = 0.05  # a judgement: end ratios of 0 and 0.1 are reported to differ by an octave in the best rate


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        axis: what it is about.
        severity: one of `SEVERITIES`.
        finding: what is so, with the proxy's value, the target's, and the threshold.
        cure: where, and the `key=value` that would settle it.
        source: who says so.
    """

    axis: str
    severity: str
    finding: str
    cure: str
    source: str


@dataclass(frozen=True)
class Runs:
    """What the rules look at.

    Attributes:
        measured: by axis of the ladder, its furthest value.
        widths: of its rungs, the narrowest first.
    """

    proxy: RunSpec
    target: RunSpec
    measured: Mapping[str, float] = field(default_factory=dict)
    widths: tuple[int, ...] = ()

    def reach(self, axis: str, proxy: float) -> float:
        """The furthest value of an axis that proxy or ladder measure."""
        return max(proxy, self.measured.get(axis, proxy))


Said = tuple[str, str] | None  # finding and cure


@dataclass(frozen=True)
class Rule:
    """One row of `RULES` (on proxy and target) or `TARGET_RULES` (on the target alone)."""

    axis: str
    severity: str
    source: str
    say: Callable[[Any], Said]

    def advice(self, looked_at: Runs | RunSpec) -> list[Advice]:
        """What it has to say, if anything."""
        said = self.say(looked_at)
        return [] if said is None else [Advice(self.axis, self.severity, *said, self.source)]


def advise(
    proxy: RunSpec | None,
    target: RunSpec,
    measured: Mapping[str, float] | None = None,
    widths: Iterable[int] = (),
) -> list[Advice]:
    """All advice, most severe first.

    Args:
        proxy: the study's run; None where it is not published, which leaves the rules on the target alone.
        target: the run that the money is for.
        measured: by axis of the ladder (`width`, `tokens`, ...), its furthest value.
        widths: of the ladder's rungs.
    """
    runs = [] if proxy is None else [Runs(proxy, target, measured or {}, tuple(sorted(set(widths))))]
    found = [advice for rule in TARGET_RULES for advice in rule.advice(target)]
    found += [advice for rule in RULES for look in runs for advice in rule.advice(look)]
    return by_severity(found)


def by_severity(found: Iterable[Advice]) -> list[Advice]:
    """The most severe first."""
    return sorted(found, key=lambda advice: SEVERITIES.index(advice.severity))


def repeating(read: Iterable[Reading]) -> list[Advice]:
    """On texts that the target reads again and again."""
    cure = f"{TRANSFER}: {shlex.quote('target.data={source: text, path: FOLDER}')}"
    worth = f"read again up to {MOST_PASSES} times it is almost worth new text, beyond that less and less"
    return [
        Advice("text", CARE, f"{each.words}; {worth}", cure, "arXiv:2305.16264, reported")
        for each in read
        if each.times > MOST_PASSES
    ]


def advice_lines(advice: Sequence[Advice]) -> list[str]:
    """For a terminal: the most severe findings, then every cure by place."""
    lines = [f"{a.severity:<10} {a.axis}: {a.finding} [{a.source}]" for a in advice[:MAX_SHOWN]]
    if rest := advice[MAX_SHOWN:]:
        lines.append(f"           and {len(rest)} more: {', '.join(a.axis for a in rest)}")
    for place in (SWEEP, TRANSFER):
        words = [word for a in advice if a.cure.startswith(place) for word in settings_of(a.cure)]
        by_key = {word.partition("=")[0]: word for word in reversed(words)}  # of two, that of the more severe
        lines += [f"cure       {place}: {shlex.join(reversed(by_key.values()))}"] if words else []
    return lines


def settings_of(cure: str) -> list[str]:
    """The `key=value` words of a cure."""
    return shlex.split(cure.partition(": ")[2])


# --- proxy and target


def _depth(runs: Runs, far: bool) -> Said:
    proxy, target, table = runs.proxy.model.depth, runs.target.model.depth, runs.proxy.parametrization.theory()
    ratio = max(target / proxy, proxy / target)
    if proxy == target or "depth" in table.transfers_over or (ratio > MAX_DEPTH_RATIO) != far:
        return None
    beyond = f"{'more than' if far else 'within'} {MAX_DEPTH_RATIO:g}×"
    finding = (
        f"{proxy} at the proxy, {target} at the target, {beyond}, and table {table.name} does not transfer over it"
    )
    return finding, _at_sweep(runs, DEPTH)


def _shallow(runs: Runs) -> Said:
    proxy, target = runs.proxy.model.depth, runs.target.model.depth
    if "depth" not in runs.proxy.parametrization.theory().transfers_over or proxy >= enough_depth(runs.target):
        return None
    least = f"{enough_depth(runs.target)} (the target's, at most {MIN_DEPTH})"
    return f"{proxy} at the proxy, {target} at the target; a proxy should have {least}", _at_sweep(runs, DEPTH)


def _tokens(runs: Runs) -> Said:
    proxy, target = total_tokens(runs.proxy.stages), total_tokens(runs.target.stages)
    reach = runs.reach("tokens", proxy)
    if target <= FURTHEST_TOKENS * reach:
        return None
    finding = f"{reach:,.0f} at the most in proxy and ladder, {target:,} at the target, {target / reach:,.3g} times"
    return f"{finding}; the furthest published transfer known here is {FURTHEST_TOKENS:g} times", _at_sweep(runs, RUN)


def _table(runs: Runs) -> Said:
    proxy, target, table = runs.proxy.model.width, runs.target.model.width, runs.proxy.parametrization.theory()
    reach = runs.reach("width", proxy)
    if "width" in table.transfers_over or target <= MAX_RATIO * reach:
        return None
    finding = (
        f"{proxy} at the proxy, {target:,} at the target, more than {MAX_RATIO:g}× the widest rung ({reach:,.0f}), and "
        f"the best rate of table {table.name} moves with it"
    )
    return finding, _at_sweep(runs, TABLE)


def _width(runs: Runs) -> Said:
    proxy, target, enough = runs.proxy.model.width, runs.target.model.width, enough_width(runs.target)
    if proxy >= enough:
        return None
    least = f"{enough} (a quarter of the target's, at most {MIN_WIDTH})"
    return f"{proxy} at the proxy, {target:,} at the target; a proxy should have {least}", _at_sweep(runs, SHAPE)


def _ladder(runs: Runs) -> Said:
    proxy, target = runs.proxy.model.width, runs.target.model.width
    reach = runs.reach("width", proxy)
    if _width(runs) or target <= MAX_RATIO * reach:
        return None
    widths = [proxy]
    while widths[-1] * MAX_RATIO < target:
        widths.append(2 * widths[-1])
    finding = (
        f"its widest rung is {reach:,.0f}, the proxy {proxy:,}, the target {target:,}, more than {MAX_RATIO:g}× wider; "
        "what it measures is extrapolated far"
    )
    axes = dict.fromkeys(["width", *runs.measured])
    return finding, _at_transfer(f"ladder.axes=[{','.join(axes)}]", f"ladder.widths=[{','.join(map(str, widths[1:]))}]")


def _head_size(runs: Runs) -> Said:
    proxy, target = runs.proxy.model.size_per_head, runs.target.model.size_per_head
    if proxy == target:
        return None
    finding = f"{proxy} at the proxy, {target} at the target; it is best kept equal, with more heads at the target"
    return finding, _at_sweep(runs, SHAPE)


def _alibi(runs: Runs) -> Said:
    proxy, target = runs.proxy.model, runs.target.model
    ours, theirs = steepest_alibi_slope(proxy.heads), steepest_alibi_slope(target.heads)
    if {proxy.positions, target.positions} != {"alibi"} or MAX_RATIO * ours >= theirs:
        return None
    slopes = f"{ours:.2g} against {theirs:.2g}"
    finding = (
        f"{proxy.heads} heads at the proxy, {target.heads} at the target: the steepest slope is {slopes}, less than a "
        f"quarter, so no head looks as near; {enough_heads(runs.target)} heads would"
    )
    return finding, _at_sweep(runs, SHAPE)


def _alibi_rungs(runs: Runs) -> Said:
    proxy, head = runs.proxy.model, runs.proxy.model.size_per_head
    mixed = [width for width in runs.widths if _odd_part(width) != _odd_part(proxy.width)]
    if proxy.positions != "alibi" or not mixed:
        return None
    powers = [proxy.width * 2**k for k in range(1, 20)] + [proxy.width // 2**k for k in range(1, 20)]
    clean = [w for w in powers if runs.widths[0] <= w <= runs.widths[-1] and w % head == 0] or [2 * proxy.width]
    heads = " and ".join(f"{width // head} heads" for width in mixed)
    finding = (
        f"rungs of {heads}, the proxy has {proxy.heads}, the target {runs.target.model.heads}: where heads are not "
        "doubled or halved ALiBi mixes two spectra, and losses leave the line of the other rungs"
    )
    return finding, _at_transfer(f"ladder.widths=[{','.join(map(str, sorted(clean)))}]")


def _odd_part(number: int) -> int:
    return number // (number & -number)


def _batch(runs: Runs) -> Said:
    proxy, target = largest_batch(runs.proxy), largest_batch(runs.target)
    critical = critical_batch(total_tokens(runs.proxy.stages))
    if proxy >= critical or target <= MAX_RATIO * proxy:
        return None
    finding = (
        f"{proxy:,} tokens a step at the proxy, {target:,} at the target; the proxy's critical batch is about "
        f"{critical:,.0f}, below which the best rate grows with the batch"
    )
    return finding, _at_sweep(runs, RUN)


def _steps(runs: Runs) -> Said:
    proxy, target, enough = runs.proxy.num_steps, runs.target.num_steps, enough_steps(runs.target)
    if proxy >= enough:
        return None
    least = f"{enough:,} (a quarter of the target's, at most {MIN_STEPS:,})"
    return f"{proxy:,} at the proxy, {target:,} at the target; a proxy should have {least}", _at_sweep(runs, RUN)


def _tokens_per_parameter(runs: Runs) -> Said:
    proxy, target = tokens_per_parameter(runs.proxy), tokens_per_parameter(runs.target)
    enough = enough_tokens_per_parameter(runs.target)
    if proxy >= enough:
        return None
    least = f"{enough:.3g} (a quarter of the target's, at most {COMPUTE_OPTIMAL_TPP:g})"
    return f"{proxy:.3g} at the proxy, {target:.3g} at the target; a proxy should have {least}", _at_sweep(runs, RUN)


def _vocabulary(runs: Runs) -> Said:
    proxy, target = runs.proxy.tokenizer.num_ids, runs.target.tokenizer.num_ids
    if max(target / proxy, proxy / target) <= MAX_RATIO:
        return None
    finding = (
        f"{proxy:,} at the proxy, {target:,} at the target, more than {MAX_RATIO:g}× apart; "
        "the embedding's best rate moves with it"
    )
    return finding, _at_sweep(runs, TOKENIZER)


def _schedule(runs: Runs) -> Said:
    proxy, target = runs.proxy.schedule.kind, runs.target.schedule.kind
    if proxy == target:
        return None
    return f"{proxy} at the proxy, {target} at the target; the best rate belongs to one", _at_sweep(runs, SCHEDULE)


def _schedule_end(runs: Runs) -> Said:
    proxy, target = end_ratio(runs.proxy), end_ratio(runs.target)
    kinds = {run.schedule.kind for run in (runs.proxy, runs.target)}
    if len(kinds) > 1 or kinds == {"constant"} or abs(proxy - target) < MAX_END_DIFFERENCE:
        return None
    finding = (
        f"{proxy:g} of the peak at the proxy, {target:g} at the target, {MAX_END_DIFFERENCE:g} or more apart; "
        "between 0 and 0.1 the best peak rate differs by about an octave"
    )
    return finding, _at_sweep(runs, SCHEDULE)


def _warmup(runs: Runs) -> Said:
    steps, target_steps = (run.schedule.warmup(run.num_steps) for run in (runs.proxy, runs.target))
    share, target_share = steps / runs.proxy.num_steps, target_steps / runs.target.num_steps
    per_step = runs.target.stages[0].tokens_per_step
    tokens, target_tokens = steps * runs.proxy.stages[0].tokens_per_step, target_steps * per_step
    if MAX_RATIO * target_share >= share or MAX_RATIO * target_tokens >= tokens:
        return None
    finding = (
        f"{share:.2%} of the run ({tokens:,} tokens) at the proxy, {target_share:.2%} ({target_tokens:,} tokens) at "
        f"the target, both more than {MAX_RATIO:g}× shorter; a rate that needs its warm-up may diverge"
    )
    enough = min(math.ceil(tokens / per_step), math.ceil(share * runs.target.num_steps))
    return finding, _at_transfer(f"++target.schedule={_group(replace(runs.target.schedule, warmup_steps=enough))}")


# --- the target alone


def _timescale(target: RunSpec) -> Said:
    tpp, steps = tokens_per_parameter(target), target.num_steps
    best = power_lines_timescale(tpp)
    decay = _hidden_decay(target)  # the part of a weight that a step at the peak rate takes off
    tau = timescale(decay, steps) if decay else math.inf
    if best * steps <= 1 or min(tau, best) >= 1:
        return None  # forgets within a step, or not within the run: no figures for either
    if 1 / MAX_TIMESCALE_RATIO <= tau / best <= MAX_TIMESCALE_RATIO:
        return None
    finding = (
        f"τ = 1/(ηλ·steps) of the target's matrices is {tau:.3g} of its run; at {tpp:.3g} tokens per "
        f"parameter the best is about {best:.3g}, more than {MAX_TIMESCALE_RATIO:g}× off"
    )
    if target.parametrization.decay == "horizon":
        return finding, _at_transfer(f"hyperparameters.decay_timescale={best:.3g}")
    unit = replace(target, hyperparameters=replace(target.hyperparameters, weight_decay=0.01))
    weight_decay = 0.01 / (best * steps * _hidden_decay(unit))
    return finding, _at_transfer(f"hyperparameters.weight_decay={weight_decay:.3g}")


def _target_batch(target: RunSpec) -> Said:
    most = MAX_BATCH_RATIO * (critical := critical_batch(total_tokens(target.stages)))
    batch = max((stage.tokens_per_step for stage in target.stages if stage.batch_sequences > 1), default=0)
    if batch <= most:
        return None

    def smaller(stage: StageConfig) -> StageConfig:
        if stage.tokens_per_step <= most:
            return stage
        sequences = max(1, int(critical / stage.context_length))
        steps = math.ceil(stage.tokens / (sequences * stage.context_length))
        return replace(stage, batch_sequences=sequences, num_steps=steps)

    finding = (
        f"{batch:,} tokens a step at the target, whose critical batch is about {critical:,.0f}: more than "
        f"{MAX_BATCH_RATIO:g}× above it, tokens are wasted"
    )
    return finding, _stages(map(smaller, target.stages))


def _target_tokens(target: RunSpec) -> Said:
    tpp = tokens_per_parameter(target)
    if tpp >= COMPUTE_OPTIMAL_TPP / MAX_RATIO:
        return None
    finding = (
        f"{tpp:.3g} at the target, less than a quarter of the {COMPUTE_OPTIMAL_TPP:g} at which compute is spent best; "
        "a smaller model would reach the same loss for less"
    )
    more = COMPUTE_OPTIMAL_TPP / tpp
    return finding, _stages(replace(stage, num_steps=math.ceil(more * stage.num_steps)) for stage in target.stages)


def _at_sweep(runs: Runs, keys: tuple[str, ...]) -> str:
    return f"{SWEEP}: {better(runs.proxy, runs.target, keys)}"


def _at_transfer(*words: str) -> str:
    return f"{TRANSFER}: {shlex.join(words)}"


def _hidden_decay(spec: RunSpec) -> float:
    """ηλ of the matrices inside the blocks, at the peak rate."""
    rows = spec.plan(spec.tokenizer.num_ids).parameters.values()
    row = next(row for row in rows if row.role == "hidden")
    return row.peak_lr * row.weight_decay


def _stages(stages: Iterable[StageConfig]) -> str:
    return _at_transfer(f"target.stages=[{', '.join(map(_group, stages))}]")


def _group(config: StageConfig | ScheduleConfig) -> str:
    """A group of keys on a command line; keys that are null are left out."""
    return _flow(written(config))


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_flow(item)}' for key, item in value.items() if item is not None)}}}"
    return f"[{', '.join(map(_flow, value))}]" if isinstance(value, list) else str(value)


def without_shares(advice: Sequence[Advice]) -> list[Advice]:
    """The same for a target whose stages are shares of its tokens: a cure gives them in steps."""
    stages = "target.stages="
    return [replace(each, cure=each.cure.replace(f"'{stages}", f"target.tokens=null '{stages}")) for each in advice]


TP5 = "Tensor Programs V, arXiv:2203.03466 §6.1, reported"
RULES = (
    Rule("depth", STOP, "arXiv:2505.01618", lambda runs: _depth(runs, far=True)),
    Rule("tokens", STOP, "GPT-3 of arXiv:2203.03466, reported; the rate moves: arXiv:2409.19913, reported", _tokens),
    Rule("table", STOP, "arXiv:2203.03466 Figure 1", _table),
    Rule("width", CARE, TP5, _width),
    Rule("ladder", CARE, "a judgement", _ladder),
    Rule("depth", CARE, "arXiv:2505.01618", lambda runs: _depth(runs, far=False)),
    Rule("depth", CARE, TP5, _shallow),
    Rule("head size", CARE, "arXiv:2203.03466, reported", _head_size),
    Rule("batch", CARE, "arXiv:2410.21676, fitted at 85M to 1.2B parameters", _batch),
    Rule("tokens per parameter", CARE, "Cerebras' proxies; arXiv:2203.15556, reported", _tokens_per_parameter),
    Rule("vocabulary", CARE, "arXiv:2506.15025", _vocabulary),
    Rule("steps", CARE, f"Cerebras-GPT's proxy; 5,000 in {TP5}", _steps),
    Rule("schedule", CARE, "the Practitioner's Guide to μP, reported", _schedule),
    Rule("schedule's end", CARE, "arXiv:2502.15938, reported", _schedule_end),
    Rule("warm-up", CARE, "arXiv:2406.09405", _warmup),
    Rule("ALiBi spectrum", NOTE, "slopes: arXiv:2108.12409; the threshold is a judgement", _alibi),
    Rule("ladder's heads", NOTE, "slopes: arXiv:2108.12409; measured: docs/log.md, 2026-11-27", _alibi_rungs),
)
TARGET_RULES = (
    Rule("decay timescale", CARE, "Power Lines, arXiv:2505.13738, reported", _timescale),
    Rule("target's batch", CARE, "arXiv:2410.21676, fitted at 85M to 1.2B parameters", _target_batch),
    Rule("target's tokens per parameter", NOTE, "arXiv:2203.15556, reported", _target_tokens),
)
