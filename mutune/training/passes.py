"""How often a run reads its texts. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.corpora import Corpora
from mutune.data.corpus import corpus_name, text_bytes
from mutune.data.prepare import TokenizedCorpus, cached_tokens
from mutune.training.config import RunSpec

MOST_PASSES = 4  # up to which read again is almost as good as new (arXiv:2305.16264, reported)
LARGE = 2**28  # bytes of text, up to which it is hashed to see whether its tokens are in the cache
TRAINED = 0.95  # of a text, about


@dataclass(frozen=True)
class Reading:
    """What a run predicts of one text.

    Attributes:
        name: of the text. needed: tokens that the run predicts of it. tokens: that it has for training.
        exact: whether those were counted, and not told from its size.
    """

    name: str
    needed: int
    tokens: int
    exact: bool

    @property
    def times(self) -> float:
        """How often the run reads it."""
        return self.needed / self.tokens

    @property
    def words(self) -> str:
        """`sotu has about 3,000,000 training tokens, which the run reads 2.5 times over`."""
        about = "" if self.exact else "about "
        often = f"which the run reads {self.times:,.{0 if self.times >= 100 else 2}f} times over"
        often = often if self.times > 1 else f"of which the run reads {self.needed:,}"
        return f"{self.name} has {about}{self.tokens:,} training tokens, {often}"


def readings(spec: RunSpec, corpora: Corpora | None = None) -> list[Reading]:
    """Of each text that is here, the main one first.

    Args:
        corpora: the run's, where they are open; None looks into the cache, or goes by the size of the files.
    """
    texts, needed = dict[Any, DataConfig](), dict[Any, float]()
    for stage in spec.stages:
        parts = [(each.corpus, each.weight) for each in stage.data or ()] or [(spec.data, 1.0)]
        for data, weight in parts:
            key = _open(data, spec, corpora).content_hash if corpora else (data.source, data.path)
            texts.setdefault(key, data)
            needed[key] = needed.get(key, 0.0) + stage.tokens * weight / sum(weight for _, weight in parts)
    found = []
    for key, data in texts.items():
        exact = _counted(data, spec, corpora)
        if has := exact or round(TRAINED * text_bytes(data) / bytes_per_token(spec.tokenizer)):
            found.append(Reading(corpus_name(data), round(needed[key]), has, exact is not None))
    return found


def bytes_per_token(tokenizer: TokenizerConfig) -> float:
    """About, of English: in a BPE trained on the text, by its vocabulary, and in GPT-2's tokens."""
    if tokenizer.kind == "bytes":
        return 1.0
    return 5.1 if tokenizer.kind == "gpt2" else max(1.0, 2.93 + 0.62 * math.log2(tokenizer.num_ids / 1024))


def text_lines(found: Sequence[Reading]) -> list[str]:
    """A line for each text."""
    return [f"text       {each.words}" for each in found]


def _counted(data: DataConfig, spec: RunSpec, corpora: Corpora | None) -> int | None:
    if corpora is not None:
        return _open(data, spec, corpora).train_tokens
    own_tokens = data == spec.data or spec.tokenizer.kind != "bpe"  # else in those of the main text
    return cached_tokens(data, spec.tokenizer) if own_tokens and 0 < text_bytes(data) <= LARGE else None


def _open(data: DataConfig, spec: RunSpec, corpora: Corpora) -> TokenizedCorpus:
    return corpora.main if data == spec.data else corpora.others[data.source, data.path]
