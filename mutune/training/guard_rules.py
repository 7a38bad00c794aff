"""What the guard looks for: one function for each thing, from its memory and a record to alarms. No torch."""

import math
from collections.abc import Callable, Iterator, Mapping
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from mutune.training.alarms import GROWTH, Alarm
from mutune.training.usual import cusum, deviation, level

if TYPE_CHECKING:
    from mutune.training.guard import Guard

DIFFERS = "differs."  # before what processes should say alike, and do not
PROBES = 8  # probes that say what an update-to-weight ratio usually is
FEW_PROBES = 4
SMOOTH = 16  # steps of a gradient norm's median that may grow
#: What one odd sequence (a table, a row of underscores) may do: its loss up to twice the usual, its gradient this many
#: times the usual of one sequence. In real text there are such; a batch of B dilutes them to 1 / B and 1 / √B.
ODD_LOSS, ODD_GRADIENT = 1.0, 30.0


def _not_finite(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(record[name]):
            rank = record.get("rank", 0)
            where = f"rank {rank}" if math.isnan(record.get("rank_deviation", 0.0)) else name
            yield Alarm("not_finite", record["step"], record[name], "a finite number", record["step"], where)
            return
    if record["diverged"]:
        yield Alarm("diverged", record["step"], record["loss"], "to be below the bound that ends a run", record["step"])


def _loss(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """One loss far above the others, or several in a row that lie above them."""
    loss, step, state, config = record["loss"], record["step"], guard.state, guard.config
    past = state["loss"]
    if not math.isfinite(loss):
        return
    if len(past) < config.after:
        past.append(loss)
        return
    usual, spread = level(past), deviation(past)
    off, bound = (loss - usual) / spread, usual + max(config.loss_spike * spread, ODD_LOSS * usual / _sequences(state))
    if state["loss_sum"] == 0.0:
        state["loss_onset"] = step
    state["loss_sum"] = cusum(state["loss_sum"], off)
    if loss > bound:
        yield Alarm("loss_spike", step, loss, bound, step)
    else:
        _push(past, loss, config.window)
    if state["loss_sum"] > config.loss_level:
        yield Alarm("loss_level", step, loss, usual, state["loss_onset"])
        state["loss"], state["loss_sum"] = [], 0.0  # the level is another now


def _band(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    if guard.band is None or not math.isfinite(record["loss"]):
        return
    recent = guard.state["smooth"]
    _push(recent, record["loss"], guard.band_steps)
    band = guard.band(record["step"])
    if band is None or len(recent) < guard.band_steps:
        return
    smooth, (low, high) = fmean(recent), band
    outside = guard.state["outside"] = 0 if low <= smooth <= high else guard.state["outside"] + 1
    if outside >= guard.band_steps:  # of clean runs some leave it for a moment
        side, bound = ("above", high) if smooth > high else ("below", low)
        onset = max(0, record["step"] - outside - guard.band_steps + 2)
        yield Alarm("outside_band", record["step"], smooth, bound, onset, side)


def _grad(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """One gradient norm far above the others, or their median far above its lowest."""
    norm, step, config, state = record["grad_norm"], record["step"], guard.config, guard.state
    past = state["grad"]
    if not (math.isfinite(norm) and norm > 0):
        return
    value = math.log(norm)
    if len(past) < config.after:
        past.append(value)
        return
    usual = level(past)
    odd = ODD_GRADIENT / math.sqrt(_sequences(state))
    bound = usual + max(math.log(max(config.grad_spike, odd)), config.grad_spike * deviation(past))
    if value > bound:
        yield Alarm("grad_spike", step, norm, math.exp(bound), step)
    _push(past, value, config.window)
    smooth = median(past[-SMOOTH:])
    low = state["grad_low"] = min(smooth, math.inf if state["grad_low"] is None else state["grad_low"])
    if smooth > low + math.log(config.grad_growth):
        yield Alarm("grad_growth", step, math.exp(smooth), math.exp(low) * config.grad_growth, step - SMOOTH // 2)
        state["grad_low"] = smooth


def _gradient_seen(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """Σ exp_avg_sq over all weights is the moving average, with β2, of the squared norm of what Adam was given."""
    state, norm = guard.state, record["grad_norm"]
    if state["moment"] is not None and math.isfinite(norm):
        given = min(norm, guard.clip_norm)
        state["moment"] = guard.beta2 * state["moment"] + (1 - guard.beta2) * given**2
    if "second_moment" not in record:
        return
    seen, expected = record["second_moment"], state["moment"]
    state["moment"] = seen if math.isfinite(seen) else None
    if expected and abs(seen / expected - 1) > guard.config.seen_tolerance:
        onset = record["step"] - guard.config.every + 1
        yield Alarm("gradient_seen", record["step"], math.sqrt(seen), math.sqrt(expected), onset)


def _update_ratio(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """The ratio per unit of rate: a schedule moves the ratio, and nothing may move this by much."""
    config = guard.config
    for role, ratio in _by_place(record, "update_ratio."):
        if not (ratio > 0 and record["lr"] > 0 and math.isfinite(ratio)):
            continue
        past, value = guard.state["ratios"].setdefault(role, []), math.log(ratio / record["lr"])
        if len(past) >= FEW_PROBES and value > median(past) + math.log(config.update_jump):
            bound = math.exp(median(past)) * record["lr"] * config.update_jump
            yield Alarm("update_ratio", record["step"], ratio, bound, record["step"] - config.every + 1, role)
        _push(past, value, PROBES)


def _rewritten(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    if record.get("moved", 0.0) > guard.config.moved:
        onset = record["step"] - guard.config.every + 1
        yield Alarm(
            "rewritten", record["step"], record["moved"], guard.config.moved, onset, str(record["moved_tensor"])
        )


def _logits(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """Above a bound, or on the way there."""
    config, step = guard.config, record["step"]
    for name in ("attention_logit", "output_logit"):
        value, bound = record.get(f"{name}_max"), getattr(config, name)
        if value is None or not math.isfinite(value):
            continue
        past = guard.state["logits"].setdefault(name, [])
        lowest = min((before for at, before in past if step - at <= config.window), default=value)
        if value > bound:
            yield Alarm(f"{name}s", step, value, bound, step)
        elif value > max(bound / 4, config.logit_growth * lowest):
            yield Alarm(f"{name}s", step, value, max(bound / 4, config.logit_growth * lowest), step, GROWTH)
        past[:] = [pair for pair in past if step - pair[0] <= config.window] + [[step, value]]


def _eps(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    for role, share in _by_place(record, "eps_share."):
        if share > guard.config.eps_share:
            yield Alarm("eps_dominates", record["step"], share, guard.config.eps_share, record["step"], role)


def _frozen(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    onset = record["step"] - guard.config.every + 1
    for name, field in (("frozen", "frozen"), ("dead_head", "dead_heads")):
        for where in str(record.get(field, "")).split(", "):
            if where:
                yield Alarm(name, record["step"], "without change", "as the others", onset, where)


def _dtype(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    for what, dtype in _by_place(record, "dtype."):
        expected = guard.dtypes.get(what) or guard.state["dtypes"].setdefault(what, dtype)
        if dtype != expected:
            yield Alarm("dtype", record["step"], dtype, expected, record["step"] - guard.config.every + 1, what)


def _data(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    if "data_fingerprint" in record:
        expected = guard.state.setdefault("data", record["data_fingerprint"])
        if record["data_fingerprint"] != expected:
            onset = record["step"] - guard.config.every + 1
            yield Alarm("data_changed", record["step"], record["data_fingerprint"], expected, onset)


def _differs(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """What processes should say alike and do not, from the first probe on."""
    onset = record["step"] - guard.config.every + 1
    for what, said in _by_place(record, DIFFERS):
        name = "data_changed" if what == "data_fingerprint" else "dtype"
        yield Alarm(name, record["step"], said, str(record.get(what, "nothing")), onset, f"{what} of ranks")


def _ranks(guard: "Guard", record: Mapping[str, Any]) -> Iterator[Alarm]:
    """One rank once far from the others, or many times in a row the farthest."""
    if not math.isfinite(record.get("rank_deviation", math.nan)):
        return
    config, step, rank = guard.config, record["step"], record["rank"]
    off, past, run = abs(record["rank_deviation"]), guard.state["rank"], guard.state["rank_run"]
    where, odd = f"rank {rank}", ODD_LOSS * record["loss"] * record["ranks"] / _sequences(guard.state)
    if len(past) >= config.after and off > (bound := level(past) + max(config.rank_spike * deviation(past), odd)):
        yield Alarm("rank_differs", step, off, bound, step, where)
    _push(past, off, config.window)
    run[:] = [run[0] + 1, rank] if run[1] == rank else [1, rank]
    most = 1 + math.ceil(math.log(config.chance) / math.log(1 / record["ranks"]))  # P(n in a row) = ranks^(1 - n)
    if run[0] > most:
        yield Alarm("rank_differs", step, f"farthest {run[0]} times", f"{most} times", step - run[0] + 1, where)


def _sequences(state: Mapping[str, Any]) -> float:
    """Sequences of a batch; endless where the context is not known."""
    context, tokens = state["stage"]
    return tokens / context if context else math.inf


def _push(values: list[float], value: float, most: int) -> None:
    values.append(value)
    del values[:-most]


def _by_place(record: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in record.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), value


RULES: dict[str, Callable[["Guard", Mapping[str, Any]], Iterator[Alarm]]] = {
    "not_finite": _not_finite,
    "loss": _loss,
    "band": _band,
    "grad": _grad,
    "gradient_seen": _gradient_seen,
    "update_ratio": _update_ratio,
    "rewritten": _rewritten,
    "logits": _logits,
    "eps": _eps,
    "frozen": _frozen,
    "dtype": _dtype,
    "data": _data,
    "differs": _differs,
    "ranks": _ranks,
}
