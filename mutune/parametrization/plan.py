"""The plan: a table and two shapes become one plain number per tensor and per site. No torch, no state on tensors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from mutune.errors import Refusal, require, require_number
from mutune.files import csv_text
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import DECAYS, NORMAL, TRUNCATED_NORMAL, TRUNCATED_STD_RATIO, Rule, Site, Table


@dataclass(frozen=True)
class TensorSpec:
    """One distinct trainable tensor of a model.

    Attributes:
        name: the parameter's name in `model.named_parameters()`.
        role: the row of the table that rules it.
        shape: dimensions, `(fan_out, fan_in)` for matrices.
        fan_in: number of inputs each output sums over; for the embedding table, a block's input weights and vectors,
            the width they carry.
        in_block: whether it sits inside a residual block (depth rules apply there).
        sites: the forward multipliers that act on its product.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    fan_in: float
    in_block: bool = False
    sites: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class TensorPlan:
    """One row of `parametrization.csv`. Multipliers are relative to the base hyperparameters."""

    name: str
    role: str
    shape: str
    fan_in: float
    width_mult: float
    depth_mult: float
    init: str
    init_std: float
    init_std_realised: float
    lr_mult: float
    wd_mult: float
    eps_mult: float
    peak_lr: float
    weight_decay: float
    adam_eps: float


@dataclass(frozen=True)
class SitePlan:
    """One row of `multipliers.csv`: the number the forward pass multiplies with at `site`, acting on `tensor`."""

    site: str
    tensor: str
    value: float
    formula: str


@dataclass(frozen=True)
class Plan:
    """Everything that a table says about one model at one shape, keyed by parameter name."""

    table: str
    parameters: dict[str, TensorPlan]
    multipliers: dict[str, SitePlan]

    def parameters_csv(self) -> str:
        """`parametrization.csv` as text, one row per distinct tensor."""
        return csv_text(asdict(row) for row in self.parameters.values())

    def multipliers_csv(self) -> str:
        """`multipliers.csv` as text, one row per site."""
        return csv_text(asdict(row) for row in self.multipliers.values())

    def as_dict(self) -> dict[str, object]:
        """Plain data for a checkpoint; equal plans give equal data."""
        return {
            "table": self.table,
            "parameters": {name: asdict(row) for name, row in self.parameters.items()},
            "multipliers": {name: asdict(row) for name, row in self.multipliers.items()},
        }


@dataclass(frozen=True)
class BaseShape:
    """The shape at which the base hyperparameters live: fan-ins by tensor *kind*, and depth.

    Attributes:
        depth: number of blocks.
        fan_in: the base fan-in of each tensor, keyed by its name, or by its name without the block index
            (`h.*.mlp.c_proj.weight`) for all blocks alike; real-valued where the base is declared instead of built.
    """

    depth: int
    fan_in: Mapping[str, float]

    def fan_in_of(self, name: str) -> float:
        """The base fan-in of the tensor of that name.

        Raises:
            Refusal: the base does not have it.
        """
        for key in (name, kind(name)):
            if key in self.fan_in:
                return self.fan_in[key]
        raise Refusal(f"the base shape has no tensor {kind(name)}; build it with the same switches as the model.")


def kind(name: str) -> str:
    """The parameter's name with block indices replaced: `h.3.ln_1.bias` → `h.*.ln_1.bias`."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def base_of(specs: Iterable[TensorSpec], *, depth: int) -> BaseShape:
    """The base built from a model's own tensors, each with its own (integer) fan-in."""
    return BaseShape(depth, {kind(spec.name): spec.fan_in for spec in specs})


@dataclass(frozen=True)
class Decay:
    """How weight decay follows the learning rate (`rules.DECAYS`); `num_steps` of the run is `horizon`'s."""

    mode: str = "table"
    exponent: float = 1.0
    num_steps: int | None = None

    def __post_init__(self) -> None:
        require(self.mode in DECAYS, f"decay={self.mode} is unknown; known decays: {', '.join(DECAYS)}.")
        require_number("decay.exponent", self.exponent, at_least=0.0, at_most=2.0, example=1.0)
        require(
            self.exponent == 1.0 or self.mode == "scaled",
            f"decay.exponent={self.exponent:g} belongs to decay=scaled; for example Decay('scaled', 0.5).",
        )
        if self.num_steps is not None:
            require_number("decay.num_steps", self.num_steps, at_least=1, example=1000, whole=True)


def make_plan(
    table: Table,
    specs: Iterable[TensorSpec],
    base: BaseShape,
    hyperparameters: BaseHyperparameters,
    *,
    depth: int,
    head_size: int,
    decay: Decay = Decay(),
) -> Plan:
    """Turn base hyperparameters into per-tensor and per-site values at the given shape.

    Args:
        table: the parametrization.
        specs: every distinct trainable tensor of the model, once.
        base: the shape at which `hyperparameters` live.
        hyperparameters: values at the base.
        depth, head_size: L and d_head of the model that `specs` describe.
        decay: how weight decay scales.

    Raises:
        Refusal: a tensor whose role the table does not rule, or that the base does not have; a table that needs
            separate embedding and output matrices on a tied model; a decay that lacks its hyperparameter.
    """
    specs, base_decay = list(specs), _base_decay(decay, hyperparameters)
    for spec in specs:
        require(
            not (table.untied and {"embedding", "output"} <= set(spec.sites)),
            f"parametrization.table={table.name} gives embedding and output their own rules, and {spec.name} is both; "
            f"untie them (model.tied=false) or take parametrization.table=mup.",
        )
    rows = {spec.name: _tensor_plan(table, spec, base, hyperparameters, decay, base_decay, depth) for spec in specs}
    acts_on: dict[str, TensorSpec] = {}
    for spec in specs:
        for site in spec.sites:
            acts_on.setdefault(site, spec)
    sites = {
        name: SitePlan(
            name,
            kind(acts_on[name].name),
            _site_value(site, rows[acts_on[name].name].width_mult, depth / base.depth, head_size, hyperparameters),
            site.formula,
        )
        for name, site in table.sites.items()
        if name in acts_on
    }
    return Plan(table.name, rows, sites)


def _tensor_plan(
    table: Table,
    spec: TensorSpec,
    base: BaseShape,
    hyper: BaseHyperparameters,
    decay: Decay,
    base_decay: float,
    depth: int,
) -> TensorPlan:
    if spec.role not in table.rules:
        raise Refusal(
            f"table {table.name} has no rule for role {spec.role} of {spec.name}; it rules {list(table.rules)}."
        )
    rule = table.rules[spec.role]
    m = spec.fan_in / base.fan_in_of(spec.name)
    m_depth = depth / base.depth if spec.in_block else 1.0
    std, realised = _init_std(rule, m, depth, hyper.init_std)
    eps = table.adam_eps if hyper.adam_eps is None else hyper.adam_eps
    peak_lr = _scale(_scale(hyper.learning_rate, m, rule.lr), m_depth, rule.lr_depth)
    lr_mult = _scale(_scale(1.0, m, rule.lr), m_depth, rule.lr_depth)
    wd_mult = _wd_mult(rule, m, lr_mult, decay)
    return TensorPlan(
        name=spec.name,
        role=spec.role,
        shape="x".join(map(str, spec.shape)),
        fan_in=spec.fan_in,
        width_mult=m,
        depth_mult=m_depth,
        init=rule.init,
        init_std=std,
        init_std_realised=realised,
        lr_mult=lr_mult,
        wd_mult=wd_mult,
        eps_mult=_scale(_scale(1.0, m, rule.eps), m_depth, rule.eps_depth),
        peak_lr=peak_lr,
        weight_decay=base_decay * wd_mult,
        adam_eps=_scale(_scale(eps, m, rule.eps), m_depth, rule.eps_depth),
    )


def _wd_mult(rule: Rule, m: float, lr_mult: float, decay: Decay) -> float:
    """Weight decay over that of the base; 0 for what the table never decays."""
    if not rule.decayed:
        return 0.0
    return {
        "table": _scale(1.0, m, rule.wd),
        "fixed": 1.0,
        "scaled": _scale(1.0, lr_mult, -decay.exponent),
        "independent": 1.0 / lr_mult,
        "horizon": 1.0 / lr_mult,
    }[decay.mode]


def _base_decay(decay: Decay, hyper: BaseHyperparameters) -> float:
    """AdamW's λ at the base, where lr_mult is 1."""
    if decay.mode == "horizon":
        return _horizon_decay(decay.num_steps, hyper)
    require(
        hyper.decay_timescale is None,
        f"hyperparameters.decay_timescale={hyper.decay_timescale} is read by parametrization.decay=horizon alone, and "
        f"decay is {decay.mode}; set parametrization.decay=horizon, or hyperparameters.weight_decay=0.1 instead.",
    )
    if decay.mode != "independent":
        return hyper.weight_decay
    require(
        hyper.weight_decay < 1.0,
        f"hyperparameters.weight_decay={hyper.weight_decay:g} is, with parametrization.decay=independent, the part "
        f"of a weight that a step takes off; it must be below 1, for example hyperparameters.weight_decay=0.0001.",
    )
    return hyper.weight_decay / hyper.learning_rate


def _horizon_decay(num_steps: int | None, hyper: BaseHyperparameters) -> float:
    """λ = 1 / (τ·steps·η); a `weight_decay` that is not the default was set by someone who expects it to be read."""
    require(
        hyper.weight_decay == BaseHyperparameters.weight_decay,
        f"hyperparameters.weight_decay={hyper.weight_decay:g} is not read by parametrization.decay=horizon, which has "
        f"hyperparameters.decay_timescale in its place; set that, for example hyperparameters.decay_timescale=0.1.",
    )
    require(
        hyper.decay_timescale is not None,
        "parametrization.decay=horizon needs hyperparameters.decay_timescale, the moving average's timescale as a "
        "fraction of the run; for example hyperparameters.decay_timescale=0.1.",
    )
    require(
        num_steps is not None,
        "decay=horizon needs the run's num_steps; for example decay=mutune.Decay('horizon', num_steps=1000).",
    )
    assert hyper.decay_timescale is not None
    assert num_steps is not None
    require(
        hyper.decay_timescale * num_steps > 1.0,
        f"hyperparameters.decay_timescale={hyper.decay_timescale:g} of {num_steps} steps is not even one step; "
        f"for example hyperparameters.decay_timescale=0.1.",
    )
    return 1.0 / (hyper.decay_timescale * num_steps * hyper.learning_rate)


def _init_std(rule: Rule, m: float, depth: int, sigma: float) -> tuple[float, float]:
    """Nominal and realised std; σ·m^std, over sqrt(2L) where the rule says so; 0 for constants."""
    if rule.init not in (NORMAL, TRUNCATED_NORMAL):
        return 0.0, 0.0
    scale = m ** (-2 * rule.std) * (2 * depth if rule.per_depth else 1)  # the variance's divisor, one square root
    std = sigma / math.sqrt(scale)
    return std, std * TRUNCATED_STD_RATIO if rule.init == TRUNCATED_NORMAL else std


def _site_value(site: Site, m: float, m_depth: float, head_size: int, hyper: BaseHyperparameters) -> float:
    alpha = 1.0 if site.hyperparameter is None else getattr(hyper, site.hyperparameter)
    return _scale(_scale(_scale(alpha, m, site.width), head_size, site.head), m_depth, site.depth)


def _scale(value: float, m: float, exponent: float) -> float:
    """value·m^exponent, by division where the exponent is negative: the same bits as `lr / width_mult`."""
    return value / m**-exponent if exponent < 0 else value * m**exponent
