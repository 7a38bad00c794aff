"""The corpora of a run: its main one, and those that stages mix with it, all in the main one's tokens."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mutune.data.config import DataConfig, MixedData, TokenizerConfig
from mutune.data.mixture import proportions
from mutune.data.prepare import TokenizedCorpus, prepare, prepare_with
from mutune.data.segments import MAIN
from mutune.data.windows import Tokens
from mutune.errors import require

Mixture = tuple[MixedData, ...]


@dataclass(frozen=True)
class Corpora:
    """The main corpus and the others, by (source, path), of a run.

    Texts of the same content are one corpus, wherever they lie, so that no stage repeats what another has read.
    """

    main: TokenizedCorpus
    others: dict[tuple[str, str | None], TokenizedCorpus]

    @property
    def content_hash(self) -> str:
        """Of all of them; of the main corpus where it is alone."""
        if not self.others:
            return self.main.content_hash
        hashes = [self.main.content_hash, *sorted({other.content_hash for other in self.others.values()})]
        return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()

    @property
    def tokens(self) -> dict[str, Tokens]:
        """Content hash → training tokens of those that are not the main corpus."""
        return {self._name(other): other.train for other in self.others.values() if self._name(other) != MAIN}

    def parts(self, mixture: Mixture | None) -> tuple[tuple[str, int], ...]:
        """A stage's mixture, as the loader takes it."""
        if mixture is None:
            return ((MAIN, 1),)
        names = [self._name(self.others[each.source, each.path]) for each in mixture]
        require(
            len(set(names)) == len(names),
            f"stages.data={[each.path or each.source for each in mixture]} has one text twice; give it once, with the "
            "sum of its weights.",
        )
        return tuple(zip(names, proportions([each.weight for each in mixture]), strict=True))

    def _name(self, corpus: TokenizedCorpus) -> str:
        return MAIN if corpus.content_hash == self.main.content_hash else corpus.content_hash


def prepare_corpora(
    data: DataConfig, tokenizer: TokenizerConfig, mixtures: Iterable[Mixture | None], cache_dir: Path | None = None
) -> Corpora:
    """The corpora of a run whose stages have these mixtures; see `prepare`.

    A BPE is trained on the main corpus alone, so that its tokens, and the held-out loss, are what they are without a
    mixture.
    """
    main = prepare(data, tokenizer, cache_dir)
    mixed = {(each.source, each.path): each.corpus for mixture in mixtures for each in mixture or ()}
    others = {
        name: main if corpus == data else _prepared(corpus, tokenizer, main, cache_dir)
        for name, corpus in mixed.items()
    }
    return Corpora(main, others)


def _prepared(
    data: DataConfig, tokenizer: TokenizerConfig, main: TokenizedCorpus, cache_dir: Path | None
) -> TokenizedCorpus:
    if tokenizer.kind == "bpe":
        return prepare_with(data, main.tokenizer, cache_dir)
    return prepare(data, tokenizer, cache_dir)  # which is the same for every text
