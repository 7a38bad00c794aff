"""Whether the multipliers of a plan are in the model, and act in its forward pass."""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mutune.errors import require
from mutune.parametrization.finding import Finding, same
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name
from mutune.parametrization.plan import Plan, SitePlan, kind

#: Relative error of one multiplication in the coarsest dtype that models run in (bfloat16 rounds at 4e-3).
ROUNDING = 1e-2
#: Sites at the two ends of a model, outside every block.
ENDS = ("embedding", "output")
_RATIO = re.compile(r"\bm(_L)?\b")


def live_multipliers(model: nn.Module, plan: Plan) -> Iterator[Finding]:
    """Findings about the `Multiplier` modules that a model has: one for every place of a site, with the plan's value.

    A site is allowed to have none only where it multiplies by 1 at every shape.
    """
    counts: Counter[str] = Counter()
    for name, module in _multipliers(model).items():
        row = plan.multipliers.get(module.site)
        if row is None:
            yield Finding(name, f"multiplier {module.site}", "absent", module.value, "the plan has no such site")
            continue
        counts[module.site] += 1
        if not same(float(module.value), row.value):
            why = "it was not set by the plan, or was changed since"
            yield Finding(name, f"multiplier {row.site}", row.value, float(module.value), why)
    for row in plan.multipliers.values():
        wanted, found = _places(row, plan), counts[row.site]
        if not (found >= wanted or found == 1 or (found == 0 and _never_needed(row))):  # one may serve all blocks
            why = f"a multiplier {row.formula} was forgotten"
            yield Finding(row.tensor, f"number of multipliers {row.site}", str(wanted), str(found), why)


def acting_multipliers(model: nn.Module, plan: Plan, forward: Callable[[], Any]) -> list[Finding]:
    """Findings about what the multipliers do when `forward` runs the model.

    Each must be called, its output must be its input times the plan's value, and the output must reach the result: each
    module is made NaN once, and the result must be NaN too; one that serves all blocks, in each of them. `forward` is
    therefore called once in the mode in which the model comes, since a training path may go around what evaluation
    uses, and in evaluation mode once per module and block that it serves; all without gradients, uncompiled.
    Afterwards modes, buffers and generators are as before. Not guarded: what the model keeps outside its buffers, other
    generators (NumPy's, Python's), and code that cannot bear NaN. Wrap nothing that synchronises gradients: pass the
    inner model of DDP.
    """
    places = _multipliers(model)
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        watched = [_Watched(name, module, plan) for name, module in places.items() if module.site in plan.multipliers]
        with _hooks({watch.module: watch.hook for watch in watched}):
            clean = _holds_nan(forward())
        model.eval()
        found = [finding for watch in watched for finding in watch.findings()]
        found += _too_few_calls(watched, plan)
        for watch in [watch for watch in watched if watch.calls] if not clean else ():
            found += _without_effect(watch, forward, alone=[w.row for w in watched].count(watch.row) == 1, plan=plan)
    return found


def _without_effect(watch: "_Watched", forward: Callable[[], Any], *, alone: bool, plan: Plan) -> Iterator[Finding]:
    """A finding where NaN does not reach the result; call by call where the module serves all blocks, once each."""
    shared = alone and watch.calls == _places(watch.row, plan) > 1
    for call in range(watch.calls) if shared else [None]:
        poison = _Poison(call)
        with _hooks({watch.module: poison}), _NaNThroughAttention():
            reached = _holds_nan(forward())
        if not reached and (poison.acted or not shared):
            where = "" if call is None else f" at call {call + 1} of {watch.calls}"
            why = "it is computed and then not used"
            yield Finding(
                watch.name, f"multiplier {watch.row.site}", "part of the result", f"without effect{where}", why
            )


class _Watched:
    """Counts a multiplier's calls and compares its first output with input · plan value."""

    def __init__(self, name: str, module: Multiplier, plan: Plan) -> None:
        self.name, self.module, self.row, self.calls = name, module, plan.multipliers[module.site], 0
        self.off: tuple[float, float] | None = None

    def hook(self, module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
        self.calls += 1
        (x,) = (*args, *named.values())
        wanted = x * self.row.value
        if not torch.allclose(output, wanted, rtol=ROUNDING, atol=0.0, equal_nan=True):
            self.off = wanted.norm().item(), output.norm().item()

    def findings(self) -> Iterator[Finding]:
        quantity = f"multiplier {self.row.site}"
        if not self.calls:
            why = "the module is there, and the forward pass goes around it"
            yield Finding(self.name, quantity, "called", "never called", why)
        if self.off:
            wanted, found = self.off
            why = "the output is not the input times the plan's value"
            yield Finding(self.name, f"norm of the output of multiplier {self.row.site}", wanted, found, why)


def _too_few_calls(watched: list[_Watched], plan: Plan) -> Iterator[Finding]:
    """A module that serves all blocks must be called once in each."""
    for row in plan.multipliers.values():
        mine = [watch for watch in watched if watch.row is row]
        if len(mine) == 1 and 0 < mine[0].calls < _places(row, plan):
            wanted, found = str(_places(row, plan)), str(mine[0].calls)
            why = "some blocks go without it"
            yield Finding(mine[0].name, f"calls of multiplier {row.site}", wanted, found, why)


def _multipliers(model: nn.Module) -> dict[str, Multiplier]:
    return {canonical_name(name): module for name, module in model.named_modules() if isinstance(module, Multiplier)}


def _places(row: SitePlan, plan: Plan) -> int:
    """In how many outermost blocks the site acts; 1 outside blocks.

    Several tensors of one block (experts, a projection per head) may share one multiplier.
    """
    if row.site in ENDS:
        return 1
    return len({_outermost(name) for name in plan.parameters if kind(name) == row.tensor})


def _outermost(name: str) -> str:
    """`layers.3.experts.0.w` → `layers.3`; a name without an index, but for an expert's → the empty string."""
    found = re.match(r"(.*?(?<!experts)\.)?\d+(?=\.|$)", name)
    return found.group() if found else ""


def _never_needed(row: SitePlan) -> bool:
    """Whether the site multiplies by 1 at this width and depth and at every other."""
    return row.value == 1.0 and not _RATIO.search(row.formula)


class _Poison:
    """Makes the output of a module's every call NaN, or of one call alone; `acted` once there was something to make."""

    def __init__(self, only: int | None) -> None:
        self.only, self.calls, self.acted = only, 0, False

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
        self.calls += 1
        if self.only not in (None, self.calls - 1):
            return output
        self.acted |= output.numel() > 0
        return torch.full_like(output, torch.nan)


class _NaNThroughAttention(TorchDispatchMode):
    """Torch's fused attention may make zeros of queries that are NaN (on CPUs it does); inside, NaN comes out, whoever
    calls it.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name() and _holds_nan(args):
            tree_leaves(result)[0].fill_(torch.nan)  # the output comes before what a backward pass needs
        return result


def _holds_nan(result: Any) -> bool:
    tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    require(
        len(tensors) > 0, "forward= returned no tensor; return the model's output, as in forward=lambda: model(ids)."
    )
    return any(bool(tensor.isnan().any()) for tensor in tensors)


@contextmanager
def _hooks(hooks: Mapping[Multiplier, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no compiled code; modes, buffers and torch's generators as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    cuda = sorted({tensor.device.index for tensor in model.parameters() if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), _uncompiled():
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for buffer, before in buffers.items():
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            reshard(model)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 modules show their sharded parameters again: a forward pass without a backward leaves whole ones."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to load, and there is nothing to do where nobody has
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _uncompiled() -> AbstractContextManager[Any]:
    """Hooks would compile a compiled model anew; where Dynamo, which is slow to load, is not, nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
