"""The guard: it reads a run's records, names what goes wrong, and says what to do. No torch.

What it remembers is plain data that travels with a checkpoint, so that a resumed run is watched as if it had not
stopped. Each rule is one function; `RULES` is all of them.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from mutune.data.windows import Skip
from mutune.training.alarms import PAUSE, ROLLBACK, WARN, Alarm, GuardConfig
from mutune.training.usual import cusum, deviation, level

#: Step → lowest and highest smoothed training loss that is expected, or None where nothing is.
Band = Callable[[int], tuple[float, float] | None]
PROBES = 8  # probes that say what an update-to-weight ratio usually is
FEW_PROBES = 4
SMOOTH = 16  # steps of a gradient norm's median that may grow
AGAIN = 1000  # steps within which rollbacks are counted
#: What one odd sequence (a table, a row of underscores) may do: its loss up to twice the usual, its gradient this many
#: times the usual of one sequence. In real text there are such; a batch of B dilutes them to 1 / B and 1 / √B.
ODD_LOSS, ODD_GRADIENT = 1.0, 30.0


@dataclass(frozen=True)
class Action:
    """What to do after a step.

    Attributes:
        do: `warn` goes on; `pause` saves and stops; `rollback` loads a checkpoint and goes on from there.
        sentence: for the user; empty where there is no alarm.
        before: of a rollback: the newest checkpoint of at most this step is good.
        skip: of a rollback: the batches that are not read again, for `WindowLoader.skips`.
    """

    do: str = WARN
    sentence: str = ""
    before: int | None = None
    skip: Skip | None = None


class Guard:
    """Watches the records of one run.

    Args:
        config: thresholds and policy.
        clip_norm: the bound on the gradient norm, as the loop has it.
        beta2: Adam's decay of the second moment.
        band: the predicted loss.
        band_steps: steps over which the band's loss is averaged, and for which it must be outside.
        dtypes: what a probe should say of number formats, as {"products": "bfloat16"}; of the others its first word
            counts.

    Attributes:
        skips: the windows of batches that rollbacks left out; the loader needs them.
    """

    def __init__(
        self,
        config: GuardConfig,
        *,
        clip_norm: float,
        beta2: float,
        band: Band | None = None,
        band_steps: int = 20,
        dtypes: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.clip_norm, self.beta2 = config, clip_norm, beta2
        self.band, self.band_steps, self.dtypes = band, band_steps, dict(dtypes or {})
        self.skips: tuple[Skip, ...] = ()
        self.state: dict[str, Any] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """As at the first step of a run; `skips` stay."""
        self.state = {"stage": None, "tokens": 0, "told": {}, "dtypes": {}, "moment": None, **_fresh()}

    def observe(self, record: Mapping[str, Any]) -> list[Alarm]:
        """What is wrong after this step; the same thing is said once in `window` steps.

        Args:
            record: of the loop: `step, tokens, loss, lr, grad_norm`, maybe `context_length`; at probe steps
                `probes.measure`'s fields; in a distributed run `rank_fields`.
        """
        self._enter_stage(record)
        found = [alarm for rule in RULES.values() for alarm in rule(self, record)]
        return [alarm for alarm in found if self._is_new(alarm)]

    def decide(self, alarms: Sequence[Alarm]) -> Action:
        """What the policy makes of a step's alarms: the strongest that they call for and the policy allows."""
        if not alarms:
            return Action()
        said = "\n".join(map(str, alarms))
        wanted = max((alarm.calls_for for alarm in alarms), key=[WARN, ROLLBACK, PAUSE].index)
        allowed = self.config.policy
        if WARN in (wanted, allowed):
            return Action(WARN, said)
        step = alarms[0].step
        first = max(0, min(alarm.onset for alarm in alarms if alarm.calls_for != WARN) - 1 - self.config.skip_before)
        if PAUSE in (wanted, allowed):
            return Action(PAUSE, f"{said}\nThe run is paused; what is good is from step {first:,} or before.", first)
        lately = [skip for skip in self.skips if step - skip.from_step <= AGAIN]
        if len(lately) >= self.config.max_rollbacks:
            again = f"The run went back {len(lately)} times within {AGAIN:,} steps, so other batches do not cure it"
            return Action(PAUSE, f"{said}\n{again}; it is paused.", first)
        skip = Skip(from_step=first, num_skipped=(step - first) * 2 ** len(lately))  # again: skip twice as many
        how = (
            f"The run goes back to a checkpoint of step {first:,} or before, and leaves out {skip.num_skipped} batches"
        )
        return Action(ROLLBACK, f"{said}\n{how} from there on.", first, skip)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain data for a checkpoint."""
        skips = [[skip.from_step, skip.num_skipped] for skip in self.skips]
        return {**copy.deepcopy(self.state), "skips": skips}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's. After a rollback, set `skips` anew: the checkpoint is from before it."""
        kept = copy.deepcopy(dict(state))
        self.skips = tuple(Skip(*pair) for pair in kept.pop("skips"))
        self.state = kept

    def _enter_stage(self, record: Mapping[str, Any]) -> None:
        """What was usual at another context or batch says nothing of this one."""
        batch = record["tokens"] - self.state["tokens"]
        stage = [record.get("context_length"), batch]
        if self.state["stage"] != stage:
            first = record["step"] == 1
            self.state |= _fresh() | {"stage": stage, "moment": 0.0 if first else self.state["moment"]}
        self.state["tokens"] = record["tokens"]

    def _is_new(self, alarm: Alarm) -> bool:
        key, told = f"{alarm.name} {alarm.where}", self.state["told"]
        if alarm.name != "not_finite" and alarm.step - told.get(key, -math.inf) < self.config.window:
            return False
        told[key] = alarm.step
        return True


def rank_fields(losses: Sequence[float]) -> dict[str, float]:
    """What a distributed run adds to its record: which rank's loss is farthest from the others, and how far.

    Args:
        losses: the loss of each rank's part of the batch, by rank; two at least.
    """
    bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    if bad:
        return {"ranks": len(losses), "rank": bad[0], "rank_deviation": math.nan}
    middle = median(losses)
    rank = max(range(len(losses)), key=lambda r: (abs(losses[r] - middle), losses[r]))
    return {"ranks": len(losses), "rank": rank, "rank_deviation": losses[rank] - middle}


def _fresh() -> dict[str, Any]:
    """What is remembered of one stage."""
    series: dict[str, Any] = {name: [] for name in ("loss", "grad", "rank", "smooth")}
    series |= {"outside": 0, "loss_sum": 0.0, "loss_onset": 0, "grad_low": None, "rank_run": [0, -1]}
    return series | {"ratios": {}, "logits": {}}


# --------------------------------------------------------------------------------------------------------------- rules
def _not_finite(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(record[name]):
            rank = record.get("rank", 0)
            where = f"rank {rank}" if math.isnan(record.get("rank_deviation", 0.0)) else name
            yield Alarm("not_finite", record["step"], record[name], "a finite number", record["step"], where)
            return


def _loss(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


def _band(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


def _grad(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


def _gradient_seen(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


def _update_ratio(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


def _rewritten(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    if record.get("moved", 0.0) > guard.config.moved:
        onset = record["step"] - guard.config.every + 1
        yield Alarm(
            "rewritten", record["step"], record["moved"], guard.config.moved, onset, str(record["moved_tensor"])
        )


def _logits(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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
            yield Alarm(f"{name}s", step, value, max(bound / 4, config.logit_growth * lowest), step, "growth")
        past[:] = [pair for pair in past if step - pair[0] <= config.window] + [[step, value]]


def _eps(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    for role, share in _by_place(record, "eps_share."):
        if share > guard.config.eps_share:
            yield Alarm("eps_dominates", record["step"], share, guard.config.eps_share, record["step"], role)


def _frozen(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    onset = record["step"] - guard.config.every + 1
    for name, field in (("frozen", "frozen"), ("dead_head", "dead_heads")):
        for where in str(record.get(field, "")).split(", "):
            if where:
                yield Alarm(name, record["step"], "without change", "as the others", onset, where)


def _dtype(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    for what, dtype in _by_place(record, "dtype."):
        expected = guard.dtypes.get(what) or guard.state["dtypes"].setdefault(what, dtype)
        if dtype != expected:
            yield Alarm("dtype", record["step"], dtype, expected, record["step"] - guard.config.every + 1, what)


def _data(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
    if "data_fingerprint" in record:
        expected = guard.state.setdefault("data", record["data_fingerprint"])
        if record["data_fingerprint"] != expected:
            onset = record["step"] - guard.config.every + 1
            yield Alarm("data_changed", record["step"], record["data_fingerprint"], expected, onset)


def _ranks(guard: Guard, record: Mapping[str, Any]) -> Iterator[Alarm]:
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


RULES: dict[str, Callable[[Guard, Mapping[str, Any]], Iterator[Alarm]]] = {
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
    "ranks": _ranks,
}
