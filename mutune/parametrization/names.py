"""One name per tensor and module, whatever wraps the model. No torch."""

import re

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
