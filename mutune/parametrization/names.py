"""One name per tensor and module, whatever wraps the model. Starts without torch."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from mutune.errors import require

if TYPE_CHECKING:
    from torch import nn

#: Components that a wrapper puts into names: DDP and AveragedModel, `torch.compile`, FSDP1, activation checkpointing.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original$")


def canonical_name(name: str) -> str:
    """The name of a parameter or module without what wrappers and `torch.nn.utils.parametrize` add to it.

    `module._orig_mod.h.0.attn.parametrizations.weight.original` → `h.0.attn.weight`. A parametrization with several
    originals (`weight_norm`) has other tensors than the model it was put on, and its names stay as they are.
    """
    bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    return _PARAMETRIZED.sub(r"\1\2", bare)


def trainable(model: "nn.Module") -> "dict[str, nn.Parameter]":
    """Canonical name → parameter, each distinct trainable tensor once, in the model's order.

    Raises:
        Refusal: two tensors with one canonical name.
    """
    found: dict[str, nn.Parameter] = {}
    for raw, parameter in model.named_parameters():
        if parameter.requires_grad:
            name = canonical_name(raw)
            require(name not in found, f"two parameters are called {name} once wrappers are taken off; rename one.")
            found[name] = parameter
    return found


def matching(patterns: Iterable[str], names: Iterable[str]) -> list[str]:
    """The patterns (`fnmatch`, case counts, `*` goes over dots) that match any of the names."""
    names = list(names)
    return [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]
