"""What it costs to train the target at a rate that is not its best, and which rate costs the least."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from mutune.certificate.config import PriceConfig
from mutune.certificate.drift import Drift
from mutune.certificate.valleys import Valleys

FAR = 4.0  # octaves around the transferred rate, at least, among which the recommended one is looked for
CLOSE = 0.01
#: What one per cent of loss is worth in tokens where no tokens ladder says it: 1.25 times as many, reported for models
#: of 215M-1.07B parameters.
TOKENS_PER_PERCENT = 1.25
MOST_DOUBLINGS = 30.0  # of the tokens, beyond which nobody could win a penalty back


@dataclass(frozen=True)
class Regret:
    """Expected loss above the target's best, nats per token, over what is not known of its optimum.

    The valley at the target is taken to have the shape of the nearest rung's.

    Attributes:
        transferred: at the transferred rate. low, high: the 90 % interval of that penalty.
        octave_down, octave_up: an octave below and above the transferred rate.
        offset: octaves from the transferred rate to the one of least expected penalty; below the expected optimum where
            too high costs more than too low.
        recommended: the penalty there.
    """

    transferred: float
    low: float
    high: float
    octave_down: float
    octave_up: float
    offset: float
    recommended: float


def regret(valleys: Valleys, drift: Drift, rung: int, log2_rate: float) -> Regret:
    """The penalties at the target.

    Args:
        rung: the row whose shape the target's valley has.
        log2_rate: log2 of the transferred base learning rate.
    """

    def expected(offset: float) -> float:
        return float(drift.weights @ penalties(valleys, drift, rung, log2_rate + offset))

    low, _, high = drift.quantiles(drift.target - log2_rate)
    bounds = min(-FAR, low - 1), max(FAR, high + 1)
    found = minimize_scalar(expected, bounds=bounds, method="bounded", options={"xatol": CLOSE})
    best = min(0.0, float(found.x), key=expected)
    at_rate = penalties(valleys, drift, rung, log2_rate)
    low, _, high = drift.quantiles(at_rate)
    return Regret(
        transferred=expected(0.0),
        low=low,
        high=high,
        octave_down=expected(-1.0),
        octave_up=expected(1.0),
        offset=best,
        recommended=expected(best),
    )


def penalties(valleys: Valleys, drift: Drift, rung: int, log2_rate: float) -> np.ndarray:
    """(draws of `drift`,) nats per token above the target's best; arguments as for `regret`."""
    offsets = log2_rate - drift.target
    found = np.empty_like(offsets)
    for i, fit in enumerate(valleys.fits):
        mine = drift.form == i
        found[mine] = fit.penalty(rung, offsets[mine])
    return found


def loss_per_doubling(loss: float, tokens: np.ndarray, levels: np.ndarray, errors: np.ndarray) -> tuple[float, str]:
    """How much loss twice the tokens take off, nats per token, and where that is from.

    Args:
        loss: at the target, nats per token.
        tokens, levels, errors: of the rungs that differ in tokens alone, with the levels' standard errors; fewer than
            two, or a difference within its error, and the general figure is taken.
    """
    order = np.argsort(tokens)
    if len(order) > 1:
        (less, more), (high, low) = tokens[order[-2:]], levels[order[-2:]]
        if high - low > 2 * np.hypot(*errors[order[-2:]]):
            return float((high - low) / np.log2(more / less)), "measured on the ladder's two longest runs"
    taken = f"1 % of loss taken as {TOKENS_PER_PERCENT:g} times the tokens, which is reported, not measured"
    return float(0.01 * loss / np.log2(TOKENS_PER_PERCENT)), taken


def price_of(
    penalty: float, tokens: float, per_doubling: float, flops_per_token: float | None, prices: PriceConfig
) -> dict[str, float | None]:
    """What wins the penalty back: tokens more, their FLOPs, GPU-hours and money.

    Args:
        penalty: nats per token. per_doubling: what twice the tokens take off.
        tokens: the target's.
        flops_per_token: of training; None leaves everything after the tokens out. All is None where the tokens would be
            more than 2^30 times the target's.
    """
    doublings = penalty / per_doubling
    if doublings > MOST_DOUBLINGS:  # no number of tokens to speak of
        return {"tokens": None, "flops": None, "gpu_hours": None, "money": None}
    more = tokens * (2.0**doublings - 1)
    flops = None if flops_per_token is None else more * flops_per_token
    hours = None if flops is None else flops / prices.flops_per_gpu_second / 3600
    return {
        "tokens": more,
        "flops": flops,
        "gpu_hours": hours,
        "money": None if hours is None else hours * prices.gpu_hour,
    }
