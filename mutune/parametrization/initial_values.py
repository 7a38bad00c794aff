"""Whether live tensors have the initial values of a plan, as far as a sample can tell."""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from mutune.parametrization.finding import Finding
from mutune.parametrization.plan import Plan, TensorPlan
from mutune.parametrization.rules import NORMAL, ONES, TRUNCATED_NORMAL

#: Half-width of the sampling interval in standard errors. A correct tensor leaves it once in 5e8 draws, so that 1,000
#: models of 1,000 tensors give no alarm; 10 % of 5,000 elements are 10 standard errors.
Z = 6.0

#: Fourth moment over squared variance. The sample std of n draws has the relative standard error sqrt((κ - 1) / 4n).
#: Truncated at ±2σ: with Z2 = Φ(2) - Φ(-2), variance v = 1 - 4φ(2)/Z2, fourth moment 3v - 16φ(2)/Z2.
KURTOSIS = {NORMAL: 3.0, TRUNCATED_NORMAL: 2.3655367171}


def initial_values(tensors: Mapping[str, nn.Parameter], plan: Plan) -> Iterator[Finding]:
    """Findings about the tensors that a plan rules: constants exactly, random ones by their mean and deviation.

    Sharded tensors are gathered one at a time, so every process must call it.
    """
    for name, tensor in tensors.items():
        row = plan.parameters.get(name)
        if row is None:
            continue
        if tensor.is_meta:
            yield Finding(name, "initial values", row.init, "none", "it is still on the meta device")
        elif row.init in KURTOSIS:
            yield from _random(row, _whole(tensor))
        else:
            yield from _constant(row, _whole(tensor))


def standard_error(row: TensorPlan, count: int) -> float:
    """Of the sample std of `count` draws of the row's distribution, in the unit of the weights."""
    return row.init_std_realised * math.sqrt((KURTOSIS[row.init] - 1.0) / (4.0 * count))


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """The values, gathered where they are sharded (DTensor), in float32 or wider."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole.detach().to(torch.promote_types(whole.dtype, torch.float32))


def _random(row: TensorPlan, values: torch.Tensor) -> Iterator[Finding]:
    variance, mean = (part.item() for part in torch.var_mean(values, correction=0))
    std, count = math.sqrt(variance), values.numel()
    margin = Z * standard_error(row, count)
    if not abs(std - row.init_std_realised) <= margin:
        wanted = f"{row.init_std_realised:.4g} ± {margin:.2g}"
        yield Finding(row.name, "initial std", wanted, std, _why_std(std, margin, values))
    bound = Z * row.init_std_realised / math.sqrt(count)
    if not abs(mean) <= bound:
        yield Finding(row.name, "initial mean", f"0 ± {bound:.2g}", mean, "its values are not a fresh draw")


def _why_std(std: float, margin: float, values: torch.Tensor) -> str:
    linear = 1.0 / math.sqrt(3.0 * values.shape[-1])  # nn.Linear draws uniformly from ±1/√fan_in
    if abs(std - linear) <= margin or abs(std - 1.0) <= margin:
        return "this is torch's own initial value: the layer was made or reset after the plan was applied"
    if std == 0.0:
        return "the plan was not applied to it"
    return "it was drawn by another rule, or changed since"


def _constant(row: TensorPlan, values: torch.Tensor) -> Iterator[Finding]:
    wanted = 1.0 if row.init == ONES else 0.0
    if not (values == wanted).all():
        found = f"from {values.min().item():.4g} to {values.max().item():.4g}"
        yield Finding(
            row.name, "initial value", wanted, found, "the plan was not applied to it, or it was changed since"
        )
