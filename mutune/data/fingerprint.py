"""Whether a token file is still the same: a hash of samples, cheap enough to ask during training."""

import hashlib

import numpy as np
import numpy.typing as npt

CHUNKS, CHUNK_TOKENS = 64, 512  # 64 KiB of a file of any size


def fingerprint(tokens: npt.NDArray[np.uint16]) -> str:
    """A hash of the number of tokens and of `CHUNKS` evenly spaced pieces of them.

    It tells another corpus, another tokenizer, an order or a cut of documents; a change that lies between the pieces
    it cannot tell.
    """
    digest = hashlib.blake2b(str(len(tokens)).encode(), digest_size=8)
    for start in np.linspace(0, max(0, len(tokens) - CHUNK_TOKENS), CHUNKS).astype(int):
        digest.update(np.asarray(tokens[start : start + CHUNK_TOKENS], dtype="<u2").tobytes())
    return digest.hexdigest()
