"""From a corpus and a tokenizer to token files that every process can map into memory.

One folder `<cache>/<key>/` holds `train.bin`, `heldout.bin` (little-endian uint16 ids, each document closed by the
end-of-text id), `train.idx`, `heldout.idx` (little-endian uint64: the token count at which each document ends),
`tokenizer.json` and `manifest.json`. The key is a hash of what went in, so a folder never goes stale.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import platformdirs
from filelock import FileLock

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.corpus import Corpus, Document, corpus_hash, corpus_name, load_corpus, split
from mutune.data.tokenizer import Tokenizer, build_tokenizer, gpt2_folder, tokenizer_from_json, tokenizer_name
from mutune.data.told import Told
from mutune.errors import Refusal, require

FORMAT = 1  # raise it when the files below, the split or the cutting of documents change meaning
TOKEN = np.dtype("<u2")
END = np.dtype("<u8")
#: Training documents → the tokenizer.
BuildTokenizer = Callable[[Sequence[Document]], Tokenizer]


@dataclass(frozen=True)
class TokenizedCorpus:
    """Token ids of both splits, mapped from disk, with the tokenizer that made them.

    `train`, `heldout`: uint16 [tokens]. `train_ends`, `heldout_ends`: uint64 [documents], the position just after each
    document's end-of-text id. `content_hash` covers corpus, split and tokenizer. In another process call `prepare`
    again: it only maps the files.
    """

    name: str
    content_hash: str
    tokenizer: Tokenizer
    train: npt.NDArray[np.uint16] = field(repr=False)
    train_ends: npt.NDArray[np.uint64] = field(repr=False)
    heldout: npt.NDArray[np.uint16] = field(repr=False)
    heldout_ends: npt.NDArray[np.uint64] = field(repr=False)
    folder: Path = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def train_tokens(self) -> int:
        return len(self.train)

    @property
    def heldout_tokens(self) -> int:
        return len(self.heldout)


def prepare(data: DataConfig, tokenizer: TokenizerConfig, cache_dir: Path | None = None) -> TokenizedCorpus:
    """The tokenized corpus, built at the first call and mapped from the cache at every later one.

    The cache is `cache_dir`, else the environment's MUTUNE_CACHE, else the user's cache folder. Any number of
    processes may call this at once: one builds, the others wait. What an interrupted build left is built again.
    """
    if tokenizer.path is not None:
        gpt2_folder(tokenizer)  # a wrong path is refused even where the cache could answer
    return _prepare(data, tokenizer_name(tokenizer), partial(build_tokenizer, tokenizer), cache_dir)


def prepare_with(data: DataConfig, tokenizer: Tokenizer, cache_dir: Path | None = None) -> TokenizedCorpus:
    """As `prepare`, with a tokenizer that is there already, as that of a mixture's main corpus."""
    return _prepare(data, f"{tokenizer.name} {tokenizer.content_hash}", lambda documents: tokenizer, cache_dir)


def cached_tokens(data: DataConfig, tokenizer: TokenizerConfig) -> int | None:
    """Training tokens of a corpus that was prepared before; None where it was not. Hashes the text, builds nothing."""
    manifest = _read_manifest(cache_folder() / _key(corpus_hash(data), tokenizer_name(tokenizer)))
    return None if manifest is None else int(manifest["files"]["train.bin"]["bytes"]) // TOKEN.itemsize


def _prepare(data: DataConfig, tokenizer: str, build: BuildTokenizer, cache_dir: Path | None) -> TokenizedCorpus:
    name, content_hash = corpus_name(data), corpus_hash(data)
    folder = (cache_dir or cache_folder()) / _key(content_hash, tokenizer)
    return _open(folder, name) or _build_once(folder, data, build, content_hash)


def cache_folder() -> Path:
    """Where prepared corpora lie: MUTUNE_CACHE, else the folder that the platform reserves for a user's caches."""
    chosen = os.environ.get("MUTUNE_CACHE")
    return Path(os.path.expanduser(chosen)) if chosen else Path(platformdirs.user_cache_dir("mutune"))


def _key(content_hash: str, tokenizer: str) -> str:
    settings = json.dumps([FORMAT, content_hash, tokenizer])
    return hashlib.sha256(settings.encode()).hexdigest()[:16]


def _open(folder: Path, name: str) -> TokenizedCorpus | None:
    """Map a finished build, or None where there is none."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return None
    stored = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return TokenizedCorpus(
        name=name,
        content_hash=manifest["content_hash"],
        tokenizer=tokenizer_from_json(manifest["tokenizer"]["name"], stored),
        train=np.memmap(folder / "train.bin", dtype=TOKEN, mode="r"),
        train_ends=np.fromfile(folder / "train.idx", dtype=END),
        heldout=np.memmap(folder / "heldout.bin", dtype=TOKEN, mode="r"),
        heldout_ends=np.fromfile(folder / "heldout.idx", dtype=END),
        folder=folder,
    )


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None where the folder is absent, torn, or damaged as far as sizes and the tokenizer show."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        sizes_hold = all((folder / file).stat().st_size == entry["bytes"] for file, entry in files.items())
        is_whole = sizes_hold and _fingerprint(folder / "tokenizer.json") == files["tokenizer.json"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if is_whole else None


def _build_once(folder: Path, data: DataConfig, build: BuildTokenizer, content_hash: str) -> TokenizedCorpus:
    """Build `folder` unless another process has done so by the time this one holds the lock."""
    with contextlib.ExitStack() as held:
        with _refusing_unwritable(folder.parent):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder.with_suffix(".lock")))
        prepared = _open(folder, corpus_name(data))
        if prepared is None:
            told = held.enter_context(contextlib.closing(Told(corpus_name(data))))
            corpus = load_corpus(data, partial(told.share, "read", "files"))
            changed = f"data.path={data.path} changed while it was read; run again once nothing writes to it."
            require(corpus.content_hash == content_hash, changed)
            train, heldout = split(corpus)
            tokenizer = build(train)
            with _refusing_unwritable(folder.parent):
                _write_folder(folder, corpus, tokenizer, {"train": train, "heldout": heldout}, told)
            prepared = _open(folder, corpus.name)
    assert prepared is not None, f"{folder} was just written"
    return prepared


@contextlib.contextmanager
def _refusing_unwritable(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Refusal(
            f"The cache folder {cache} cannot be written ({error.strerror}); set another one, for example "
            "MUTUNE_CACHE=~/mutune-cache."
        ) from error


def _write_folder(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, parts: dict[str, list[Document]], told: Told
) -> None:
    """Write everything to a temporary folder, then rename it to `folder`; the caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
    try:
        num_tokens = {
            part: _write_part(temporary, part, documents, tokenizer, told) for part, documents in parts.items()
        }
        (temporary / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
        manifest = _describe(temporary, corpus, tokenizer, parts, num_tokens)
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_part(folder: Path, part: str, documents: Sequence[Document], tokenizer: Tokenizer, told: Told) -> int:
    """Write `<part>.bin` and `<part>.idx`; returns the number of tokens."""
    ends = np.zeros(len(documents), dtype=END)
    num_tokens = 0
    with (folder / f"{part}.bin").open("wb") as file:
        for index, document in enumerate(documents):
            ids = np.append(tokenizer.encode(document.text), np.uint16(tokenizer.eot)).astype(TOKEN)
            file.write(ids.tobytes())
            num_tokens += len(ids)
            ends[index] = num_tokens
            told.share("tokenized", f"documents of {part}.bin", index + 1, len(documents))
    ends.tofile(folder / f"{part}.idx")
    return num_tokens


def _describe(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    parts: dict[str, list[Document]],
    num_tokens: dict[str, int],
) -> dict[str, Any]:
    """The manifest: what went in, what came out, and the size and SHA-256 of each file."""
    identity = json.dumps([FORMAT, corpus.content_hash, tokenizer.content_hash])
    return {
        "format": FORMAT,
        "content_hash": hashlib.sha256(identity.encode()).hexdigest(),
        "corpus": {"name": corpus.name, "content_hash": corpus.content_hash},
        "tokenizer": {
            "name": tokenizer.name,
            "vocab_size": tokenizer.vocab_size,
            "eot": tokenizer.eot,
            "content_hash": tokenizer.content_hash,
        },
        "dtype": "uint16, little-endian",
        **{part: {"documents": len(documents), "tokens": num_tokens[part]} for part, documents in parts.items()},
        "files": {path.name: _fingerprint(path) for path in sorted(folder.iterdir())},
        "versions": {package: version(package) for package in ("numpy", "tiktoken", "tokenizers")},
    }


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
