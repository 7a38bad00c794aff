import pytest
from omegaconf import OmegaConf

from mutune.data import DataConfig, TokenizerConfig
from mutune.errors import Refusal


def test_configs_are_structured_configs_of_omegaconf() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(TokenizerConfig), {"kind": "gpt2"})
    assert OmegaConf.to_object(merged) == TokenizerConfig(kind="gpt2")
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), {"source": "text", "path": "a.txt"})
    assert OmegaConf.to_object(merged) == DataConfig("text", "a.txt")


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        Refusal, match=r"^data.source=sotus is unknown \(known: sotu, text\); for example data.source=sotu\.$"
    ):
        DataConfig("sotus")


def test_text_without_a_path_is_refused() -> None:
    with pytest.raises(Refusal, match=r"^data=text needs data.path=..., for example data.path=corpus.txt\.$"):
        DataConfig("text")


def test_a_path_that_nothing_reads_is_refused() -> None:
    with pytest.raises(Refusal, match=r"data.path=a.txt is read only by data=text"):
        DataConfig("sotu", "a.txt")
    with pytest.raises(Refusal, match=r"tokenizer.path=gpt2/ is read only by tokenizer.kind=gpt2"):
        TokenizerConfig("bpe", path="gpt2/")


def test_an_unknown_tokenizer_is_refused_with_the_known_ones() -> None:
    with pytest.raises(Refusal, match=r"tokenizer.kind=word is unknown \(known: bpe, gpt2, bytes\); for example"):
        TokenizerConfig("word")


@pytest.mark.parametrize("vocab_size", [-1, 0, 257, 65537, 1000.5])
def test_a_vocabulary_beyond_its_bounds_is_refused(vocab_size: int) -> None:
    with pytest.raises(Refusal, match=f"tokenizer.vocab_size={vocab_size} must be a whole number from 258 to 65536"):
        TokenizerConfig(vocab_size=vocab_size)


@pytest.mark.parametrize("vocab_size", [258, 65536])
def test_the_bounds_of_the_vocabulary_are_allowed(vocab_size: int) -> None:
    assert TokenizerConfig(vocab_size=vocab_size).vocab_size == vocab_size
