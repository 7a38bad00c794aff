"""Loss by position: how much a model makes of a longer context.

Shapes: N windows, T context length, D documents, V vocabulary.

At position p a model has seen p + 1 tokens, so a context is used as far as the loss still falls with the position.
Every window lies within one held-out document: elsewhere the loss would rise at each document's beginning, and a long
window would hold many of those.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutune.errors import require

#: ids (N, T) → logits (N, T, V).
Logits = Callable[[Tensor], Tensor]
CHUNK_TOKENS = 8192  # of one forward pass


@dataclass(frozen=True)
class DocumentWindows:
    """Windows that each lie within one document: `windows` int64 [N, T + 1], `documents` int64 [N], whose each is."""

    windows: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]


@dataclass(frozen=True)
class PositionLoss:
    """Mean loss at the positions `first` to `last`, with its standard error, in nats per token.

    The error is that of a sample of documents, as windows of one document are alike; NaN where there is one document.
    """

    first: int
    last: int
    loss: float
    error: float


def document_windows(
    tokens: npt.NDArray[np.uint16], ends: npt.NDArray[np.uint64], context_length: int, num_windows: int | None = None
) -> DocumentWindows:
    """Windows of `context_length` + 1 tokens within documents, each document cut from its beginning.

    No token is a target twice. The same for every call.

    Args:
        tokens: a corpus's held-out tokens, uint16 [tokens].
        ends: where its documents end, uint64 [D], as `TokenizedCorpus.heldout_ends`.
        num_windows: how many are taken, evenly spaced; None takes all of them.

    Raises:
        Refusal: no document is long enough.
    """
    bounds = [0, *(int(end) for end in ends)]
    longest = max(high - low for low, high in pairwise(bounds))
    require(
        0 < context_length < longest,
        f"context_length={context_length} is more than any held-out document has, of which the longest has {longest:,} "
        f"tokens; for example context_length={max(1, longest // 2)}.",
    )
    found = [
        (document, start)
        for document, (low, high) in enumerate(pairwise(bounds))
        for start in range(low, high - context_length, context_length)
    ]
    taken = min(num_windows or len(found), len(found))
    documents, starts = np.array(found)[np.arange(taken) * len(found) // taken].T
    windows = np.asarray(tokens)[starts[:, None] + np.arange(context_length + 1)]
    return DocumentWindows(windows.astype(np.int64), documents)


def loss_by_position(model: nn.Module, drawn: DocumentWindows, logits: Logits | None = None) -> list[PositionLoss]:
    """The mean loss in each bin of positions: 0, 1, 2-3, 4-7, and so on to the context length.

    Args:
        model: gives logits (N, T, V) for ids (N, T).
        logits: computes them, as where the model is compiled; None is the model itself.
    """
    losses_NT = token_losses(model, drawn.windows, logits)
    return [mean_loss(losses_NT, drawn.documents, first, last) for first, last in position_bins(losses_NT.shape[1])]


def position_bins(context_length: int) -> Iterator[tuple[int, int]]:
    """First and last position of each bin, which end before the powers of two."""
    ends = [0, *(2**power for power in range(context_length.bit_length()) if 2**power < context_length), context_length]
    return ((low, high - 1) for low, high in pairwise(ends))


def mean_loss(
    losses_NT: npt.NDArray[np.float64], documents: npt.NDArray[np.int64], first: int, last: int
) -> PositionLoss:
    """The mean over windows and the positions `first` to `last`, with its error from document to document."""
    sums_N = losses_NT[:, first : last + 1].mean(axis=1)
    mean = sums_N.mean()
    _, whose = np.unique(documents, return_inverse=True)
    apart_D = np.bincount(whose, weights=sums_N - mean)  # of each document, its windows together
    count = len(apart_D)
    error = np.sqrt((apart_D**2).sum() * count / (count - 1)) / len(sums_N) if count > 1 else np.nan
    return PositionLoss(first, last, float(mean), float(error))


@torch.no_grad()
def token_losses(
    model: nn.Module, windows: npt.NDArray[np.int64], logits: Logits | None = None
) -> npt.NDArray[np.float64]:
    """The loss at every position of every window, (N, T) in nats; see `loss_by_position`."""
    device, compute = next(model.parameters()).device, logits or model
    losses, chunk = [], max(1, CHUNK_TOKENS // windows.shape[1])
    for start in range(0, len(windows), chunk):
        ids_NT = torch.from_numpy(windows[start : start + chunk]).to(device)
        logits_NTV = compute(ids_NT[:, :-1])
        wide = torch.promote_types(logits_NTV.dtype, torch.float32)
        part_N = F.cross_entropy(logits_NTV.flatten(0, 1).to(wide), ids_NT[:, 1:].flatten(), reduction="none")
        losses.append(part_N.view(len(ids_NT), -1).double().cpu().numpy())
    return np.concatenate(losses)
