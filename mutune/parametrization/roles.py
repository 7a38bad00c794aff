"""A tensor's role, from the dimensions that grow and the module that owns it, or by the user's word."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from mutune.errors import Refusal, require
from mutune.parametrization.names import matching
from mutune.parametrization.plan import kind
from mutune.parametrization.survey import Tensor

#: Roles whose fan-in is the width that the tensor carries; every other role's is what each of its outputs sums over.
CARRIERS = ("embedding", "position_embedding", "input", "gain", "bias")


@dataclass(frozen=True)
class Role:
    """A role given to tensors by name.

    Attributes:
        name: a row of the table: `embedding`, `position_embedding`, `input` (weights of a block whose fan-in is no
            width), `hidden`, `residual_output`, `output`, `gain`, `bias`.
        fan_in: the dimension or dimensions that each output sums over, where the owner's class does not say it:
            1 for experts' (E, in, out).
    """

    name: str
    fan_in: int | tuple[int, ...] | None = None


def named_roles(roles: Mapping[str, Role | str], tensors: Mapping[str, Tensor]) -> dict[str, Role]:
    """Tensor name → the user's role for it; a pattern may match any name of a tied tensor.

    Raises:
        Refusal: a pattern that matches no tensor, or two that match one.
    """
    chosen: dict[str, Role] = {}
    for tensor in tensors.values():
        hits = matching(roles, tensor.names)
        require(len(hits) <= 1, f"roles {' and '.join(hits)} both match {tensor.name}; keep one of them.")
        if hits:
            role = roles[hits[0]]
            chosen[tensor.name] = role if isinstance(role, Role) else Role(role)
    every = [name for tensor in tensors.values() for name in tensor.names]
    check_patterns("roles", roles, every, "parameter")
    return chosen


def check_patterns(key: str, patterns: Mapping[str, object], names: list[str], what: str) -> None:
    """Refuse a pattern that matches none of the names."""
    for pattern in patterns:
        require(
            any(fnmatchcase(name, pattern) for name in names),
            f"{key} has the pattern {pattern}, which matches no {what}; one there is {names[-1]}.",
        )


def settle(tensor: Tensor, role: Role | None, in_block: bool) -> tuple[str, tuple[int, ...]]:
    """The tensor's role and the axes of its fan-in.

    Raises:
        Refusal: the role or the axes cannot be told from the tensor; the sentence shows the `roles=` entry that would.
    """
    name = _inferred(tensor, in_block) if role is None else role.name
    if name is None:
        raise Refusal(_unsettled(tensor))
    require(
        bool(tensor.shape) or (name in ("gain", "bias") and (role is None or role.fan_in is None)),
        f"{tensor.name} is a scalar, which is a gain (it starts at 1) or a bias (at 0), and has no fan-in; for example "
        f"{_entry(tensor, 'gain', None)}.",
    )
    if role is not None and role.fan_in is not None:
        return name, _checked_axes(tensor, role.fan_in)
    axes = (tensor.infinite_axes or tuple(range(len(tensor.shape)))[-1:]) if name in CARRIERS else input_axes(tensor)
    if axes is None or (len(axes) > 1 and name in CARRIERS):
        raise Refusal(
            f"{tensor.name} of shape {_shape(tensor)} is {name}, but which dimension is its fan-in cannot be told; say "
            f"it, for example {_entry(tensor, name, _likely_axis(tensor))}."
        )
    return name, axes


def input_axes(tensor: Tensor) -> tuple[int, ...] | None:
    """The axes that each output sums over: (1,) for a Linear, (0,) for Hugging Face's Conv1D, None where unknown."""
    dims = len(tensor.shape)
    if not any(name.rpartition(".")[2] == "weight" for name in tensor.names):
        return None
    for owner in tensor.owners:
        if issubclass(owner, nn.Linear) and dims == 2:
            return (1,)
        if issubclass(owner, _ConvNd) and not issubclass(owner, _ConvTransposeNd):
            return tuple(range(1, dims))
        if owner.__name__ == "Conv1D" and dims == 2:  # transformers.pytorch_utils: (in, out)
            return (0,)
    return None


def _inferred(tensor: Tensor, in_block: bool) -> str | None:
    if len(tensor.shape) == 1:
        return _vector_role(tensor)
    inputs = "input" if in_block else "embedding"  # outside blocks TP-V's input weights have the embedding's site
    if any(issubclass(owner, nn.Embedding) for owner in tensor.owners):
        return None if tensor.infinite[0] else inputs
    axes = input_axes(tensor)
    if axes is None:
        return None
    grows_in = any(tensor.infinite[axis] for axis in axes)
    grows_out = any(grows and axis not in axes for axis, grows in enumerate(tensor.infinite))
    if grows_out and not grows_in:
        return inputs
    return "output" if grows_in and not grows_out and not in_block else "hidden"


def _vector_role(tensor: Tensor) -> str | None:
    """By what it starts as: all ones a gain, all zeros a bias, also where that bias is a zero-centred gain (1 + w)."""
    if _called_bias(tensor):
        return "bias" if _may_start_at_zero(tensor) else None
    if tensor.constant is None and any("norm" in owner.__name__.lower() for owner in tensor.owners):
        return "gain"
    return {1.0: "gain", 0.0: "bias"}.get(tensor.constant) if tensor.constant is not None else None


def _called_bias(tensor: Tensor) -> bool:
    return any(name.rpartition(".")[2].endswith("bias") for name in tensor.names)


def _may_start_at_zero(tensor: Tensor) -> bool:
    """Whether it starts at zero, or as torch draws a layer's `bias`, from ±1/√fan_in; others mean where they start."""
    if tensor.start is None or tensor.constant == 0.0:
        return True
    drawn = tensor.constant is None or tensor.shape == (1,)
    return drawn and max(map(abs, tensor.start)) <= 1.0 and any(f".{name}".endswith(".bias") for name in tensor.names)


def _checked_axes(tensor: Tensor, fan_in: int | tuple[int, ...]) -> tuple[int, ...]:
    axes = (fan_in,) if isinstance(fan_in, int) else fan_in
    require(
        bool(axes) and all(0 <= axis < len(tensor.shape) for axis in axes),
        f"roles gives {tensor.name} fan_in={fan_in}, but its shape {_shape(tensor)} has dimensions 0 to "
        f"{len(tensor.shape) - 1}; for example fan_in={_likely_axis(tensor)}.",
    )
    return axes


def _unsettled(tensor: Tensor) -> str:
    if len(tensor.shape) == 1 and _called_bias(tensor) and tensor.start is not None:
        low, high = tensor.start
        return (
            f"{tensor.name} starts at values from {low:.4g} to {high:.4g}, so that it is no plain bias, which a plan "
            f"starts at zero; if it may start there, say {_entry(tensor, 'bias', None)}, and write what it must start "
            f"at after build(seed)."
        )
    if len(tensor.shape) <= 1:
        entry = _entry(tensor, "gain", None)
    elif len(tensor.infinite_axes) >= 2:
        entry = _entry(tensor, "hidden", _likely_axis(tensor))
    else:
        entry = _entry(tensor, "position_embedding", None)
    owner = tensor.owners[0].__name__
    return f"the role of {tensor.name}, {_shape(tensor)} in a {owner}, cannot be told; name it, for example {entry}."


def _entry(tensor: Tensor, role: str, axis: int | None) -> str:
    fan_in = "" if axis is None else f", fan_in={axis}"
    pattern = kind(tensor.name)
    return f'roles={{"{tensor.name if pattern.startswith("*") else pattern}": Role("{role}"{fan_in})}}'


def _likely_axis(tensor: Tensor) -> int:
    """(E, in, out) → 1, (out, in) → 1: the first infinite dimension after the leading one, or the last dimension."""
    return next((axis for axis in tensor.infinite_axes if axis > 0), len(tensor.shape) - 1)


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a scalar"
