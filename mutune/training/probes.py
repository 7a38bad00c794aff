"""Probes: a few numbers about the weights, the optimizer and the logits of a live run, for the guard.

Shape suffixes: B batch, T time, D width, H heads, K head size, V vocabulary.

Nothing is changed: no gradient, no random number, no copy of the weights. Updates are read off Adam's moments. Sharded
tensors (FSDP2) are reduced over their shards, so every process calls this at the same step and gets the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mutune.model.decoder import Attention, Decoder
from mutune.parametrization.forward_pass import reshard, undisturbed
from mutune.parametrization.names import trainable
from mutune.parametrization.plan import Plan
from mutune.training.moments import Fields, Snapshot, attentions, upper_median, weights_and_moments
from mutune.training.world import whole

CONSTANT = 1e-6  # of the variance of the layer's median head's output: below, a head is dead


class Probe:
    """Measures one run, again and again.

    Args:
        model: a `Decoder`, wrapped or not.
        optimizer: the AdamW of its plan.
        plan: names the roles.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
        self.model, self.optimizer, self.plan = model, optimizer, plan
        self._last: Snapshot | None = None

    def remember(self) -> None:
        """Take the weights as they are as what the first probe is compared with: at the start, and on resume."""
        with torch.no_grad():
            reshard(self.model)
            self._last = weights_and_moments(self.model, self.optimizer, self.plan, None)[1]

    def measure(self, forward: Callable[[], Any]) -> Fields:
        """The fields of a probe.

        Args:
            forward: runs the model once on a few tokens, as training does, for example
                `lambda: loss(ids_BT, targets_BT)`; called without gradients and uncompiled.

        Returns:
            `update_ratio.<role>`: RMS of Adam's last update over RMS of the weights.
            `eps_share.<role>`: share of elements whose √v̂ is below ε (not of embeddings: rare tokens have no gradient).
            `second_moment`: Σ exp_avg_sq over all weights, before bias correction.
            `moved`, `moved_tensor`: the largest move since the last probe over what Adam can account for, and whose.
            `frozen`: tensors that Adam did not update and heads that had no gradient since the last probe; or absent.
            `dead_heads`: heads whose output is the same for all tokens; or absent.
            `attention_logit_max`, `output_logit_max`, `log_z`: largest absolute values, and mean of log Σ exp.
            `dtype.<of what>`: of parameters, gradients where there are any, optimizer and products of matrices.
        """
        with torch.no_grad():
            reshard(self.model)
            fields, self._last = weights_and_moments(self.model, self.optimizer, self.plan, self._last)
        return fields | _activations(self.model, self.optimizer, forward)


def _activations(model: nn.Module, optimizer: torch.optim.Optimizer, forward: Callable[[], Any]) -> Fields:
    """Logits, dead heads and number formats of one forward pass."""
    seen = _Seen()
    with undisturbed(model), _watched(model, seen):
        forward()
    names = list(seen.highest)
    highest = torch.stack([seen.highest[name].float() for name in names]) if names else torch.zeros(0)
    values = dict(zip(names, _largest(highest).tolist(), strict=True))
    fields: Fields = {name: values[name] for name in names}
    if seen.dead:
        fields["dead_heads"] = ", ".join(seen.dead)
    return fields | dict(_dtypes(model, optimizer)) | {"dtype.products": seen.computed}


class _Seen:
    """What hooks gather in one forward pass."""

    def __init__(self) -> None:
        self.highest: dict[str, Tensor] = {}
        self.dead: list[str] = []
        self.computed = ""

    def largest(self, name: str, value: Tensor) -> None:
        before = self.highest.get(name)
        self.highest[name] = value if before is None else torch.maximum(before, value)

    def projected(self, attention: Attention, qkv_BTF: Tensor) -> None:
        """Attention logits of all pairs of tokens, before positions are added."""
        self.computed = str(qkv_BTF.dtype).removeprefix("torch.")
        q_BHTK, k_BHTK = (
            part.unflatten(-1, (attention.heads, -1)).transpose(1, 2).float() for part in qkv_BTF.chunk(3, dim=-1)[:2]
        )
        logits_BHTT = (attention.logit_multiplier.value * q_BHTK) @ k_BHTK.transpose(-2, -1)
        self.largest("attention_logit_max", logits_BHTT.abs().max())

    def mixed(self, name: str, attention: Attention, out_BTD: Tensor) -> None:
        """Heads whose output does not depend on the token."""
        variance_H = out_BTD.float().unflatten(-1, (attention.heads, -1)).flatten(0, 1).var(0).sum(-1).tolist()
        usual = upper_median(variance_H)
        self.dead += [f"{name} head {head}" for head, value in enumerate(variance_H) if value <= CONSTANT * usual]

    def put_out(self, table: Tensor, x_BTD: Tensor) -> None:
        logits_BTV = F.linear(x_BTD, whole(table)).float()
        self.largest("output_logit_max", logits_BTV.abs().max())
        self.highest["log_z"] = logits_BTV.logsumexp(-1).mean()


@contextmanager
def _watched(model: nn.Module, seen: _Seen) -> Iterator[None]:
    handles = []
    for name, attention in attentions(model).items():
        handles += [
            attention.c_attn.register_forward_hook(lambda _, __, out, a=attention: seen.projected(a, out)),
            attention.c_proj.register_forward_pre_hook(
                lambda _, inputs, n=name, a=attention: seen.mixed(n, a, inputs[0])
            ),
        ]
    decoder = next(module for module in model.modules() if isinstance(module, Decoder))
    output = decoder.wte if decoder.lm_head is None else decoder.lm_head
    handles.append(decoder.output_multiplier.register_forward_hook(lambda _, __, x: seen.put_out(output.weight, x)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dtypes(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """The number formats of what there is."""
    tensors = list(trainable(model).values())
    states = [optimizer.state[tensor] for tensor in tensors if optimizer.state.get(tensor)]
    kinds = {
        "parameters": {tensor.dtype for tensor in tensors},
        "gradients": {tensor.grad.dtype for tensor in tensors if tensor.grad is not None},
        "optimizer": {state[key].dtype for state in states for key in ("exp_avg", "exp_avg_sq")},
    }
    for what, found in kinds.items():
        if found:
            yield f"dtype.{what}", "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))


def _largest(values: Tensor) -> Tensor:
    """The largest over all processes, which may have run other tokens."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
    return values
