"""Forward multipliers in a model that one cannot edit: a `Multiplier` below a named module, by an ordinary hook."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from mutune.errors import require
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name

CHILD = "mutune_multiplier"


def place(model: nn.Module, sites: Mapping[str, str]) -> None:
    """Multiply the output of each named module by its site's number; placing twice is placing once.

    The multiplier is a child of the module, and the hook a function of this file, so both are copied, pickled and
    compiled with the module. Place before the first compiled call: `torch.compile` does not look for hooks again.

    Args:
        sites: site → pattern of canonical module names. A module that returns a tuple has its first output multiplied;
            at `output`, a Linear has its input multiplied, so that a bias of the logits is not.

    Raises:
        Refusal: a pattern that matches no module, or two sites on one module.
    """
    modules = [(canonical_name(raw), module) for raw, module in model.named_modules()]
    for site, pattern in sites.items():
        hosts = [(name, m) for name, m in modules if fnmatchcase(name, pattern) and not isinstance(m, Multiplier)]
        require(
            bool(hosts), f"sites[{site!r}]={pattern} matches no module of the model; one there is {modules[-1][0]}."
        )
        for name, module in hosts:
            _attach(name, module, site)


def _attach(name: str, module: nn.Module, site: str) -> None:
    held = getattr(module, CHILD, None)
    if held is not None:
        require(held.site == site, f"{name} already multiplies at site {held.site}; name another module for {site}.")
        return
    require(
        not isinstance(module, nn.ModuleList | nn.ModuleDict),
        f"{name}, named for site {site}, is a container without a forward pass; name a module that is called.",
    )
    require(
        site != "output" or not isinstance(module, nn.Embedding),
        f"{name}, named for site output, is an embedding, which makes no logits; name the module that does, such as "
        f"lm_head.",
    )
    module.add_module(CHILD, Multiplier(site))
    if isinstance(module, nn.Sequential):
        return  # the child is the last of the chain
    if site == "output" and isinstance(module, nn.Linear):
        module.register_forward_pre_hook(multiply_input, with_kwargs=True)
    else:
        module.register_forward_hook(multiply_output)


def multiply_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The forward pre-hook of a named output matrix, whose input may come by name."""
    multiplier = getattr(module, CHILD)
    if args:
        return (multiplier(args[0]), *args[1:]), kwargs
    return args, {name: multiplier(value) for name, value in kwargs.items()}


def multiply_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The forward hook of a named module."""
    multiplier = getattr(module, CHILD)
    if isinstance(output, tuple):
        return (multiplier(output[0]), *output[1:])
    return multiplier(output)
