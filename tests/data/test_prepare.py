import errno
import json
import multiprocessing
import os
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mutune.data import DataConfig, TokenizedCorpus, TokenizerConfig, load_corpus, prepare, split
from mutune.data.prepare import cache_folder
from mutune.errors import Refusal

from .conftest import prose

MODULE = import_module("mutune.data.prepare")  # the package has a function of this name
BPE = TokenizerConfig(vocab_size=300)
FILES = ["heldout.bin", "heldout.idx", "manifest.json", "tokenizer.json", "train.bin", "train.idx"]


def forbid(*_: Any) -> Any:
    raise AssertionError("this must not be needed")


def test_sotu_has_the_token_counts_of_record(sotu: TokenizedCorpus) -> None:
    assert (sotu.name, sotu.vocab_size) == ("sotu", 1024)
    assert (sotu.train_tokens, sotu.heldout_tokens) == (3_989_261, 171_069)
    assert (len(sotu.train_ends), len(sotu.heldout_ends)) == (237, 12)


def test_the_files_hold_every_document_closed_by_end_of_text(sotu: TokenizedCorpus) -> None:
    train, heldout = split(load_corpus(DataConfig()))
    for tokens, ends, documents in ((sotu.train, sotu.train_ends, train), (sotu.heldout, sotu.heldout_ends, heldout)):
        assert ends[-1] == len(tokens)
        assert np.array_equal(np.flatnonzero(tokens == sotu.tokenizer.eot) + 1, ends)
        for index in (0, 5, len(documents) - 1):
            start = int(ends[index - 1]) if index else 0
            assert sotu.tokenizer.decode(tokens[start : int(ends[index]) - 1]) == documents[index].text


def test_the_tokenizer_learns_from_the_training_split_only(text: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    build = MODULE.build_tokenizer

    def spy(config: TokenizerConfig, documents: Any) -> Any:
        seen.extend(document.id for document in documents)
        return build(config, documents)

    monkeypatch.setattr(MODULE, "build_tokenizer", spy)
    prepare(text, BPE)
    train, heldout = split(load_corpus(text))
    assert seen == [document.id for document in train]
    assert not {document.id for document in heldout} & set(seen)


def test_the_second_call_neither_reads_documents_nor_trains_nor_encodes(
    text: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(text, BPE)
    for name in ("load_corpus", "build_tokenizer", "_write_folder", "FileLock"):
        monkeypatch.setattr(MODULE, name, forbid)
    second = prepare(text, BPE)
    assert second.content_hash == first.content_hash
    assert second.tokenizer.content_hash == first.tokenizer.content_hash
    assert np.array_equal(second.train, first.train)
    assert np.array_equal(second.heldout, first.heldout)


def test_one_folder_holds_the_build_and_nothing_else_is_left(text: DataConfig, cache: Path) -> None:
    prepared = prepare(text, BPE)
    assert sorted(path.name for path in prepared.folder.iterdir()) == FILES
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [prepared.folder.name]
    manifest = json.loads((prepared.folder / "manifest.json").read_text())
    assert manifest["train"]["tokens"] == prepared.train_tokens
    assert manifest["files"]["train.bin"]["bytes"] == 2 * prepared.train_tokens
    assert str(cache) not in json.dumps(manifest)


def test_other_text_or_another_tokenizer_gives_another_hash(text: DataConfig) -> None:
    hashes = {prepare(text, config).content_hash for config in (BPE, TokenizerConfig("bytes"))}
    Path(str(text.path)).write_text(prose(201))
    hashes.add(prepare(text, BPE).content_hash)
    assert len(hashes) == 3


def test_a_file_under_another_name_shares_the_build(text: DataConfig, tmp_path: Path) -> None:
    prepared = prepare(text, BPE)
    shutil.copy(str(text.path), tmp_path / "renamed.txt")
    renamed = prepare(DataConfig("text", str(tmp_path / "renamed.txt")), BPE)
    assert (prepared.name, renamed.name) == ("corpus.txt", "renamed.txt")
    assert renamed.folder == prepared.folder


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "tokenizer", "empty"])
def test_a_partial_build_is_built_again(text: DataConfig, damage: str) -> None:
    prepared = prepare(text, BPE)
    folder, expected = prepared.folder, (prepared.folder / "train.bin").read_bytes()
    if damage == "truncate":
        (folder / "train.bin").write_bytes(expected[:-2])
    elif damage == "remove":
        (folder / "heldout.idx").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text('{"format": 1')
    elif damage == "tokenizer":
        (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[::-1])
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    assert prepare(text, BPE).content_hash == prepared.content_hash
    assert (folder / "train.bin").read_bytes() == expected
    assert sorted(path.name for path in folder.iterdir()) == FILES


def test_what_a_killed_build_left_is_cleared_away(text: DataConfig, cache: Path) -> None:
    folder = prepare(text, BPE).folder
    shutil.rmtree(folder)
    (cache / f"{folder.name}.tmp-killed").mkdir()
    prepare(text, BPE)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_a_full_disk_is_refused_and_leaves_no_folder(
    text: DataConfig, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MODULE, "_write_part", fail)
    with pytest.raises(Refusal, match=r"cannot be written \(No space left on device\); set another one, for example"):
        prepare(text, BPE)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_cannot_be_written_is_refused_by_name(text: DataConfig, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(Refusal, match=f"The cache folder {cache} cannot be written .*MUTUNE_CACHE=~/mutune-cache"):
        prepare(text, BPE)


def test_a_wrong_tokenizer_path_is_refused_even_where_the_cache_could_answer(text: DataConfig, tmp_path: Path) -> None:
    prepare(text, TokenizerConfig("gpt2"))
    with pytest.raises(Refusal, match=r"has no encoder.json"):
        prepare(text, TokenizerConfig("gpt2", path=str(tmp_path)))


def test_the_environment_names_the_cache_and_an_argument_overrides_it(
    text: DataConfig, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(text, BPE).folder.parent == cache
    assert prepare(text, BPE, tmp_path / "other").folder.parent == tmp_path / "other"
    monkeypatch.delenv("MUTUNE_CACHE")
    assert cache_folder().name == "mutune"


def identity(prepared: TokenizedCorpus) -> tuple[str, int, int]:
    """What was built, and when."""
    written_ns = (prepared.folder / "manifest.json").stat().st_mtime_ns
    return prepared.content_hash, int(prepared.train.astype(np.int64).sum()), written_ns


def build_in_child(path: str, barrier: Any, results: Any) -> None:
    barrier.wait()
    prepared = prepare(DataConfig("text", path), BPE)
    results.put(identity(prepared))


def test_processes_that_build_at_once_leave_one_valid_cache(text: DataConfig, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    children = [context.Process(target=build_in_child, args=(text.path, barrier, results)) for _ in range(2)]
    for child in children:
        child.start()
    found = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    prepared = prepare(text, BPE)
    assert found == {identity(prepared)}, "both saw one build"
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [prepared.folder.name]
