"""The guard: it reads a run's records, names what goes wrong, and says what to do. No torch.

What it remembers is plain data that travels with a checkpoint, so that a resumed run is watched as if it had not
stopped.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mutune.data.windows import Skip
from mutune.errors import require, shown
from mutune.training.alarms import PAUSE, ROLLBACK, WARN, Alarm, GuardConfig
from mutune.training.guard_rules import RULES

#: Step → lowest and highest smoothed training loss that is expected, or None where nothing is.
Band = Callable[[int], tuple[float, float] | None]
AGAIN = 1000  # steps within which rollbacks are counted


@dataclass(frozen=True)
class Action:
    """What to do after a step.

    Attributes:
        do: `warn` goes on; `pause` saves and stops; `rollback` loads a checkpoint and goes on from there.
        sentence: for the user; empty where there is no alarm.
        before: of a rollback: the newest checkpoint of at most this step is good.
        skips: of a rollback: the batches that are not read again, for `WindowLoader.skips`.
    """

    do: str = WARN
    sentence: str = ""
    before: int | None = None
    skips: tuple[Skip, ...] = ()


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
        rollbacks: the step from which each rollback left some out.
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
        self.rollbacks: tuple[int, ...] = ()
        self.state: dict[str, Any] = {}
        self.begin_anew()

    def begin_anew(self) -> None:
        """As at the first step of a run; `skips` and `rollbacks` stay."""
        self.state = _unborn()

    def observe(self, record: Mapping[str, Any]) -> list[Alarm]:
        """What is wrong after this step; the same thing is said once in `window` steps.

        Args:
            record: of the loop: `step, tokens, loss, lr, grad_norm`, maybe `context_length`; at probe steps
                `probes.measure`'s fields; in a distributed run `rank_fields`.
        """
        self._enter_stage(record)
        found = [alarm for rule in RULES.values() for alarm in rule(self, record)]
        return [alarm for alarm in found if self._is_new(alarm)]

    def decide(self, alarms: Sequence[Alarm], stage_start: int = 0) -> Action:
        """What the policy makes of a step's alarms: the strongest that they call for and the policy allows.

        Args:
            stage_start: the first step of the stage that is read; batches are left out of each stage by itself.
        """
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
        lately = [before for before in self.rollbacks if step - before <= AGAIN]
        if len(lately) >= self.config.max_rollbacks:
            again = f"The run went back {len(lately)} times within {AGAIN:,} steps, so other batches do not cure it"
            return Action(PAUSE, f"{said}\n{again}; it is paused.", first)
        here = max(first, stage_start)
        parts = [(first, here), (here, step)] if first < here else [(first, step)]
        skips = tuple(Skip(low, (high - low) * 2 ** len(lately)) for low, high in parts)  # again: twice as many
        left_out = sum(skip.num_skipped for skip in skips)
        how = f"The run goes back to a checkpoint of step {first:,} or before, and leaves out {left_out} batches"
        return Action(ROLLBACK, f"{said}\n{how} from there on.", first, skips)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain data for a checkpoint."""
        skips = [[skip.from_step, skip.num_skipped] for skip in self.skips]
        return {**copy.deepcopy(self.state), "skips": skips, "rollbacks": list(self.rollbacks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Go on from a checkpoint's. After a rollback, set `skips` and `rollbacks` anew: the checkpoint is from before
        it.

        Returns:
            What it does not say, as one of another version may not; that begins anew.
        """
        require_state(state)
        kept = copy.deepcopy(dict(state))
        self.skips = tuple(Skip(*pair) for pair in kept.pop("skips", ()))
        self.rollbacks = tuple(kept.pop("rollbacks", [skip.from_step for skip in self.skips]))
        self.begin_anew()
        unknown = sorted(self.state.keys() - kept.keys())
        self.state |= kept
        return unknown

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


def require_state(state: Mapping[str, Any]) -> None:
    """Refuse what cannot be a guard's memory.

    Raises:
        Refusal: a part of it is of another kind than the guard's own.
    """
    for key, own in {**_unborn(), "skips": [], "rollbacks": []}.items():
        value = state.get(key, own)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = number if isinstance(own, int | float) else isinstance(value, type(own))
        fits = fits or (own is None and (number or isinstance(value, list)))
        require(fits, f"guard.{key} is {shown(value)}, which is no such thing")
    for pair in state.get("skips", ()):
        require(isinstance(pair, list) and len(pair) == 2, f"guard.skips has {shown(pair)}")
        Skip(*pair)
    require(all(isinstance(step, int) for step in state.get("rollbacks", ())), "guard.rollbacks has what is no step")


def _unborn() -> dict[str, Any]:
    """What a guard remembers before the first step."""
    return {"stage": None, "tokens": 0, "told": {}, "dtypes": {}, "moment": None, **_fresh()}


def _fresh() -> dict[str, Any]:
    """What is remembered of one stage."""
    series: dict[str, Any] = {name: [] for name in ("loss", "grad", "rank", "smooth")}
    series |= {"outside": 0, "loss_sum": 0.0, "loss_onset": 0, "grad_low": None, "rank_run": [0, -1]}
    return series | {"ratios": {}, "logits": {}}
