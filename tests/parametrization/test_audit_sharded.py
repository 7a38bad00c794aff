"""The auditor on sharded and replicated models: two processes, FSDP2's DTensors and DDP's names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn

from mutune.parametrization.audit import findings
from tests.parametrization.mutations import EMBEDDING, MATRIX, live
from tests.training.tiny import tiny_decoder, tiny_optimizer


def _joined(rank: int, folder: str) -> None:
    """One process: what the audits say, a line for each, in a file named by its rank."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    said = {"sharded": sharded(), "replicated": replicated()}
    Path(folder, f"{rank}.json").write_text(json.dumps(said))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """What the audits say in each of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(_joined, args=(str(folder),), nprocs=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def sharded() -> list[str]:
    """A correct FSDP2 model, then the same with a matrix 10 % too large."""
    run = live()
    model: Any = run.model
    for block in model.h:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(
        [
            {**{k: v for k, v in g.items() if k not in ("params", "param_names")}, "params": params(model, g)}
            for g in run.optimizer.param_groups
        ],
        betas=(0.9, 0.95),
    )
    ids_BT = torch.arange(12)[None]

    def said() -> list[str]:
        found = findings(model, optimizer, run.plan, at_init=True, forward=lambda: model(ids_BT))
        return [f"{finding.tensor}: {finding.quantity}" for finding in found] or ["nothing"]

    correct = said()
    kept = type(model.get_parameter(EMBEDDING)).__name__
    model(ids_BT)  # as an evaluation would: without a backward pass, the root keeps whole parameters
    with torch.no_grad():
        model.get_parameter(MATRIX).mul_(1.1)
    return [*correct, *said(), kept]


def params(model: nn.Module, group: dict[str, Any]) -> list[nn.Parameter]:
    return [model.get_parameter(name) for name in group["param_names"]]


def replicated() -> list[str]:
    """A correct DDP model whose inner model runs the forward check."""
    run = live()
    model = tiny_decoder(run.model.shape, run.plan)
    wrapped = nn.parallel.DistributedDataParallel(model)
    ids_BT = torch.arange(12)[None]
    found = findings(wrapped, tiny_optimizer(model, run.plan), run.plan, at_init=True, forward=lambda: model(ids_BT))
    return [str(finding) for finding in found] or ["nothing"]


def test_sharded_tensors_are_gathered_and_judged_as_wholes(said: list[dict[str, list[str]]]) -> None:
    expected = ["nothing", f"{MATRIX}: initial std", "DTensor"]
    assert [process["sharded"] for process in said] == [expected, expected]


def test_a_replicated_model_is_correct_under_its_wrapped_names(said: list[dict[str, list[str]]]) -> None:
    assert [process["replicated"] for process in said] == [["nothing"], ["nothing"]]
