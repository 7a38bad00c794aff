"""The fingerprint of a token file: what changes it, and what it costs."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mutune.data.fingerprint import CHUNK_TOKENS, CHUNKS, fingerprint

TOKENS = np.random.default_rng(0).integers(1000, size=200_000).astype(np.uint16)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(TOKENS[::-1], id="another order"),
        pytest.param(TOKENS[:-1], id="cut"),
        pytest.param((TOKENS + 1) % 1000, id="other ids"),
        pytest.param(np.concatenate([TOKENS[1:], TOKENS[:1]]), id="moved by one"),
        pytest.param(np.concatenate([TOKENS[:150_000], TOKENS[:50_000]]), id="a quarter replaced"),
    ],
)
def test_another_file_has_another_fingerprint(other: np.ndarray) -> None:
    assert fingerprint(other.astype(np.uint16)) != fingerprint(TOKENS)


def test_the_same_tokens_have_the_same_fingerprint_mapped_or_not(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    TOKENS.astype("<u2").tofile(path)
    mapped = np.memmap(path, dtype="<u2", mode="r")
    assert fingerprint(mapped) == fingerprint(TOKENS)
    writing = np.memmap(path, dtype="<u2", mode="r+")
    writing[:] = writing[::-1].copy()
    writing.flush()
    assert fingerprint(mapped) != fingerprint(TOKENS)  # a file that is written to in place shows in a running run


def test_a_text_shorter_than_a_piece_has_one_too() -> None:
    assert len(fingerprint(TOKENS[:3])) == 16
    assert fingerprint(TOKENS[:3]) != fingerprint(TOKENS[:4])


def test_the_number_of_tokens_counts_also_where_all_are_alike() -> None:
    assert fingerprint(np.zeros(100_000, dtype=np.uint16)) != fingerprint(np.zeros(200_000, dtype=np.uint16))


def test_a_fingerprint_reads_the_same_few_pieces_of_a_file_of_any_size() -> None:
    class Counting(np.ndarray):
        """Counts what is read of it."""

        read = 0

        def __getitem__(self, key: Any) -> Any:
            part = np.asarray(super().__getitem__(key))
            Counting.read += part.size
            return part

    started = time.process_time()
    fingerprint(np.zeros(50_000_000, dtype=np.uint16).view(Counting))
    assert Counting.read == CHUNKS * CHUNK_TOKENS
    assert time.process_time() - started < 1.0
