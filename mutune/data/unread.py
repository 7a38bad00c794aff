"""What of a corpus nothing has read yet, cut into windows. It is worked out a block of tokens at a time, never held.

Shapes: n windows, G gaps.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mutune.data.order import Ints
from mutune.data.readings import Within
from mutune.data.told import Tell


def gaps(read: Sequence[Within], num_tokens: int, block: int, tell: Tell) -> Iterator[Ints]:
    """Intervals [G, 2] of what of the tokens 0 to `num_tokens` was not read, in order, so many tokens at a time."""
    for low in range(0, num_tokens, block):
        high = min(low + block, num_tokens)
        tell("looked for gaps in", "tokens", high, num_tokens)
        yield _between(np.concatenate([within(low, high) for within in read]), low, high)


def count(found: Iterable[Ints]) -> int:
    """How many tokens there are in gaps."""
    return sum(int((part[:, 1] - part[:, 0]).sum()) for part in found)


def cut(found: Iterable[Ints], context: int, low: int, high: int) -> Iterator[Ints]:
    """The first tokens [n] of windows of `context`, cut from the beginning of each gap, of the unread tokens number
    `low` to `high`.
    """
    number, rest = 0, (0, 0)
    for part in found:
        lengths = part[:, 1] - part[:, 0]
        ends = number + np.cumsum(lengths)
        mine = part[:, :1] + np.stack([np.maximum(ends - lengths, low), np.minimum(ends, high)], axis=1)
        mine -= (ends - lengths)[:, None]
        number += int(lengths.sum())
        mine = mine[mine[:, 1] > mine[:, 0]]
        if not len(mine):
            continue
        if mine[0, 0] == rest[1]:  # the gap goes on from the block before
            mine[0, 0] = rest[0]
        windows = (mine[:, 1] - mine[:, 0]) // context
        first = np.repeat(mine[:, 0] - (np.cumsum(windows) - windows) * context, windows)
        yield first + np.arange(len(first)) * context
        rest = int(mine[-1, 0] + windows[-1] * context), int(mine[-1, 1])


def _between(read: Ints, low: int, high: int) -> Ints:
    """What of the tokens `low` to `high` lies in none of these intervals."""
    read = read[np.argsort(read[:, 0], kind="stable")]
    lows = np.maximum.accumulate(np.append(low, read[:, 1]))
    highs = np.append(read[:, 0], high)
    return np.stack([lows, highs], axis=1)[highs > lows]
