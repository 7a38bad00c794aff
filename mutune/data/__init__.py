"""Data: from a text to the tokens of step s.

    corpus = prepare(DataConfig(), TokenizerConfig())         # built once, mapped from the cache afterwards
    loader = WindowLoader(corpus.train, [Stage(128, 300, 16)], seed=0)
    loader.batch(step)                                        # [16, 129], the same for any world size
    heldout_windows(corpus.heldout, 128, 64)                  # [64, 129], always the same

Read in this order: `corpus`, `tokenizer`, `prepare`, `windows`. Nothing here imports torch.
"""

from mutune.data.config import DataConfig, TokenizerConfig
from mutune.data.corpus import Corpus, Document, load_corpus, split
from mutune.data.prepare import TokenizedCorpus, prepare
from mutune.data.tokenizer import Tokenizer, build_tokenizer, tokenizer_from_json
from mutune.data.windows import Stage, WindowLoader, heldout_windows

__all__ = [
    "Corpus",
    "DataConfig",
    "Document",
    "Stage",
    "TokenizedCorpus",
    "Tokenizer",
    "TokenizerConfig",
    "WindowLoader",
    "build_tokenizer",
    "heldout_windows",
    "load_corpus",
    "prepare",
    "split",
    "tokenizer_from_json",
]
