"""Measure the coordinates of a model: the typical size of what flows through it, at initialisation and as it trains.

Shape suffixes: B batch, T time, V vocabulary. A coordinate is a root mean square (RMS) over all elements of a tensor,
on one fixed probe batch. Source: arXiv:2203.03466 §D.1 and appendix; per-tensor weight updates: arXiv:2407.05872.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mutune.parametrization.apply import make_optimizer
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.plan import Plan
from mutune.parametrization.sites import CHILD
from mutune.verification.places import (
    ATTENTION_LOGITS,
    LAST_BLOCK,
    LOGITS,
    OUTPUT,
    RESIDUAL,
    Coordinate,
    module_place,
    tensor_places,
)

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum)
_PRODUCTS = (F.linear, F.embedding, torch.addmm, *_MATMULS)


class Subject(Protocol):
    """Something that can be built at several sizes under one parametrization."""

    def plan(self, size: int) -> Plan:
        """The plan at one size."""
        ...

    def make(self, size: int, seed: int) -> tuple[nn.Module, Plan]:
        """The model at one size, initialised from `seed`, and its plan."""
        ...


class Training(Protocol):
    """A few steps of training at a constant rate, and the batch on which coordinates are taken."""

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps after which coordinates are taken, ascending; the last one ends the run."""
        ...

    @property
    def betas(self) -> tuple[float, float]:
        """Adam's."""
        ...

    @property
    def probe(self) -> Tensor:
        """Token ids (B, T) on which coordinates are taken."""
        ...

    def batch(self, seed: int, step: int) -> Tensor:
        """Token ids (B, T+1) of one step."""
        ...


def measure(subject: Subject, size: int, seed: int, training: Training) -> list[Coordinate]:
    """Train one model for a few steps and return its coordinates; what it draws as it trains is seeded.

    The gradient is not clipped: the norm that clipping sees is not a coordinate.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _measure(subject, size, seed, training)


def _measure(subject: Subject, size: int, seed: int, training: Training) -> list[Coordinate]:
    model, plan = subject.make(size, seed)
    optimizer = make_optimizer(model, plan, betas=training.betas)
    probe, places = Probe(model), tensor_places(plan)
    before = probe.take(training.probe)
    found = [*_activations(before, places)]
    for step in range(training.steps[-1]):
        ids_BT = training.batch(seed, step)
        optimizer.zero_grad()
        cross_entropy(logits_of(model(ids_BT[:, :-1])), ids_BT[:, 1:]).backward()
        if step == 0:
            found += _gradients(model, places)
        optimizer.step()
        if step + 1 in training.steps:
            after = probe.take(training.probe)
            found += [(step + 1, *row) for row in _updates(before, after, places)]
    return [Coordinate(size, seed, *row) for row in found]


def logits_of(output: Any) -> Tensor:
    """The logits (B, T, V) of a model's output: a tensor, or an object or tuple that holds them."""
    if isinstance(output, Tensor):
        return output
    return output.logits if hasattr(output, "logits") else output[0]


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean nats per token."""
    return F.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())


@dataclass
class Snapshot:
    """What one forward pass of the probe batch left: outputs by module, and the weights' products since init."""

    outputs: dict[str, Tensor]
    inputs: dict[str, float]
    products: dict[str, float]
    head_size: int
    blocks: list[str]


class Probe:
    """Watches a model's forward pass from outside: module outputs by hooks, products with weights by function calls.

    Products are seen wherever torch multiplies by a parameter, so a tied head that calls `F.linear` itself is seen too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.initial = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.blocks = _blocks(model)

    @torch.no_grad()
    def take(self, ids_BT: Tensor) -> Snapshot:
        """One forward pass of the probe batch, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        outputs: dict[str, Tensor] = {}
        inputs: dict[str, float] = {}
        watch = _Watch(self.model, self.initial)
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                if name in self.blocks or _is_watched(name, module):
                    handle = module.register_forward_hook(_recorder(outputs, inputs, _place(name, module)))
                    stack.callback(handle.remove)
            with watch:
                outputs[LOGITS] = logits_of(self.model(ids_BT))
        watch.scale_head(outputs[LOGITS])
        outputs |= {f"{name}.{ATTENTION_LOGITS}": value for name, value in watch.attention.items()}
        products = dict(watch.products)
        for name, parameter in self.model.named_parameters():
            if name not in products:
                products[name] = _rms(parameter - self.initial[name])
                if parameter.ndim > 1:
                    outputs[name] = parameter.detach()
        self.model.train(training)
        return Snapshot(outputs, inputs, products, watch.head_size, self.blocks)


def _is_watched(name: str, module: nn.Module) -> bool:
    """Modules with weights of their own, and the multipliers of what is added up."""
    own = next(module.parameters(recurse=False), None) is not None
    adds = isinstance(module, Multiplier) and module.site.partition(".")[0] in ("embedding", RESIDUAL)
    return name != "" and (own or adds)


def _blocks(model: nn.Module) -> list[str]:
    """The children of the outermost `nn.ModuleList`s, in the model's order."""
    modules = dict(model.named_modules())
    children = [name for name in modules if isinstance(modules[name.rpartition(".")[0]], nn.ModuleList)]
    depth = min((name.count(".") for name in children), default=0)
    return [name for name in children if name.count(".") == depth]


def _place(name: str, module: nn.Module) -> str:
    """A module's name; with its site where it is a multiplier, or where one hangs below it and has acted already."""
    for multiplier in (module, *module.children()):
        if isinstance(multiplier, Multiplier) and (multiplier is module or multiplier.site in _placed(module)):
            return f"{name} ({multiplier.site})"
    return name


def _placed(module: nn.Module) -> set[str]:
    """Sites whose multipliers were hung below a module by name: their product is in its output."""
    return {m.site for child, m in module.named_children() if isinstance(m, Multiplier) and child.startswith(CHILD)}


def _recorder(outputs: dict[str, Tensor], inputs: dict[str, float], name: str) -> Callable[..., None]:
    def record(module: nn.Module, args: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, Tensor):
            outputs[name] = value.detach()
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            inputs[name] = _rms(args[0])

    return record


class _Watch(TorchFunctionMode):
    """Sees products with parameters and attention; `products` holds the RMS of (W_t - W_0)·x.

    A tied table has two products; the second one, the head's, is kept as `output`.
    """

    def __init__(self, model: nn.Module, initial: dict[str, Tensor]) -> None:
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.initial = initial
        self.products: dict[str, float] = {}
        self.last = ("", 0.0)
        self.attention: dict[str, Tensor] = {}
        self.head_size = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.head_size = args[0].shape[-1]
            self.attention[str(len(self.attention))] = _attention_logits(args[0], args[1], kwargs.get("scale"))
        elif func in _PRODUCTS:
            self._product(func, args, kwargs, output)
        return output

    def _product(self, func: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        matrices = [a for a in args if isinstance(a, Tensor) and id(a) in self.names and a.ndim > 1]
        if len(matrices) != 1:
            return
        (weight,) = matrices
        name = self.names[id(weight)]
        then = func(*[self.initial[name] if a is weight else a for a in args], **kwargs)
        place = OUTPUT if name in self.products else name
        self.products[place] = _rms(output - then)
        self.last = (place, _rms(output))

    def scale_head(self, logits: Tensor) -> None:
        """The last product makes the logits; what multiplies it after (or not) multiplies its change too."""
        place, size = self.last
        if place and size > 0:
            self.products[place] *= _rms(logits) / size


def _attention_logits(q: Tensor, k: Tensor, scale: float | None) -> Tensor:
    """q kᵀ · scale, causal part only where the two have one length; (..., T, T)."""
    if q.shape[-3] != k.shape[-3]:  # grouped-query attention
        k = k.repeat_interleave(q.shape[-3] // k.shape[-3], dim=-3)
    logits = q @ k.transpose(-2, -1) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    return logits.tril() if logits.shape[-1] == logits.shape[-2] else logits


def _activations(snapshot: Snapshot, places: Mapping[str, str]) -> Iterator[tuple[int, str, str, int, float]]:
    for place, order, value in _by_place(
        {n: _rms(out) for n, out in snapshot.outputs.items()}, places, snapshot.blocks
    ):
        yield 0, "activation", place, order, value
    for place, order, value in _by_place(snapshot.inputs, places):
        yield 0, "input", place, order, value
    if snapshot.head_size:
        yield 0, "head_size", ATTENTION_LOGITS, 0, float(snapshot.head_size)


def _updates(before: Snapshot, after: Snapshot, places: Mapping[str, str]) -> Iterator[tuple[str, str, int, float]]:
    changes = {name: _rms(out - before.outputs[name]) for name, out in after.outputs.items()}
    for place, order, value in _by_place(changes, places, after.blocks):
        yield "update", place, order, value
    for place, order, value in _by_place(after.products, places):
        yield "weight_update", place, order, value


def _gradients(model: nn.Module, places: Mapping[str, str]) -> Iterator[tuple[int, str, str, int, float]]:
    values = {name: _rms(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    for place, order, value in _by_place(values, places):
        yield 0, "gradient", place, order, value


def _by_place(
    values: dict[str, float], places: Mapping[str, str], blocks: Sequence[str] = ()
) -> Iterator[tuple[str, int, float]]:
    """RMS over the blocks of each place, in the order of the forward pass; the last block also by itself."""
    squares: dict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        place = places.get(name) or module_place(name, places)
        squares[ATTENTION_LOGITS if name.endswith(ATTENTION_LOGITS) else place].append(value * value)
    seen = [name for name in blocks if name in values]
    if seen:
        squares[LAST_BLOCK] = [values[seen[-1]] ** 2]
    for order, (place, found) in enumerate(squares.items()):
        yield place, order, math.sqrt(sum(found) / len(found))


def _rms(x: Tensor) -> float:
    return x.detach().float().square().mean().sqrt().item()
