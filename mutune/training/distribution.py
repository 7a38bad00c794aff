"""The processes of one run, as torchrun starts them, and a model sharded over them (FSDP2).

Every process has the whole plan, the whole schedule and its rows of each global batch; what they must agree in is
gathered here. Collectives on numbers go over gloo, those of the model over NCCL on GPUs.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mutune.errors import require
from mutune.model.decoder import Decoder
from mutune.training.config import LoopConfig, ParallelConfig
from mutune.training.device import device_name
from mutune.training.launched import is_launched
from mutune.training.world import World, alone

WAIT = timedelta(minutes=30)  # for the other processes, who may be tokenizing a corpus
#: What the backends say where another process is gone. gloo has no exception of its own.
LOST = ("connection closed by peer", "connection reset by peer", "gloo/transport", "gloo/rendezvous", "remote process")


@contextmanager
def joined(device: str) -> Iterator[World]:
    """This process's place among those that torchrun started; without torchrun, alone."""
    name = device_name(device)
    if not is_launched():
        yield alone(torch.device(name))
        return
    if name == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        require(
            local < torch.cuda.device_count(),
            f"torchrun started more processes than the {torch.cuda.device_count()} GPUs here; for example "
            f"torchrun --nproc-per-node={torch.cuda.device_count()}.",
        )
        torch.cuda.set_device(local)
        where, backend = torch.device("cuda", local), "cpu:gloo,cuda:nccl"
    else:
        where, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend, timeout=WAIT, device_id=where if name == "cuda" else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), where)
    except Exception as error:
        if not hasattr(error, "shared"):
            error.shared = False  # type: ignore[attr-defined]  # so that this process says it, before the others notice
        raise
    finally:
        dist.destroy_process_group()


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether that is how the others notice that a process is gone."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(word in said for word in LOST)


def require_even(batches: list[int], world: World, parallel: ParallelConfig) -> None:
    """Refuse batches that these processes cannot share evenly, and replicas that do not divide them."""
    require(
        world.size % parallel.replicas == 0,
        f"parallel.replicas={parallel.replicas} does not divide the {world.size} processes; for example "
        f"parallel.replicas={2 if world.size % 2 == 0 and world.size > 2 else 1}.",
    )
    for number, sequences in enumerate(batches):
        works = max(count for count in range(1, world.size + 1) if sequences % count == 0)
        require(
            sequences % world.size == 0,
            f"target.stages[{number}].batch_sequences={sequences} cannot be shared evenly by {world.size} processes; "
            f"for example torchrun with {works} of them.",
        )


def sharded(build: Callable[[], Decoder], world: World, loop: LoopConfig, parallel: ParallelConfig) -> Decoder:
    """The decoder that `build` makes, without values, each block and the rest sharded over the processes.

    It is built on the meta device, so that no process ever holds all of it. Weights, gradients and sums are float32;
    with `loop.dtype=bfloat16` blocks are gathered in bfloat16, while the table, which is also the output, is gathered
    in float32 and rounded by autocast, as in a run of one process.
    """
    with torch.device("meta"):
        model = build()
    mesh = _mesh(world, parallel.replicas)
    low = torch.bfloat16 if loop.dtype == "bfloat16" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    whole = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=parallel.reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, mp_policy=whole)
    register_fsdp_forward_method(model, "loss")
    model.to_empty(device=world.device)
    return model


def _mesh(world: World, replicas: int) -> DeviceMesh:
    """(shard,), or with several replicas (replicate, shard): FSDP or HSDP."""
    kind = world.device.type
    if replicas == 1:
        return init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, world.size // replicas), mesh_dim_names=("replicate", "shard"))
