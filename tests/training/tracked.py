"""What torch's memory trackers count of a training step on fake tensors, as JSON: `python -m tests.training.tracked`.

Nothing is allocated and nothing computed: tensors have a shape, a device and a lifetime. The device is the CPU, since a
torch that was built for CPUs has no fake GPU that attention and FSDP2 run on; attention by torch's fused kernel without
a bias stands for FlexAttention, which keeps the same tensors. The wrapping is FSDP2's per block, with the rest as one
group that stays gathered, bfloat16 weights, float32 reductions, and a loss in chunks.
"""

import json
import sys
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.scaling.memory import LOGITS_AT_ONCE

SITES = dict.fromkeys(("embedding", "attention_logits", "residual.attn", "residual.mlp", "output"), 0.5)
STEPS = 2  # the first makes Adam's moments
KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}
_attention = F.scaled_dot_product_attention


def _without_bias(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, scale: float) -> Tensor:
    return _attention(q, k, v, is_causal=True, scale=scale)


class Chunked(Decoder):
    """A decoder whose forward pass ends in the loss, computed in chunks; the residual stream is float32."""

    bias: Tensor

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:  # type: ignore[override]
        x = self.embedding_multiplier(self.wte(ids_BT).float())
        for block in self.h:
            x = block(x, self.bias)
        x, y = self.output_multiplier(self.ln_f(x)).flatten(0, 1), targets_BT.flatten()
        rows = max(1, LOGITS_AT_ONCE["cpu"] // len(self.wte.weight))
        parts = zip(x.split(rows), y.split(rows), strict=True)
        return torch.stack([checkpoint(self._sum, a, b, use_reentrant=False) for a, b in parts]).sum() / len(y)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, self.wte.weight).float(), y, reduction="sum")


def _policy(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recompute(block: nn.Module, how: str) -> None:
    selective = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)}
    more: dict[str, Any] = {} if how == "full" else selective
    block.forward = partial(checkpoint, block.forward, use_reentrant=False, **more)


def tracked(
    shape: ModelConfig,
    mesh: DeviceMesh | None,
    *,
    vocab_size: int,
    sequences: int,
    context_length: int,
    bf16: bool,
    attention: str,
    recomputed: str,
    passes: int = 1,
    reshard: bool = True,
) -> int:
    """Peak bytes of a training step of one process; `mesh` None is a process alone."""
    F.scaled_dot_product_attention = _without_bias if attention == "flex" else _attention  # type: ignore[assignment]
    with FakeTensorMode():
        kind = Decoder if mesh is None else Chunked
        model = kind(shape, vocab_size, SITES, "explicit" if attention == "explicit" else "sdpa")
        for block in model.h if recomputed != "none" else ():
            _recompute(block, recomputed)
        if mesh is not None:
            _shard(model, mesh, bf16, reshard)
            model.bias = torch.zeros(1) if attention == "flex" else torch.zeros(shape.heads, *2 * [context_length])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        ids = torch.zeros(sequences, context_length + 1, dtype=torch.long)
        tracker = MemTracker() if mesh is None else FSDPMemTracker(model, optimizer)
        if mesh is None:
            tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(STEPS):
                for _ in range(passes):
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        loss = (model if mesh is not None else model.loss)(ids[:, :-1], ids[:, 1:])
                    loss.backward()
                    del loss
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def _shard(model: Decoder, mesh: DeviceMesh, bf16: bool, reshard: bool) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def main(cases: list[dict[str, Any]]) -> list[int]:
    """Peak bytes of each case: `shape` and `processes`, and what `tracked` takes."""
    found = []
    for case in cases:
        shape, processes = ModelConfig(**case.pop("shape")), case.pop("processes")
        if processes == 1:
            found.append(tracked(shape, None, **case))
            continue
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        found.append(tracked(shape, init_device_mesh("cpu", (processes,)), **case))
        dist.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
