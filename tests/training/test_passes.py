"""How often a run reads its texts: counted where it is tokenized, told from its size where it is not."""

from dataclasses import replace
from pathlib import Path

import pytest

from mutune.config import SweepConfig
from mutune.data.config import DataConfig, MixedData, TokenizerConfig
from mutune.data.prepare import prepare
from mutune.training.config import RunSpec, StageConfig
from mutune.training.passes import BYTES_PER_TOKEN, readings, text_lines
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
    assert (told.exact, told.tokens, told.needed) == (False, text.stat().st_size // BYTES_PER_TOKEN, 64 * 100 * 200)
    tokens = prepare(spec.data, BYTES).train_tokens
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


def test_of_a_text_that_is_not_here_nothing_is_said(text: Path) -> None:
    assert readings(of(text.with_name("elsewhere"), StageConfig(64, 10, 10))) == []
