"""Keyed random orders in O(1) memory, the same on every platform and for every version of numpy."""

import hashlib

import numpy as np
import numpy.typing as npt

NUM_ROUNDS = 8


def permute(places: npt.NDArray[np.int64], size: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Where a keyed permutation of 0 .. size - 1 sends each of `places`, in O(1) memory.

    A balanced Feistel network permutes the smallest 4^h >= size; a value beyond `size` is sent on until it falls inside
    (cycle walking), which keeps the map one-to-one and takes four rounds of it on average at worst.
    """
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    values = _feistel(places.astype(np.uint64), half_bits, keys)
    while (outside := values >= size).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def keys_of(purpose: str, seed: int, whose: str | int, number: int) -> npt.NDArray[np.uint64]:
    """Eight 64-bit keys [NUM_ROUNDS], independent for each purpose, seed, owner (a stage) and number (an epoch)."""
    label = f"mutune.windows.1/{purpose}/{seed}/{whose}/{number}"
    return np.frombuffer(hashlib.blake2b(label.encode(), digest_size=8 * NUM_ROUNDS).digest(), dtype="<u8")


def _feistel(values: npt.NDArray[np.uint64], half_bits: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014; Stafford's variant 13), modulo 2^64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
