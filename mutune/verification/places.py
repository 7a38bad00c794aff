"""What a coordinate is, as plain data."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mutune.errors import require
from mutune.parametrization.plan import Plan, kind

#: Largest over smallest size, at least: the noise of a slope goes as one over the logarithm of this.
MIN_SPAN = 4
MIN_SIZES = 3

LOGITS, ATTENTION_LOGITS, LAST_BLOCK, OUTPUT = "logits", "attention_logits", "last_block", "output"

#: How the sites of residual branches begin; the place of a multiplier is its module's name and its site in brackets.
RESIDUAL = "residual"


@dataclass(frozen=True)
class Coordinate:
    """One measured number.

    Attributes:
        size: width or depth.
        seed, step: of the run; `step` counts updates done.
        quantity: `activation`: RMS of a module's output, at init (of a matrix that no product uses, itself). `update`:
            RMS of its change since init. `weight_update`: RMS of (W_t - W_0)·x at the tensor's product (of W_t - W_0
            itself where there is none), times the multiplier after it where the product is the output. `gradient`:
            RMS of the loss's gradient, at init. Only to explain: `input`: RMS of what goes into a module, at init;
            `head_size`: d_head, as attention saw it.
        place: module or tensor, with `*` for the block index (`tensor_places`); or `logits`, `attention_logits`,
            `last_block`, and `output` for the second product of a tied table.
        order: position in the forward pass.
        value: the RMS, over all blocks of that place.
    """

    size: int
    seed: int
    step: int
    quantity: str
    place: str
    order: int
    value: float


def tensor_places(plan: Plan) -> dict[str, str]:
    """Tensor → its place: its kind, `h.*.mlp.weight`, shared by all tensors of one role and one base fan-in.

    Where a kind has several of those, as `*.weight` of a plain `Sequential` does, an index that tells them apart stays:
    that of the first of those alike, `2.weight` for the hidden layers 2 and 4.
    """
    alike: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, row in plan.parameters.items():
        alike[kind(name)][row.role, f"{row.fan_in / row.width_mult:.6g}"].append(name)
    return {
        name: place
        for groups in alike.values()
        for place, names in zip(_labels(list(groups.values())), groups.values(), strict=True)
        for name in names
    }


def module_place(name: str, places: Mapping[str, str]) -> str:
    """The place of a module: that of its weight, or of another tensor of its own, without the tensor's name."""
    own = next((tensor for tensor in (f"{name}.weight", f"{name}.bias") if tensor in places), None)
    return kind(name) if own is None else places[own].rpartition(".")[0]


def _labels(groups: Sequence[Sequence[str]]) -> list[str]:
    """One label per group of names that differ in their indices alone."""
    columns = [
        list(zip(*(name.split(".") for name in group), strict=True)) for group in groups
    ]  # group → part → values
    shared = [len({frozenset(column) for column in part}) == 1 for part in zip(*columns, strict=True)]
    labels = [
        ".".join(
            "*" if all_have and column[0].isdigit() else column[0]
            for all_have, column in zip(shared, group, strict=True)
        )
        for group in columns
    ]
    return labels if len(set(labels)) == len(labels) else [group[0] for group in groups]


def require_span(key: str, sizes: Sequence[int], example: Sequence[int]) -> None:
    """Refuse sizes from which no slope can be read: too few, one twice, or too close together (docs/log.md)."""
    require(
        len(set(sizes)) == len(sizes) >= MIN_SIZES and min(sizes) >= 1 and max(sizes) >= MIN_SPAN * min(sizes),
        f"{key}={list(sizes)} must be {MIN_SIZES} or more different sizes of which the largest is at least {MIN_SPAN} "
        f"times the smallest; for example {key}={list(example)}.",
    )
