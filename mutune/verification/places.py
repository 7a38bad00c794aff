"""What a coordinate is, as plain data."""

from collections.abc import Sequence
from dataclasses import dataclass

from mutune.errors import require

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
        place: module or tensor, with `*` for the block index; or `logits`, `attention_logits`, `last_block`, and
            `output` for the second product of a tied table.
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


def require_span(key: str, sizes: Sequence[int], example: Sequence[int]) -> None:
    """Refuse sizes from which no slope can be read: too few, one twice, or too close together (docs/log.md)."""
    require(
        len(set(sizes)) == len(sizes) >= MIN_SIZES and min(sizes) >= 1 and max(sizes) >= MIN_SPAN * min(sizes),
        f"{key}={list(sizes)} must be {MIN_SIZES} or more different sizes of which the largest is at least {MIN_SPAN} "
        f"times the smallest; for example {key}={list(example)}.",
    )
