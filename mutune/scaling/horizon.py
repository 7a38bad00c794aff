"""How the best rate, decay and batch move with tokens and batch: published laws as a table, side by side. No torch.

Symbols: D tokens of the run, B tokens per step, N parameters, η peak rate, λ weight decay, TPP = D/N, and the
timescale of the weights' moving average as a fraction of the run, τ = B/(ηλD).

Exponents are as reported; none was measured here. A shift is in octaves, that is in log2.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from mutune.errors import require, require_number

RATE, TIMESCALE, BATCH = "learning rate", "decay timescale", "batch"
AXES = ("tokens", "batch")


@dataclass(frozen=True)
class Law:
    """One quantity of one publication: quantity ∝ D^tokens · B^batch · N^parameters.

    Attributes:
        name: its switch in `horizon.laws`; a publication may have a row for each of several quantities.
        quantity: what moves.
        formula: as published.
        source: where.
        assumes: what is held fixed, or what else has to move along.
        tokens: exponent of D at fixed B; of D with B moving along where `path` is set. None: it does not say.
        batch: exponent of B at fixed D; None: it does not say.
        parameters: exponent of N; None where it has none, or where the parametrization's table has that part.
        path: p where `tokens` holds along B ∝ D^p. Off that path, B counts with the exponent `batch`.
    """

    name: str
    quantity: str
    formula: str
    source: str
    assumes: str
    tokens: float | None = None
    batch: float | None = None
    parameters: float | None = None
    path: float | None = None

    @property
    def slopes(self) -> dict[str, float | None]:
        """Octaves per doubling of each axis with the other held fixed; None: it does not say."""
        if self.path is None or self.tokens is None or self.batch is None:
            return {"tokens": self.tokens, "batch": self.batch}
        return {"tokens": self.tokens - self.batch * self.path, "batch": self.batch}


BETA = 0.32
LAWS = (
    Law(
        name="horizon_lr",
        quantity=RATE,
        formula="η ∝ D^-β, β = 0.32",
        source="arXiv:2409.19913 (reported)",
        assumes="fixed batch, so that steps grow with tokens; also under μP",
        tokens=-BETA,
    ),
    Law(
        name="sqrt_batch",
        quantity=RATE,
        formula="η ∝ √B",
        source="arXiv:2205.10287 (reported)",
        assumes="fixed tokens, Adam, and a batch below the critical one, above which η stops rising",
        batch=0.5,
    ),
    Law(
        name="completed_p",
        quantity=RATE,
        formula="η ∝ √(B/D)",
        source="arXiv:2512.22382 (reported)",
        assumes="λ moves by the same √(B/D); also Adam's ε by √(D/B) and 1-β by B/D",
        tokens=-0.5,
        batch=0.5,
    ),
    Law(
        name="step_law",
        quantity=RATE,
        formula="η = 1.79·N^-0.713·D^0.307",
        source="arXiv:2503.04715 (reported)",
        assumes="B at its own optimum, ∝ D^0.571, and off it η ∝ √B (not its own claim); N^-0.713 is left to the table",
        tokens=0.307,
        batch=0.5,
        path=0.571,
    ),
    Law(
        name="constant_tau",
        quantity=TIMESCALE,
        formula="τ constant",
        source="arXiv:2405.13698 (reported)",
        assumes="at the transferred η, λ ∝ B/D",
        tokens=0.0,
        batch=0.0,
        parameters=0.0,
    ),
    Law(
        name="completed_p",
        quantity=TIMESCALE,
        formula="η and λ ∝ √(B/D), so τ constant",
        source="arXiv:2512.22382 (reported)",
        assumes="η moves by √(B/D) too; at the transferred η, λ ∝ B/D",
        tokens=0.0,
        batch=0.0,
        parameters=0.0,
    ),
    Law(
        name="power_lines",
        quantity=TIMESCALE,
        formula="τ = 1.084·TPP^-0.527",
        source="arXiv:2505.13738 (reported)",
        assumes="λ is moved and η stays, as μP gives it",
        tokens=-0.527,
        batch=0.0,
        parameters=0.527,
    ),
    Law(
        name="step_law",
        quantity=BATCH,
        formula="B = 0.58·D^0.571",
        source="arXiv:2503.04715 (reported)",
        assumes="η moves along",
        tokens=0.571,
    ),
    Law(
        name="power_lines",
        quantity=BATCH,
        formula="B ∝ D^0.383",
        source="arXiv:2505.13738 (reported)",
        assumes="η and λ at their own optimum",
        tokens=0.383,
    ),
)
NAMES = tuple(dict.fromkeys(law.name for law in LAWS))

#: Error of one law's exponent, in octaves per doubling: a judgement, and all the uncertainty where one law is on.
#: Batch: the laws agree on √B, but the exponent is reported to fall to 0 above the critical batch.
OWN_ERROR = {"tokens": 0.1, "batch": 0.25}


@dataclass(frozen=True)
class HorizonConfig:
    """Which laws say how the best rate moves with tokens and batch.

    Attributes:
        laws: names of `LAWS`; [] leaves tokens and batch to what was measured.
        beta: β of `horizon_lr`.
    """

    laws: list[str] = field(default_factory=lambda: list(NAMES))
    beta: float = BETA

    def __post_init__(self) -> None:
        for name in self.laws:
            require(name in NAMES, f"horizon.laws={name} is unknown; known laws: {', '.join(NAMES)}.")
        require(
            len(set(self.laws)) == len(self.laws),
            f"horizon.laws={self.laws} repeats a law; for example horizon.laws=[{','.join(dict.fromkeys(self.laws))}].",
        )
        require_number("horizon.beta", self.beta, at_least=0.0, at_most=1.0, example=BETA)
        require(
            self.beta == BETA or "horizon_lr" in self.laws,
            f"horizon.beta={self.beta:g} belongs to the law horizon_lr, which is not in horizon.laws={self.laws}; "
            "leave it out, or add the law, for example horizon.laws=[horizon_lr].",
        )

    def rows(self, quantity: str) -> list[Law]:
        """The laws of one quantity that are on, in the table's order, with this β."""
        chosen = [law for law in LAWS if law.name in self.laws and law.quantity == quantity]
        return [replace(law, tokens=-self.beta) if law.name == "horizon_lr" else law for law in chosen]


@dataclass(frozen=True)
class Scale:
    """How large a run is: its tokens D, tokens per step B, and parameters N."""

    tokens: float
    batch: float
    parameters: float

    @property
    def num_steps(self) -> float:
        """D/B: a run whose batch changes has these at its mean batch."""
        return self.tokens / self.batch

    def doublings_to(self, target: "Scale") -> dict[str, float]:
        """log2 of the target's value over this one's, by axis."""
        return {
            "tokens": math.log2(target.tokens / self.tokens),
            "batch": math.log2(target.batch / self.batch),
            "parameters": math.log2(target.parameters / self.parameters),
        }


@dataclass(frozen=True)
class Shift:
    """What one law says of one change of scale.

    Attributes:
        law: the law.
        octaves: log2 of its quantity's ratio, over the axes that it speaks of.
        silent_on: axes that change and that it does not speak of.
    """

    law: Law
    octaves: float
    silent_on: tuple[str, ...]


def shifts(config: HorizonConfig, quantity: str, proxy: Scale, target: Scale) -> list[Shift]:
    """Each chosen law's shift of `quantity` from proxy to target, side by side.

    A rate's dependence on N is none of these laws' business: the parametrization's table has it. A law that says
    nothing of an axis is listed with the rest of its shift, and names that axis.
    """
    return [_shift(law, proxy.doublings_to(target)) for law in config.rows(quantity)]


@dataclass(frozen=True)
class AxisPrior:
    """What the laws say of the best rate along one axis, the other axis held fixed.

    Attributes:
        axis: `tokens` or `batch`.
        mean: mean of the laws' slopes, octaves of the best rate per doubling.
        sd: the laws' standard deviation and one law's own error (`OWN_ERROR`), in quadrature.
        laws: slope by law, of those that speak of this axis.
    """

    axis: str
    mean: float
    sd: float
    laws: dict[str, float]


def axis_priors(config: HorizonConfig, measured: Collection[str] = ()) -> list[AxisPrior]:
    """A Gaussian prior of log2(best rate) per doubling of tokens at fixed batch, and of batch at fixed tokens.

    Both ends being at fixed other axis, the priors add for a run that changes both: no law is counted twice, since one
    that holds along a path B ∝ D^p was taken apart (`Law.slopes`). They count as independent, which errs on the wide
    side: η ∝ √(B/D) alone would not move at constant steps.

    Args:
        measured: axes that a ladder measured; what was measured replaces the laws, so these have no prior.
    """
    return [prior for axis in AXES if axis not in measured and (prior := _prior(config, axis)) is not None]


def expected_shift(priors: list[AxisPrior], proxy: Scale, target: Scale) -> tuple[float, float]:
    """Mean and standard deviation of log2(best rate at the target / at the proxy), by the priors alone."""
    doublings = proxy.doublings_to(target)
    mean = sum(prior.mean * doublings[prior.axis] for prior in priors)
    return mean, math.hypot(*(prior.sd * doublings[prior.axis] for prior in priors))


@dataclass(frozen=True)
class DecayRow:
    """What one law would have at the target, or what is given there (`law` is `given`).

    Attributes:
        law: its name.
        timescale: τ as a fraction of the run; as `hyperparameters.decay_timescale` takes it.
        weight_decay: the λ that gives this τ at the rate of the same tensor.
        octaves: log2 of that λ over the given one; 0 for the given one.
    """

    law: str
    timescale: float
    weight_decay: float
    octaves: float


def decay_table(
    config: HorizonConfig,
    proxy: Scale,
    target: Scale,
    *,
    proxy_rate_decay: float,
    target_rate: float,
    target_decay: float,
) -> list[DecayRow]:
    """Weight decay at the target: what the transfer gives it, and what each chosen law would give, side by side.

    Each law carries the proxy's own τ over; whether that was the best at the proxy is for the study to say. Without
    weight decay there is no τ, and nothing to compare: empty.

    Args:
        proxy_rate_decay: η·λ of a decayed matrix at the proxy.
        target_rate, target_decay: its η and λ at the target, as the plan has them.
    """
    if proxy_rate_decay == 0.0 or target_decay == 0.0:
        return []
    start = timescale(proxy_rate_decay, proxy.num_steps)
    found = {"given": timescale(target_rate * target_decay, target.num_steps)}
    for shift in shifts(config, TIMESCALE, proxy, target):
        found[shift.law.name] = start * 2.0**shift.octaves
    return [_decay_row(name, tau, target_rate, target_decay, target.num_steps) for name, tau in found.items()]


def timescale(rate_decay: float, num_steps: float) -> float:
    """τ = B/(ηλD) = 1/(ηλ·steps), as a fraction of the run."""
    return 1.0 / (rate_decay * num_steps)


def power_lines_timescale(tokens_per_parameter: float) -> float:
    """τ = 1.084·TPP^-0.527 in absolute terms (arXiv:2505.13738, reported): for a λ that no study searched."""
    return 1.084 * tokens_per_parameter**-0.527


def _shift(law: Law, doublings: dict[str, float]) -> Shift:
    slopes = dict(law.slopes)
    if law.quantity == TIMESCALE:
        slopes["parameters"] = law.parameters
    octaves = sum(slope * doublings[axis] for axis, slope in slopes.items() if slope is not None)
    silent = tuple(axis for axis, slope in slopes.items() if slope is None and doublings[axis] != 0.0)
    return Shift(law, octaves, silent)


def _prior(config: HorizonConfig, axis: str) -> AxisPrior | None:
    """None where no chosen law speaks of this axis."""
    slopes = {law.name: slope for law in config.rows(RATE) if (slope := law.slopes[axis]) is not None}
    if not slopes:
        return None
    spread = stdev(slopes.values()) if len(slopes) > 1 else 0.0
    return AxisPrior(axis, fmean(slopes.values()), math.hypot(spread, OWN_ERROR[axis]), slopes)


def _decay_row(name: str, tau: float, rate: float, given: float, num_steps: float) -> DecayRow:
    decay = 1.0 / (tau * num_steps * rate)
    return DecayRow(name, tau, decay, math.log2(decay / given))
