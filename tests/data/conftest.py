"""A cache of its own for every test, and texts large enough to split."""

from pathlib import Path

import pytest

from mutune.data import DataConfig, TokenizedCorpus, TokenizerConfig, prepare

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprst"


def prose(num_paragraphs: int) -> str:
    """Made-up words in paragraphs; no two paragraphs are alike."""
    words = [a + b + c + d for a in CONSONANTS for b in VOWELS for c in CONSONANTS for d in VOWELS]
    paragraphs = (" ".join(words[(7 * i * j + 11 * j) % len(words)] for j in range(60)) for i in range(num_paragraphs))
    return "\n\n".join(paragraphs) + "\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder that `prepare` uses in this test; it does not exist yet."""
    monkeypatch.setenv("MUTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def text(tmp_path: Path) -> DataConfig:
    """A user's corpus: 200 paragraphs in a .txt file."""
    path = tmp_path / "corpus.txt"
    path.write_text(prose(200), encoding="utf-8")
    return DataConfig("text", str(path))


@pytest.fixture(scope="session")
def sotu(tmp_path_factory: pytest.TempPathFactory) -> TokenizedCorpus:
    return prepare(DataConfig(), TokenizerConfig(), tmp_path_factory.mktemp("sotu"))
