"""How often a run reads its texts: counted where it is tokenized, told from its size where it is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from mutune.config import SweepConfig
from mutune.data.config import DataConfig, MixedData, TokenizerConfig
from mutune.data.prepare import prepare
from mutune.errors import Refusal
from mutune.training.config import RunSpec, StageConfig
from mutune.training.passes import bytes_per_token, readings, text_lines
from mutune.training.run import corpora_of
from tests.data.conftest import prose

BYTES = TokenizerConfig("bytes")


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MUTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "prose.txt"
    path.write_text(prose(400))
    return path


def of(text: Path, *stages: StageConfig) -> RunSpec:
    return replace(SweepConfig().spec(), data=DataConfig("text", str(text)), tokenizer=BYTES, stages=stages)


def test_a_text_is_counted_once_it_is_tokenized_and_before_that_told_from_its_size(text: Path) -> None:
    spec = of(text, StageConfig(64, 100, 200))
    (told,) = readings(spec)
    tokens = prepare(spec.data, BYTES).train_tokens
    assert (told.exact, told.needed) == (False, 64 * 100 * 200)
    assert told.tokens == pytest.approx(tokens, rel=0.05)
    for (counted,) in (readings(spec), readings(spec, corpora_of(spec))):
        assert (counted.exact, counted.tokens, counted.times) == (True, tokens, 1_280_000 / tokens)
    assert text_lines([counted]) == [
        f"text       prose.txt has {tokens:,} training tokens, which the run reads {1_280_000 / tokens:.2f} times over"
    ]
    (part,) = readings(of(text, StageConfig(64, 1, 10)))
    assert part.words == f"prose.txt has {tokens:,} training tokens, of which the run reads 640"


def test_of_a_mixture_each_text_has_its_share(text: Path) -> None:
    mixed = (MixedData("text", str(text), weight=3), MixedData("sotu", weight=1))
    spec = of(text, StageConfig(64, 10, 10), StageConfig(64, 10, 30, data=mixed))
    assert [(each.name, each.needed) for each in readings(spec, corpora_of(spec))] == [
        ("prose.txt", 6400 + 3 * 19200 // 4),
        ("sotu", 19200 // 4),
    ]


def test_a_text_that_lies_at_two_places_is_one(text: Path) -> None:
    other = text.with_name("copy.txt")
    other.write_bytes(text.read_bytes())
    mixed = (MixedData("text", str(other), weight=1),)
    spec = of(text, StageConfig(64, 10, 10), StageConfig(64, 10, 30, data=mixed))
    assert [each.needed for each in readings(spec, corpora_of(spec))] == [25600]


def test_a_text_that_is_mixed_in_by_the_main_one_s_bpe_is_not_counted_by_its_own(text: Path) -> None:
    mixed = (MixedData("sotu", weight=1), MixedData("text", str(text), weight=1))
    stages = (StageConfig(64, 10, 10, data=mixed),)
    spec = replace(SweepConfig().spec(), tokenizer=TokenizerConfig("bpe", 300), stages=stages)
    prepare(DataConfig("text", str(text)), spec.tokenizer)
    assert [(each.name, each.exact) for each in readings(spec)] == [("sotu", False), ("prose.txt", False)]


@pytest.mark.parametrize(
    ("tokenizer", "tokens"),  # measured of sotu, both splits
    [
        (TokenizerConfig("bytes"), 12_185_751),
        (TokenizerConfig("bpe", 1024), 4_157_000),
        (TokenizerConfig("bpe", 8192), 2_553_000),
        (TokenizerConfig("gpt2"), 2_389_000),
    ],
)
def test_bytes_per_token_are_about_those_of_sotu(tokenizer: TokenizerConfig, tokens: int) -> None:
    assert bytes_per_token(tokenizer) == pytest.approx(12_185_751 / tokens, rel=0.03)


def test_a_text_that_is_no_use_is_refused_as_the_run_refuses_it(text: Path) -> None:
    folder = text.with_name("folder")
    folder.mkdir()
    with pytest.raises(Refusal, match=r"holds no \.txt"):
        readings(of(folder, StageConfig(64, 10, 10)))
    (folder / "a.txt").symlink_to("nowhere")
    with pytest.raises(Refusal, match="cannot be read"):
        readings(of(folder, StageConfig(64, 10, 10)))


def test_of_a_text_that_is_not_here_nothing_is_said(text: Path) -> None:
    assert readings(of(text.with_name("elsewhere"), StageConfig(64, 10, 10))) == []
