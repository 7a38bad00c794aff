"""What torch's memory trackers count of a training step on fake tensors, as JSON: `python -m tests.training.tracked`.

Nothing is allocated and nothing computed: tensors have a shape, a device and a lifetime. The device is the CPU, since a
torch that was built for CPUs has no fake GPU that attention and FSDP2 run on. The model is sharded as runs are.
"""

import json
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore

from mutune.model import decoder
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.scaling.memory import LOGITS_AT_ONCE
from mutune.training import distribution
from mutune.training.config import LoopConfig, ParallelConfig
from mutune.training.recompute import recomputed as again
from mutune.training.world import World

SITES = dict.fromkeys(("embedding", "attention_logits", "residual.attn", "residual.mlp", "output"), 0.5)
STEPS = 2  # the first makes Adam's moments
_mesh = distribution._mesh


class WithLoss(Decoder):
    """Its forward pass is its loss: what the tracker watches."""

    def forward(self, ids_BT: Tensor, targets_BT: Tensor) -> Tensor:  # type: ignore[override]
        return self.loss(ids_BT, targets_BT)


def tracked(
    shape: ModelConfig,
    processes: int,
    *,
    vocab_size: int,
    sequences: int,
    context_length: int,
    bf16: bool,
    attention: str,
    recomputed: str,
    passes: int = 1,
    reshard: bool = True,
    on_gpus: bool = False,
) -> int:
    """Peak bytes of a training step of one of so many processes."""
    if on_gpus:
        vars(decoder)["logits_at_once"] = lambda device: LOGITS_AT_ONCE["cuda"]
    world = World(0, processes, torch.device("cpu"))
    mesh = _mesh(world, 1) if processes > 1 else None
    distribution._mesh = lambda *_: mesh  # type: ignore[assignment]  # none can be made of fake tensors
    with FakeTensorMode():

        def build() -> Decoder:
            return WithLoss(shape, vocab_size, SITES, attention, again(recomputed))

        if processes == 1:
            model = build()
        else:
            loop = LoopConfig(dtype="bfloat16" if bf16 else "float32")
            model = distribution.sharded(build, world, loop, ParallelConfig(reshard=reshard))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        ids = torch.zeros(sequences, context_length + 1, dtype=torch.long)
        tracker = MemTracker() if processes == 1 else FSDPMemTracker(model, optimizer)
        if processes == 1:
            tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(STEPS):
                for _ in range(passes):
                    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                        loss = model(ids[:, :-1], ids[:, 1:])
                    loss.backward()
                    del loss
                    tracker.reset_mod_stats()
                optimizer.step()
                optimizer.zero_grad()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def main(cases: list[dict[str, Any]]) -> list[int]:
    """Peak bytes of each case: `shape` and `processes`, and what `tracked` takes."""
    found = []
    for case in cases:
        shape, processes = ModelConfig(**case.pop("shape")), case.pop("processes")
        if processes > 1:
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        found.append(tracked(shape, processes, **case))
        if processes > 1:
            dist.destroy_process_group()
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
