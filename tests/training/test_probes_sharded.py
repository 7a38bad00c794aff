"""Probes of sharded models (FSDP2, HSDP): two processes have the numbers of one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from mutune.model.shape import ModelConfig
from mutune.parametrization.apply import make_optimizer
from mutune.training.moments import Fields
from mutune.training.probes import Probe
from mutune.training.watch import agreed
from tests.training.tiny import tiny_batches, tiny_decoder, tiny_plan

SHAPE = ModelConfig(width=48, depth=2, head_size=16)
MESHES = {"plain": None, "sharded": (1, 2), "replicated": (2, 1)}


def measured(mesh: tuple[int, int] | None) -> list[Fields]:
    """Two probes of one run, the second after a tensor was rewritten and a head frozen."""
    plan = tiny_plan(SHAPE)
    model: Any = tiny_decoder(SHAPE, plan)
    if mesh is not None:
        devices = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
        for block in model.h:
            fully_shard(block, mesh=devices)
        fully_shard(model, mesh=devices)
    optimizer = make_optimizer(model, plan, betas=(0.9, 0.95))
    probe, batch = Probe(model, optimizer, plan), tiny_batches()
    probe.remember()
    found = []
    for step in range(12):
        ids_BT = torch.from_numpy(batch(step))
        logits_BTV = model(ids_BT[:, :-1])
        torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 10:
            with torch.no_grad():
                model.get_parameter("h.1.mlp.c_fc.weight").mul_(-1.0)
        if step in (5, 11):
            found.append(probe.measure(lambda ids_BT=ids_BT: model(ids_BT)))  # type: ignore[misc]
    return found


def _joined(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {key: measured(mesh) for key, mesh in MESHES.items()}
    found["agreed"] = [
        agreed({"file": "ab"}),
        agreed({"file": "ab" if rank == 0 else "cd", "dtype": "float32", **({"only": "h"} if rank else {})}),
    ]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The probes of each of two processes, by how the model is spread."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(_joined, args=(str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("how", ["sharded", "replicated"])
def test_every_process_has_the_fields_of_the_whole_model(found: list[dict[str, Any]], how: str) -> None:
    plain = found[0]["plain"]
    assert plain[1]["moved_tensor"] == "h.1.mlp.c_fc.weight"
    for process in found:
        for probe, expected in zip(process[how], plain, strict=True):
            assert probe.keys() == expected.keys()
            for key, value in expected.items():
                loose = key in ("moved", "moved_tensor")  # other elements are sampled
                if key == "moved_tensor" and expected["moved"] < 2.0:
                    continue
                wanted = value if isinstance(value, str) else pytest.approx(value, rel=0.3 if loose else 1e-4)
                assert probe[key] == wanted, key


def test_a_process_that_says_something_else_is_named_to_all(found: list[dict[str, Any]]) -> None:
    differing = {"file": "ab", "dtype": "float32", "differs.file": "cd at rank 1", "differs.only": "h at rank 1"}
    assert [process["agreed"] for process in found] == [[{"file": "ab"}, differing]] * 2
