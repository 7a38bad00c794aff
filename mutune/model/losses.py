"""The loss of many tokens in chunks, so that their logits never exist together.

Shape suffixes: N tokens, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: (x (N, D), table (V, D), targets (N,)) → sum of losses.
SumOfLosses = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunk_size(tokens: int, most: int) -> int:
    """Tokens of a chunk, at most so many: a part of all that leaves no rest, if it is not below half of what it may be.

    Chunks of one size are compiled once.
    """
    fewest = -(-tokens // max(1, most))
    return next((tokens // count for count in range(fewest, 2 * fewest) if tokens % count == 0), max(1, most))


def chunked(sum_of_losses: SumOfLosses, x_ND: Tensor, table_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
    """The sum over all tokens, `chunk` at a time. With gradients, which are found on the way, nothing is done twice."""
    if not torch.is_grad_enabled():
        parts = zip(x_ND.split(chunk), targets_N.split(chunk), strict=True)
        return torch.stack([sum_of_losses(x_CD, table_VD, targets_C) for x_CD, targets_C in parts]).sum()
    total: Tensor = _Chunked.apply(sum_of_losses, x_ND, table_VD, targets_N, chunk)
    return total


class _Chunked(torch.autograd.Function):
    """Each chunk's gradients are computed beside its loss; the table's are added up in its own number format."""

    @staticmethod
    def forward(
        ctx: Any, sum_of_losses: SumOfLosses, x_ND: Tensor, table_VD: Tensor, targets_N: Tensor, chunk: int
    ) -> Tensor:
        losses: list[Tensor] = []
        found_ND, found_VD = torch.empty_like(x_ND), torch.zeros_like(table_VD)
        table = _as_products_take_it(table_VD).detach().requires_grad_()
        for x_CD, targets_C, found_CD in zip(
            x_ND.split(chunk), targets_N.split(chunk), found_ND.split(chunk), strict=True
        ):
            x = _as_products_take_it(x_CD).detach().requires_grad_()
            with torch.enable_grad():
                loss = sum_of_losses(x, table, targets_C)
            of_x, of_table = torch.autograd.grad(loss, (x, table))
            found_CD.copy_(of_x)
            found_VD += of_table
            losses.append(loss.detach())
        ctx.save_for_backward(found_ND, found_VD)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("a loss in chunks has no gradients of its gradients")
        found_ND, found_VD = ctx.saved_tensors
        return None, found_ND * gradients[0], found_VD * gradients[0], None, None


def _as_products_take_it(x: Tensor) -> Tensor:
    """Rounded here, where autocast would round it again for each chunk, and keep that to its end."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
