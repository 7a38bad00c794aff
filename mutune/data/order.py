"""Keyed random orders in O(1) memory, the same on every platform and for every version of numpy."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8
Ints = npt.NDArray[np.int64]
#: What a round of the network makes of each right half.
Round = Callable[[Ints], Ints]


def permute(places: Ints, size: int, keys: npt.NDArray[np.uint64]) -> Ints:
    """Where a keyed permutation of 0 .. size - 1 sends each of `places`, in O(1) memory.

    A balanced Feistel network permutes the smallest 4^h >= size; a value beyond `size` is sent on until it falls inside
    (cycle walking), which keeps the map one-to-one and takes four rounds of it on average at worst.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    rounds = _rounds(half_bits, keys, looked_up=len(places) >> half_bits > 0)
    values = _feistel(places.astype(np.int64), half_bits, rounds)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        sent_on = _feistel(values[outside], half_bits, rounds)
        values[outside] = sent_on
        outside = outside[sent_on >= size]
    return values


def keys_of(purpose: str, seed: int, whose: str | int, number: int) -> npt.NDArray[np.uint64]:
    """Eight 64-bit keys [NUM_ROUNDS], independent for each purpose, seed, owner (a stage) and number (an epoch)."""
    label = f"mutune.windows.1/{purpose}/{seed}/{whose}/{number}"
    return np.frombuffer(hashlib.blake2b(label.encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")


def _rounds(half_bits: int, keys: npt.NDArray[np.uint64], looked_up: bool) -> Sequence[Round]:
    """The rounds of a network, as tables where there are more places than halves: twice as fast."""
    made: list[Round] = [partial(_round, key=key, mask=np.uint64((1 << half_bits) - 1)) for key in keys]
    if not looked_up:
        return made
    halves = np.arange(1 << half_bits)
    return [partial(np.take, of(halves), mode="clip") for of in made]  # nothing to clip, and faster than to check


def _round(halves: Ints, key: np.uint64, mask: np.uint64) -> Ints:
    return (_mix(halves.view(np.uint64) ^ key) & mask).view(np.int64)


def _feistel(values: Ints, half_bits: int, rounds: Sequence[Round]) -> Ints:
    left, right = values >> half_bits, values & ((1 << half_bits) - 1)
    for of in rounds:
        left, right = right, left ^ of(right)
    return (left << half_bits) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014; Stafford's variant 13), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
