"""Whether runs fit: their windows into the text, and what they hold into the memory that is free."""

from collections.abc import Sequence

from mutune.data.corpora import Corpora
from mutune.data.prepare import TokenizedCorpus
from mutune.data.windows import heldout_windows
from mutune.errors import require
from mutune.training.config import ParallelConfig, RunSpec
from mutune.training.device import device_name, free_memory, kind_of
from mutune.training.launched import own_device
from mutune.training.price import ALONE, price


def check_data(spec: RunSpec, corpus: TokenizedCorpus, key: str) -> None:
    """Refuse a run whose windows the text cannot give, before anything is written.

    Args:
        key: what a stage is called, for the message; `{}` is its number.
    """
    tokens, split = min((corpus.train_tokens, "training"), (corpus.heldout_tokens, "held-out"))
    for i, stage in enumerate(spec.stages):
        context = f"{key.format(i)}.context_length"
        works = f"{context}={min(128, tokens - 1)}" if tokens > 1 else "a longer text"
        require(
            stage.context_length < tokens,
            f"{context}={stage.context_length} does not fit into the {tokens:,} {split} tokens of {corpus.name}; "
            f"for example {works}.",
        )
        windows = heldout_windows(corpus.heldout, stage.context_length, spec.loop.heldout_windows)
        require(
            bool(corpus.tokenizer.token_bytes[windows[:, 1:]].any()),
            f"the held-out documents of {corpus.name} hold no text, so nothing can be measured on them; "
            "for example twenty documents that are not empty.",
        )


def check_corpora(spec: RunSpec, corpora: Corpora, key: str) -> None:
    """As `check_data`, for a run with mixtures: each stage's windows must fit into each of its corpora."""
    check_data(spec, corpora.main, key)
    for number, stage in enumerate(spec.stages):
        corpora.parts(stage.data)  # refuses a text that is there twice
        for each in stage.data or ():
            corpus, context = corpora.others[each.source, each.path], f"{key.format(number)}.context_length"
            require(
                stage.context_length < corpus.train_tokens,
                f"{context}={stage.context_length} does not fit into the {corpus.train_tokens:,} training tokens of "
                f"{corpus.name}, which is in its data; for example {context}={max(1, corpus.train_tokens // 2)}.",
            )


def require_memory(
    specs: Sequence[RunSpec],
    device: str,
    cure: str,
    parallel: ParallelConfig = ALONE,
    processes: int = 1,
    on_this_host: int = 1,
) -> None:
    """Refuse runs that do not fit side by side: parameters, gradients, Adam's moments, activations.

    Args:
        specs: what runs at the same time on `device`.
        cure: what to do where they do not fit, for the message.
        parallel: how each is spread over `processes`, of which so many share this host's memory.
    """
    where = own_device(device_name(device))
    need = sum(price(spec, parallel, processes, kind_of(where), heap=where == "cpu").bytes for spec in specs)
    have = free_memory(where) // (on_this_host if where == "cpu" else 1)
    at_once = f"{len(specs)} runs at once need" if len(specs) > 1 else "this run needs"
    at_once = f"each process of {at_once}" if processes > 1 else at_once
    require(
        need <= have,
        f"device={where} has {have / 2**30:.1f} GiB free and {at_once} about {need / 2**30:.1f} GiB on it; {cure}.",
    )
