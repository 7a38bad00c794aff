"""What a built model holds, as plain facts: its distinct tensors, its modules, its multipliers, its blocks."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import mup
from torch import nn
from torch.nn.parameter import UninitializedParameter

from mutune.errors import Refusal, require
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name, trainable
from mutune.parametrization.plan import kind


@dataclass(frozen=True)
class Tensor:
    """One distinct trainable tensor.

    Attributes:
        name: its canonical name; `aliases` are its other names, where it is tied.
        shape: dimensions.
        owners: the classes of the modules that hold it.
        start: the smallest and the largest value that a vector starts with, None where they are not known.
        infinite: for each dimension, whether it grows with the model's width.
    """

    name: str
    shape: tuple[int, ...]
    owners: tuple[type[nn.Module], ...]
    aliases: tuple[str, ...] = ()
    start: tuple[float, float] | None = None
    infinite: tuple[bool, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every canonical name."""
        return (self.name, *self.aliases)

    @property
    def constant(self) -> float | None:
        """The value that all elements of a vector start with, None where they differ or are not known."""
        return self.start[0] if self.start is not None and self.start[0] == self.start[1] else None

    @property
    def infinite_axes(self) -> tuple[int, ...]:
        """The dimensions that grow with width."""
        return tuple(axis for axis, grows in enumerate(self.infinite) if grows)


@dataclass(frozen=True)
class Survey:
    """A built model: tensors by name, the names of its modules, and of the modules that are a site's `Multiplier`."""

    tensors: dict[str, Tensor]
    modules: tuple[str, ...]
    multipliers: dict[str, tuple[str, ...]]


def survey(model: nn.Module) -> Survey:
    """The facts of a model on any device; nothing of it is kept.

    Raises:
        Refusal: not a module, no trainable tensor, one without a shape, or two parameters that share memory without
            being one parameter.
    """
    require(
        isinstance(model, nn.Module),
        f"build(shape) returned a {type(model).__name__}; it must return the model, an nn.Module.",
    )
    _check_sized(model)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    owners: dict[nn.Parameter, list[type[nn.Module]]] = defaultdict(list)
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter].append(canonical_name(raw))
        owners[parameter].append(_owner(model, raw))
    tensors = {
        name: Tensor(
            name=name,
            shape=tuple(parameter.shape),
            owners=tuple(owners[parameter]),
            aliases=tuple(alias for alias in names[parameter] if alias != name),
            start=_start(parameter),
        )
        for name, parameter in trainable(model).items()
    }
    require(bool(tensors), "build(shape) returned a model without trainable parameters; return the whole nn.Module.")
    _check_memory(trainable(model))
    modules = [(canonical_name(raw), module) for raw, module in model.named_modules()]
    multipliers: dict[str, tuple[str, ...]] = {}
    for name, module in modules:
        if isinstance(module, Multiplier):
            multipliers[module.site] = (*multipliers.get(module.site, ()), name)
    return Survey(tensors, tuple(name for name, _ in modules), multipliers)


def with_infinite(base: Survey, delta: Survey) -> dict[str, Tensor]:
    """The base's tensors with the dimensions that change from base to delta, as `mup` finds them.

    Raises:
        Refusal: base and delta do not have the same tensors, or no dimension changes.
    """
    ours, theirs = base.tensors, delta.tensors
    odd = sorted(ours.keys() ^ theirs.keys()) or [n for n in ours if len(ours[n].shape) != len(theirs[n].shape)]
    if odd:
        raise Refusal(
            f"base and delta differ in more than width, for example in {odd[0]}; delta is the base with every width "
            f"changed, such as base=64 and delta=128."
        )
    shapes = [{name: tensor.shape for name, tensor in found.items()} for found in (ours, theirs)]
    require(
        shapes[0] != shapes[1],
        "no dimension changes from base to delta, so no width can be seen; build(delta) must be wider than "
        "build(base), such as base=64 and delta=128.",
    )
    found = mup.make_base_shapes(*shapes)
    return {name: replace(tensor, infinite=tuple(dim.isinf() for dim in found[name])) for name, tensor in ours.items()}


def blocks(tensors: Iterable[Tensor]) -> set[str]:
    """The names of the repeated blocks, such as `h.0`: an index in a name whose module holds a hidden matrix (two
    infinite dimensions) that a module beside it holds too, or that is the only index there.

    So `2.weight` of a plain `Sequential` is in a block where another hidden matrix stands beside it, and its first and
    last layers are in none. Experts, `experts.0`, stand side by side and are no blocks.
    """
    indices: dict[str, set[str]] = defaultdict(set)
    holders: dict[tuple[str, str], set[str]] = defaultdict(set)
    for tensor in tensors:
        for stack, index, rest in _splits(tensor.name):
            if stack.endswith("experts"):
                continue
            indices[stack].add(index)
            if len(tensor.infinite_axes) >= 2:
                holders[stack, kind(rest)].add(index)
    return {
        f"{stack}.{index}".removeprefix(".")
        for (stack, _), holding in holders.items()
        for index in holding
        if len(holding) > 1 or len(indices[stack]) == 1
    }


def block_of(name: str, known: set[str]) -> str | None:
    """The outermost block that holds the tensor or module of that name, if any."""
    found = (f"{stack}.{index}".removeprefix(".") for stack, index, _ in _splits(name))
    return next((block for block in found if block in known), None)


def stack_depths(names: Iterable[str], known: set[str]) -> dict[str, int]:
    """Number of blocks in each stack of outermost blocks: {'h': 12}; one stack for an encoder, one for a decoder."""
    stacks: dict[str, int] = defaultdict(int)
    for block in dict.fromkeys(block_of(name, known) for name in names):
        if block is not None:
            stacks[block.rpartition(".")[0]] += 1
    return dict(stacks)


def _splits(name: str) -> list[tuple[str, str, str]]:
    """(before, index, after) at each numeric component: `h.3.ln.bias` → [('h', '3', 'ln.bias')]."""
    parts = name.split(".")
    return [(".".join(parts[:at]), part, ".".join(parts[at + 1 :])) for at, part in enumerate(parts) if part.isdigit()]


def _owner(model: nn.Module, raw: str) -> type[nn.Module]:
    """The class of the module whose parameter this is; of the parametrized module, where there is one."""
    before, found, _ = f".{raw}".partition(".parametrizations.")
    path = before if found else before.rpartition(".")[0]
    return type(model.get_submodule(path.removeprefix(".")))


def _check_sized(model: nn.Module) -> None:
    for raw, parameter in model.named_parameters():
        require(
            not isinstance(parameter, UninitializedParameter),
            f"{canonical_name(raw)} has no shape before the model's first forward pass; give its layer the number of "
            f"its inputs, as in nn.Linear(64, 64), or run one batch inside build.",
        )


def _start(parameter: nn.Parameter) -> tuple[float, float] | None:
    if parameter.is_meta or parameter.dim() != 1 or not len(parameter):
        return None
    return float(parameter.detach().min()), float(parameter.detach().max())


def _check_memory(parameters: Mapping[str, nn.Parameter]) -> None:
    seen: dict[int, str] = {}
    for name, parameter in parameters.items():
        if parameter.is_meta or not parameter.numel():
            continue
        other = seen.setdefault(parameter.data_ptr(), name)
        require(
            other == name,
            f"{other} and {name} share memory but are two parameters, which an optimizer would step twice; tie them as "
            f"one nn.Parameter.",
        )
