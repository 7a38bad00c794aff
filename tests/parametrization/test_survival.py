"""What users do to a model: copies, averages, compilation, sharding, ties, meta initialisation, parametrizations.

Each time the claim is the same: initial values, groups and three training steps are those of the untouched model.
"""

import copy
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from examples.llama import LlamaShape, build
from mutune.errors import Refusal
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.infer import Family
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name, trainable
from mutune.parametrization.parametrized import Parametrized

HYPER = BaseHyperparameters(
    learning_rate=0.02, init_std=0.25, embedding_multiplier=2.0, output_multiplier=1.5, weight_decay=0.1
)
TARGET = LlamaShape(64, depth=2, head_size=8)


def planned(tied: bool = False) -> Parametrized:
    base, delta, target = (LlamaShape(width, head_size=8, tied=tied) for width in (16, 32, 64))
    return Family(build, base, delta, head_size=8).at(target, "mup", HYPER)


class Library(nn.Module):
    """A model that carries no Multiplier: its sites are named."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(31, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.head = nn.Linear(width, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + F.gelu(layer(x))
        return self.head(x)


def named() -> Parametrized:
    return Family(Library, 16, 32, sites={"embedding": "embed", "output": "head"}).at(64, "mup", HYPER)


PLANS: dict[str, Callable[[], Parametrized]] = {"in-code": planned, "tied": lambda: planned(tied=True), "named": named}


def batch(step: int, rank: int = 0) -> Tensor:
    return torch.randint(31, (4, 9), generator=torch.Generator().manual_seed(100 * rank + step))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def trained(model: nn.Module, result: Parametrized, batches: Callable[[int], Tensor] = batch) -> list[float]:
    """The losses of three steps with the groups of the plan."""
    optimizer = result.optimizer(model)
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, batches(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def groups_of(model: nn.Module, result: Parametrized) -> list[dict[str, Any]]:
    """The groups, with names for tensors."""
    return [
        {**group, "params": [name for name, _ in group["params"]]}  # type: ignore[attr-defined]
        for group in result.optimizer_groups(model)
    ]


def same_as_untouched(model: nn.Module, result: Parametrized) -> None:
    """Bit for bit: values, groups, multipliers, losses, and values after three steps."""
    reference = result.build(seed=1)
    ours, theirs = trainable(model), trainable(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert groups_of(model, result) == groups_of(reference, result)
    assert multipliers(model) == multipliers(reference)
    losses = trained(model, result)
    assert losses == trained(reference, result)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(set(losses)) == 3


def multipliers(model: nn.Module) -> dict[str, float]:
    return {canonical_name(n): m.value for n, m in model.named_modules() if isinstance(m, Multiplier)}


@pytest.fixture(params=PLANS)
def result(request: pytest.FixtureRequest) -> Parametrized:
    return PLANS[request.param]()


# ------------------------------------------------------------------------------------------------- copies and wrappers
def test_a_deep_copy(result: Parametrized) -> None:
    same_as_untouched(copy.deepcopy(result.build(seed=1)), result)


def test_a_pickle(result: Parametrized) -> None:
    same_as_untouched(pickle.loads(pickle.dumps(result.build(seed=1))), result)


def test_a_pickled_plan(result: Parametrized) -> None:
    again: Parametrized = pickle.loads(pickle.dumps(result))
    same_as_untouched(again.build(seed=1), result)


def test_an_average_that_took_over_the_model(result: Parametrized) -> None:
    average = AveragedModel(result.build(seed=1))
    average.update_parameters(result.build(seed=2))  # the first update copies
    average.update_parameters(result.build(seed=1))
    assert torch.isfinite(loss_of(average, batch(0)))
    result.initialise(average, seed=1)
    same_as_untouched(average, result)


def test_an_average_is_the_model_that_it_averages(result: Parametrized) -> None:
    model = result.build(seed=1)
    average = AveragedModel(model)
    average.update_parameters(model)
    assert multipliers(average) == multipliers(model)
    assert torch.equal(average(batch(0)), model(batch(0)))


@pytest.mark.parametrize("initialise_first", [True, False])
def test_a_compiled_model(result: Parametrized, initialise_first: bool) -> None:
    model = result.build(seed=1 if initialise_first else 2)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert isinstance(compiled, nn.Module)
    if not initialise_first:
        result.initialise(compiled, seed=1)
    same_as_untouched(compiled, result)
    torch.compiler.reset()


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor on the CPU needs g++")
@pytest.mark.parametrize("plan", PLANS)
def test_a_model_compiled_to_machine_code(plan: str) -> None:
    result = PLANS[plan]()
    compiled = torch.compile(result.build(seed=1), fullgraph=True)
    assert isinstance(compiled, nn.Module)
    reference = trained(result.build(seed=1), result)
    assert trained(compiled, result) == pytest.approx(reference, rel=1e-5)


# -------------------------------------------------------------------------------------------- initialisation and state
def test_a_model_made_on_the_meta_device(result: Parametrized) -> None:
    with torch.device("meta"):
        model = result.make()
    with pytest.raises(Refusal, match=r"is on the meta device; call model\.to_empty"):
        result.initialise(model, seed=1)
    model.to_empty(device="cpu")
    if len(trainable(model)) > len(result.plan.parameters):
        with pytest.raises(Refusal, match=r"the model has head\.weight, which the plan does not; .*tie it again"):
            result.initialise(model, seed=1)
        with pytest.raises(Refusal, match=r"the model has head\.weight"):
            result.optimizer(model)
        model.get_submodule("head").weight = model.get_parameter("embed.weight")
    result.initialise(model, seed=1)
    same_as_untouched(model, result)


def test_assigned_state(result: Parametrized) -> None:
    with torch.device("meta"):
        model = result.make()
    model.load_state_dict(result.build(seed=1).state_dict(), assign=True)
    if len(trainable(model)) > len(result.plan.parameters):
        with pytest.raises(Refusal, match=r"the model has head\.weight"):  # one memory, stepped twice
            result.optimizer(model)
        model.get_submodule("head").weight = model.get_parameter("embed.weight")
    result.place(model)
    same_as_untouched(model, result)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_gets_the_same_draws(result: Parametrized, dtype: torch.dtype) -> None:
    reference = trainable(result.build(seed=1))
    model = result.make().to(dtype)
    result.initialise(model, seed=1)
    for name, parameter in trainable(model).items():
        assert torch.equal(parameter, reference[name].to(dtype))
    assert len(set(trained(model, result))) == 3


def test_a_model_that_lost_a_multiplier_is_refused() -> None:
    result = planned()
    model = result.build(seed=1)
    model.scale_output = nn.Identity()
    with pytest.raises(Refusal, match=r"no multiplier at site output, where the plan has 0\.375"):
        result.initialise(model, seed=1)


def test_a_model_that_lost_a_tensor_is_refused() -> None:
    result = planned()
    model = result.build(seed=1)
    model.get_parameter("norm.weight").requires_grad_(False)
    with pytest.raises(Refusal, match=r"the plan has norm\.weight, which the model does not have or does not train"):
        result.optimizer(model)


# ---------------------------------------------------------------------------------------------------- parametrizations
class Same(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.0


@pytest.mark.parametrize("initialise_first", [True, False])
def test_a_parametrized_weight(result: Parametrized, initialise_first: bool) -> None:
    model = result.build(seed=1 if initialise_first else 2)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "head":
            parametrize.register_parametrization(module, "weight", Same())
    if not initialise_first:
        result.initialise(model, seed=1)
    same_as_untouched(model, result)


def test_a_parametrization_with_two_originals_is_another_model() -> None:
    result = named()
    model = result.build(seed=1)
    parametrizations.weight_norm(model.get_submodule("layers.0"))
    with pytest.raises(Refusal, match=r"the model has layers\.0\.parametrizations\.weight\.original0, "):
        result.optimizer(model)


# ------------------------------------------------------------------------------------- two processes, DDP and FSDP2
WORLD = 2


def reference_steps(result: Parametrized) -> nn.Module:
    """Three steps of the untouched model on both processes' batches; halves are exact, so DDP's mean has these bits."""
    model = result.build(seed=1)
    optimizer = result.optimizer(model)
    for step in range(3):
        optimizer.zero_grad()
        for rank in range(WORLD):
            (loss_of(model, batch(step, rank)) / WORLD).backward()
        optimizer.step()
    return model


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.get_submodule("layers").children():
        fully_shard(layer)
    fully_shard(model)
    return model


def ddp(result: Parametrized) -> nn.Module:
    return DistributedDataParallel(result.build(seed=1))


def ddp_initialised_after(result: Parametrized) -> nn.Module:
    model = DistributedDataParallel(result.make())
    result.initialise(model, seed=1)
    return model


def fsdp2(result: Parametrized) -> nn.Module:
    return sharded(result.build(seed=1))


def fsdp2_initialised_after(result: Parametrized) -> nn.Module:
    model = sharded(result.make())
    result.initialise(model, seed=1)
    return model


def fsdp2_from_meta(result: Parametrized) -> nn.Module:
    with torch.device("meta"):
        model = sharded(result.make())
    model.to_empty(device="cpu")
    result.initialise(model, seed=1)
    return model


WRAPS = {"ddp": ddp, "ddp-after": ddp_initialised_after, "fsdp2": fsdp2, "fsdp2-after": fsdp2_initialised_after}
CASES = [(wrap, plan) for plan in PLANS for wrap in WRAPS] + [("fsdp2-meta", "in-code"), ("fsdp2-meta", "named")]


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def check(wrap: str, plan: str, rank: int) -> str:
    """What was found: empty if all is as untouched."""
    result = PLANS[plan]()
    model = {**WRAPS, "fsdp2-meta": fsdp2_from_meta}[wrap](result)
    start, reference = trainable(result.build(seed=1)), reference_steps(result)
    wrong = [name for name, p in trainable(model).items() if not torch.equal(whole(p), start[name])]
    if wrong or trainable(model).keys() != start.keys():
        return f"initial values of {wrong} differ"
    if groups_of(model, result) != groups_of(reference, result):
        return "groups differ"
    if multipliers(model) != multipliers(reference):
        return f"multipliers differ: {multipliers(model)}"
    trained(model, result, lambda step: batch(step, rank))
    ends = trainable(reference)
    gap = max((whole(p) - ends[name]).abs().max().item() for name, p in trainable(model).items())
    moved = max((ends[name] - start[name]).abs().max().item() for name in ends)
    return "" if gap == 0.0 and moved > 0.01 else f"values differ by {gap} after {moved}"


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    found = {}
    for wrap, plan in CASES:
        try:
            found[f"{wrap} {plan}"] = check(wrap, plan, rank)
        except Exception as error:
            found[f"{wrap} {plan}"] = f"{type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    while not all(Path(folder, f"{other}.json").exists() for other in range(WORLD)):
        time.sleep(0.01)  # nothing is under way between the processes once both have written
    os._exit(0)  # gloo's threads now and then abort an interpreter that ends in the ordinary way


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two processes found, by case; both are started once for all cases."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(process, args=(str(folder),), nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize(("wrap", "plan"), CASES)
def test_two_processes_train_as_one(two_processes: list[dict[str, str]], wrap: str, plan: str) -> None:
    assert [found[f"{wrap} {plan}"] for found in two_processes] == ["", ""]
