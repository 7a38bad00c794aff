"""How often a run reads its texts. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from mutune.data.config import DataConfig
from mutune.data.corpora import Corpora
from mutune.data.corpus import corpus_name, text_bytes
from mutune.data.prepare import cached_tokens
from mutune.training.config import RunSpec

MOST_PASSES = 4  # up to which read again is almost as good as new (arXiv:2305.16264, reported)
BYTES_PER_TOKEN = 4  # about, of English in GPT-2's tokens
LARGE = 2**30  # bytes of text, up to which it is hashed to see whether its tokens are in the cache


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
    texts = list[DataConfig]()
    needed = list[float]()
    for stage in spec.stages:
        parts = [(each.corpus, each.weight) for each in stage.data or ()] or [(spec.data, 1.0)]
        for data, weight in parts:
            if data not in texts:
                texts, needed = [*texts, data], [*needed, 0.0]
            needed[texts.index(data)] += stage.tokens * weight / sum(weight for _, weight in parts)
    found = []
    for data, tokens in zip(texts, needed, strict=True):
        exact = _counted(data, spec, corpora)
        if has := exact or text_bytes(data) // BYTES_PER_TOKEN:
            found.append(Reading(corpus_name(data), round(tokens), has, exact is not None))
    return found


def text_lines(found: Sequence[Reading]) -> list[str]:
    """A line for each text."""
    return [f"text       {each.words}" for each in found]


def _counted(data: DataConfig, spec: RunSpec, corpora: Corpora | None) -> int | None:
    if corpora is not None:
        return (corpora.main if data == spec.data else corpora.others[data.source, data.path]).train_tokens
    return cached_tokens(data, spec.tokenizer) if 0 < text_bytes(data) <= LARGE else None
