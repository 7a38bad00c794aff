"""Whether runs fit: their windows into the text, and what they hold into the memory that is free."""

from collections.abc import Sequence

from mutune.data.prepare import TokenizedCorpus
from mutune.data.windows import heldout_windows
from mutune.errors import require
from mutune.training.config import RunSpec
from mutune.training.device import device_name, free_memory
from mutune.training.price import price


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


def require_memory(specs: Sequence[RunSpec], device: str, cure: str) -> None:
    """Refuse runs that do not fit side by side: parameters, gradients, Adam's moments, activations.

    Args:
        specs: what runs at the same time on `device`.
        cure: what to do where they do not fit, for the message.
    """
    where = device_name(device)
    need = sum(price(spec, heap=where == "cpu").bytes for spec in specs)
    have = free_memory(where)
    at_once = f"{len(specs)} runs at once need" if len(specs) > 1 else "this run needs"
    require(
        need <= have,
        f"device={where} has {have / 2**30:.1f} GiB free and {at_once} about {need / 2**30:.1f} GiB on it; {cure}.",
    )
