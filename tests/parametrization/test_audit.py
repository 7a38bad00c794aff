"""The auditor: it says what was altered, says nothing of a correct run, and leaves no trace."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel

from mutune import Family, parametrize
from mutune.errors import Refusal
from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.apply import initial_tensor, set_rates
from mutune.parametrization.audit import audit, findings
from mutune.parametrization.finding import SHOWN, AuditError, Finding
from mutune.parametrization.initial_values import KURTOSIS, Z, standard_error
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import canonical_name
from mutune.parametrization.opinion import second_opinion
from mutune.parametrization.roles import Role
from mutune.parametrization.rules import NORMAL, TABLES, TRUNCATED_NORMAL, TRUNCATED_STD_RATIO
from tests.parametrization.mutations import (
    DOCUMENT,
    EMBEDDING,
    MATRIX,
    MUTATIONS,
    TIED,
    Live,
    Mutation,
    applied_table,
    live,
    section,
    warm_up,
)
from tests.training.tiny import BASE, VOCAB, same_parameters, tiny_decoder, tiny_optimizer, tiny_plan, tiny_train


# ------------------------------------------------------------------------------------------------------- what is caught
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_caught_and_named(mutation: Mutation) -> None:
    found = mutation.live().findings()
    assert mutation.caught(found) is not None, [str(finding) for finding in found]


def test_the_documented_matrix_is_the_one_that_is_tested() -> None:
    assert section(DOCUMENT.read_text())[1] == applied_table()


def test_an_audit_stops_with_one_sentence_per_kind_of_finding_and_the_number_first() -> None:
    run = next(m for m in MUTATIONS if m.name == "groups applied twice").live()
    with pytest.raises(AuditError) as caught:
        audit(run.model, run.optimizer, run.plan)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the audit found 15 mismatches with the plan:"  # 5 matrices in each of 3 blocks
    assert lines[1] == (
        "- h.0.attn.c_attn.weight (and 2 like it): learning rate is 0.00125, expected 0.005; "
        "the table's multiplier 0.25 was applied twice."
    )
    assert len(lines) == 1 + 5
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it may come from another process


@pytest.mark.parametrize(
    ("name", "cause", "cure"),
    [
        ("OneCycleLR with one max_lr", "OneCycleLR's max_lr is 0.02, expected 0.005", "one value per group"),
        ("CosineAnnealingLR with eta_min, a million steps long", "eta_min is 0.0001, expected 2.5e-05", "eta_min at 0"),
    ],
)
def test_a_scheduler_that_erases_ratios_is_named_before_what_it_did(name: str, cause: str, cure: str) -> None:
    run = next(m for m in MUTATIONS if m.name == name).live()
    with pytest.raises(AuditError) as caught:
        audit(run.model, run.optimizer, run.plan, run.scheduler)
    first, *rest = str(caught.value).splitlines()[1:]
    assert first.startswith("- h.0.attn.c_attn.weight: ")
    assert cause in first
    assert cure in first
    assert not any("initial_lr" in line for line in rest)  # the same once more: each tensor's rate is named once
    tensors = [finding.tensor for finding in caught.value.findings[1:]]
    assert len(set(tensors)) == len(tensors)


def test_a_message_stays_short() -> None:
    many = [Finding(f"tensor_{letter}", "shape", "1", "2", "why") for letter in "abcdefghijklmnopqrstuvwxyz"]
    lines = str(AuditError(many)).splitlines()
    assert len(lines) == SHOWN + 2
    assert lines[-1] == f"- and {26 - SHOWN} findings more"
    assert str(AuditError(many[:1])).startswith("the audit found 1 mismatch with")


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1.0])
def test_the_factor_now_in_force_is_compared(factor: float) -> None:
    run = live()
    set_rates(run.optimizer, factor)
    assert not findings(run.model, run.optimizer, run.plan, factor=factor)
    (finding,) = findings(run.model, run.optimizer, run.plan, factor=factor + 0.1)
    assert finding.quantity == "learning rate"


def test_a_rate_of_zero_beside_others_is_found() -> None:
    run = live()
    run.group(MATRIX)["lr"] = 0.0
    assert {finding.found for finding in run.findings()} == {0.0}


def test_tensors_that_are_still_on_the_meta_device_are_found() -> None:
    run = live()
    run.model = run.model.to("meta")
    found = findings(run.model, tiny_optimizer(run.model, run.plan), run.plan, at_init=True)
    assert {finding.found for finding in found} == {"none"}


# --------------------------------------------------------------------------------------------------- what is left alone
@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize("width", [16, 48, 128])
def test_a_fresh_run_of_any_table_width_and_seed_is_correct(table: str, width: int) -> None:
    shape = ModelConfig(width=width, depth=3, head_size=16, tied=not TABLES[table].untied, positions="learned")
    plan = tiny_plan(shape, table)
    for seed in range(3):
        model = tiny_decoder(shape, plan, seed)
        assert not Live(model, tiny_optimizer(model, plan), plan, factor=1.0).findings()


@pytest.mark.parametrize("table", ["mup", "btlm"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_a_fresh_run_of_any_dtype_is_correct(dtype: torch.dtype, table: str) -> None:
    plan = tiny_plan(TIED, table)
    model = tiny_decoder(TIED, plan, dtype=dtype)
    assert not Live(model, tiny_optimizer(model, plan), plan).findings()


def test_every_seed_s_draw_lies_within_the_interval() -> None:
    """1,000 draws of each kind: the interval is wide enough, and the standard errors are right."""
    for table in ("mup", "btlm"):
        row = tiny_plan(TIED, table).parameters[EMBEDDING]
        draws = torch.stack([initial_tensor(row, torch.Size([VOCAB * 64]), seed) for seed in range(1000)])
        errors = (draws.std(dim=1, correction=0) - row.init_std_realised) / standard_error(row, VOCAB * 64)
        assert errors.abs().max() < Z
        assert errors.std().item() == pytest.approx(1.0, abs=0.1)  # 4.5 of its own standard errors


def test_the_kurtosis_of_the_truncated_normal_follows_from_its_moments() -> None:
    density, mass = math.exp(-2.0) / math.sqrt(2.0 * math.pi), math.erf(math.sqrt(2.0))
    variance = 1.0 - 4.0 * density / mass
    assert math.sqrt(variance) == pytest.approx(TRUNCATED_STD_RATIO, rel=1e-12)
    fourth = 3.0 * variance - 16.0 * density / mass
    assert {NORMAL: 3.0, TRUNCATED_NORMAL: pytest.approx(fourth / variance**2, rel=1e-9)} == KURTOSIS


def test_a_run_in_progress_is_correct_and_no_longer_initial() -> None:
    run = live()
    tiny_train(run.model, run.optimizer, 8)
    run.at_init = False
    assert not run.findings()
    run.at_init = True
    assert {finding.quantity for finding in run.findings()} & {"initial value", "initial std"}


def test_a_copied_run_is_correct() -> None:
    run = copy.deepcopy(live())
    assert not run.findings()


@pytest.mark.parametrize("kind", ["AdamW", "per tensor", "rates as tensors", "unnamed"])
def test_groups_of_any_form_are_correct(kind: str) -> None:
    run = live()
    if kind == "per tensor":
        run.regroup(run.plan)
    elif kind == "rates as tensors":
        for group in run.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"])
    elif kind == "unnamed":
        keys = ("params", "lr", "weight_decay", "eps", "betas")
        run.optimizer = torch.optim.AdamW([{k: g[k] for k in keys} for g in run.optimizer.param_groups])
    assert not run.findings()


def test_adam_without_any_decay_needs_no_decoupling() -> None:
    run = live()
    rows = {name: replace(row, weight_decay=0.0) for name, row in run.plan.parameters.items()}
    run.plan = replace(run.plan, parameters=rows)
    run.regroup(run.plan)
    keys = ("params", "lr", "weight_decay", "eps", "betas")
    run.optimizer = torch.optim.Adam([{k: g[k] for k in keys} for g in run.optimizer.param_groups])
    assert not run.findings()


@pytest.mark.parametrize("wrap", [nn.parallel.DataParallel, AveragedModel])
def test_a_wrapped_model_is_correct(wrap: Any) -> None:
    run = live()
    ids_BT = torch.arange(12)[None]
    wrapped = wrap(run.model)
    optimizer = tiny_optimizer(wrapped.module, run.plan)
    audit(wrapped, optimizer, run.plan, at_init=True, forward=lambda: wrapped(ids_BT))


def test_a_compiled_model_is_judged_without_compiling_it_again() -> None:
    run, compilations = live(), []
    ids_BT = torch.arange(12)[None]

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled: Any = torch.compile(run.model, backend=backend)
    compiled(ids_BT)
    before = len(compilations)
    assert before > 0
    audit(compiled, run.optimizer, run.plan, at_init=True, forward=lambda: compiled(ids_BT))
    run.model.output_multiplier.value *= 2
    found = findings(compiled, run.optimizer, run.plan, forward=lambda: compiled(ids_BT))
    assert [finding.tensor for finding in found] == ["output_multiplier"] * 2  # its value, and what it does
    assert len(compilations) == before


def test_a_site_that_multiplies_by_one_at_every_shape_may_be_absent() -> None:
    run = live()
    for name in ("attn_multiplier", "mlp_multiplier"):
        for i in range(TIED.depth):
            run.model.set_submodule(f"h.{i}.{name}", nn.Identity())
    assert not run.findings()


def test_a_site_that_multiplies_by_one_at_this_shape_only_may_not() -> None:
    plan = tiny_plan(BASE)
    one = replace(plan.multipliers["output"], value=1.0)
    plan = replace(plan, multipliers={**plan.multipliers, "output": one})
    model = tiny_decoder(BASE, plan)
    model.set_submodule("output_multiplier", nn.Identity())
    (finding,) = findings(model, tiny_optimizer(model, plan), plan)
    assert finding.quantity == "number of multipliers output"


def test_one_multiplier_may_serve_all_blocks() -> None:
    run = live()
    shared = run.model.get_submodule("h.0.attn.logit_multiplier")
    for i in range(TIED.depth):
        run.model.set_submodule(f"h.{i}.attn.logit_multiplier", shared)
    assert not run.findings()


class Dropped(nn.Module):
    """Calls a module and passes its own input on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        self.inner(x)
        return x


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_multiplier_whose_input_comes_by_name_is_watched_as_any_other(factor: float) -> None:
    class Named(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, width), nn.Linear(width, 1)
            self.scale = Multiplier("output")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.scale(x=factor * self.first(x)))

    result = Family(Named, 8, 16).at(32)
    model = result.build(seed=0)
    optimizer, forward = result.optimizer(model), lambda: model(torch.ones(2, 4))
    assert not list(findings(model, optimizer, result.plan, forward=forward))
    model.get_submodule("scale").forward = lambda x: x
    assert [found.diagnosis for found in findings(model, optimizer, result.plan, forward=forward)] == [
        "the output is not the input times the plan's value"
    ]


def test_a_multiplier_whose_result_is_dropped_in_one_block_only_is_found() -> None:
    run = live()
    run.model.set_submodule("h.1.mlp_multiplier", Dropped(run.model.get_submodule("h.1.mlp_multiplier")))
    (finding,) = run.findings()
    assert (finding.tensor, finding.found) == ("h.1.mlp_multiplier.inner", "without effect")


class UsedBut(nn.Module):
    """Calls a module, and passes its own input on at one of the calls."""

    def __init__(self, inner: nn.Module, dropped: int) -> None:
        super().__init__()
        self.inner, self.dropped, self.calls = inner, dropped, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input at the dropped call, counted over forward passes of as many calls as there are blocks."""
        self.calls += 1
        multiplied: torch.Tensor = self.inner(x)
        return x if (self.calls - 1) % TIED.depth == self.dropped else multiplied


@pytest.mark.parametrize("block", range(TIED.depth))
def test_a_multiplier_that_serves_all_blocks_and_is_dropped_in_one_is_found(block: int) -> None:
    run = live()
    shared = UsedBut(run.model.get_submodule("h.0.mlp_multiplier"), block)
    for i in range(TIED.depth):
        run.model.set_submodule(f"h.{i}.mlp_multiplier", shared)
    (finding,) = run.findings()
    assert (finding.tensor, finding.quantity) == ("h.0.mlp_multiplier.inner", "multiplier residual.mlp")
    assert finding.found == f"without effect at call {block + 1} of {TIED.depth}"


def unheld(*parts: slice, without: int = -1) -> list[Finding]:
    result = Family(lambda width: Unheld(width, *parts, without=without), 16, 32).at(64)
    assert result.plan.multipliers["residual.mlp"].tensor == "layers.*.mlp.weight"
    model, ids = result.build(seed=0), torch.arange(5)
    return findings(model, result.optimizer(model), result.plan, at_init=True, forward=lambda: model(ids))


def test_a_shared_multiplier_may_have_calls_with_nothing_to_multiply() -> None:
    """As of experts that no token is sent to."""
    assert not unheld(slice(None), slice(None))
    assert not unheld(slice(None), slice(0))


def test_a_multiplier_of_the_whole_model_must_be_called_in_every_block() -> None:
    (finding,) = unheld(slice(None), slice(None), slice(None), without=1)
    assert (finding.quantity, finding.expected, finding.found) == ("calls of multiplier residual.mlp", "3", "2")


# -------------------------------------------------------------------------------------------------------- the scheduler
def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    return lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=40, cycle_momentum=False)


def cyclic(optimizer: torch.optim.Optimizer) -> Any:
    peaks = [group["peak_lr"] for group in optimizer.param_groups]
    return lr_scheduler.CyclicLR(optimizer, [p / 9 for p in peaks], peaks, mode="exp_range", cycle_momentum=False)


def sequential(optimizer: torch.optim.Optimizer) -> Any:
    after = lr_scheduler.CosineAnnealingLR(optimizer, 60)
    return lr_scheduler.SequentialLR(optimizer, [warm_up(optimizer), after], [5])


class Counting:
    """A rate with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return 1.0 / (1 + step)


RELATIVE: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1.0, step / 10)),
    "LambdaLR with a state": lambda o: lr_scheduler.LambdaLR(o, Counting()),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 50, eta_min=0),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 30),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([warm_up(o), lr_scheduler.ExponentialLR(o, 0.99)]),
    "OneCycleLR with the peaks": one_cycle,
    "CyclicLR with the peaks": cyclic,
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 9]),
    "ExponentialLR to underflow": lambda o: lr_scheduler.ExponentialLR(o, 0.1),
    "MultiplicativeLR to underflow": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.4),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 20),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.99),
}


def state(value: Any) -> Any:
    """Everything that a scheduler or an optimizer keeps, as plain data."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: state(inner) for key, inner in value.items() if key != "params"}
    if isinstance(value, (list, tuple)):
        return [state(inner) for inner in value]
    if isinstance(value, (lr_scheduler.LRScheduler, Counting)):
        return {key: state(inner) for key, inner in vars(value).items() if key != "optimizer"}
    return value


@pytest.mark.parametrize("name", RELATIVE)
@pytest.mark.parametrize("tensors", [False, True], ids=["floats", "tensors"])
def test_a_scheduler_that_keeps_the_ratios_is_correct_at_every_step_and_untouched(name: str, tensors: bool) -> None:
    run = live()
    if tensors:
        for group in run.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    run.scheduler = RELATIVE[name](run.optimizer)
    for step in range(40):  # to the last that OneCycleLR takes
        before = state(run.scheduler), state(run.optimizer.param_groups)
        if step % 12 in (0, 2):
            assert not findings(run.model, run.optimizer, run.plan, run.scheduler), step
        assert (state(run.scheduler), state(run.optimizer.param_groups)) == before
        run.optimizer.step()
        run.scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert not findings(run.model, run.optimizer, run.plan, run.scheduler)


def test_rates_in_single_precision_are_run_ahead_in_double() -> None:
    run = live(replace(TIED, width=48))  # rates in the ratio 3, which float32 cannot hold
    for group in run.optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"])
    run.scheduler = lr_scheduler.ExponentialLR(run.optimizer, 0.999)
    assert not findings(run.model, run.optimizer, run.plan, run.scheduler)


class Experts(nn.Module):
    """x + multiplier · mean of four expert layers: one multiplier to several tensors of a block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(4))
        self.branch = Multiplier("residual.mlp")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) → (B, D)."""
        return x + self.branch(sum(expert(x) for expert in self.experts) / 4)


class Mixture(nn.Module):
    """Two blocks of experts between an embedding and an output."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.scale = nn.Embedding(7, width), Multiplier("output")
        self.layers = nn.ModuleList(Experts(width) for _ in range(2))
        self.head = nn.Linear(width, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B,) → logits (B, 7)."""
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.scale(x))


class Unheld(nn.Module):
    """Blocks whose one multiplier is the model's, each for a part of the tokens; one of them may go without it."""

    def __init__(self, width: int, *parts: slice, without: int = -1) -> None:
        super().__init__()
        self.embed, self.scale, self.branch = nn.Embedding(7, width), Multiplier("output"), Multiplier("residual.mlp")
        self.layers = nn.ModuleList(nn.ModuleDict({"mlp": nn.Linear(width, width)}) for _ in parts)
        self.head = nn.Linear(width, 7, bias=False)
        self.parts, self.without = parts, without

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B,) → logits (B, 7)."""
        x = self.embed(ids)
        for i, (layer, part) in enumerate(zip(self.layers, self.parts, strict=True)):
            assert isinstance(layer, nn.ModuleDict)
            added = layer["mlp"](x[part])
            added = added if i == self.without else self.branch(added)
            x = torch.cat([x[part] + added, x[len(added) :]])
        return self.head(self.scale(x))


class Flat(nn.Module):
    """Experts alone, in no block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.moe, self.scale = nn.Embedding(7, width), Experts(width), Multiplier("output")
        self.head = nn.Linear(width, 7, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Ids (B,) → logits (B, 7)."""
        return self.head(self.scale(self.moe(self.embed(ids))))


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def test_one_multiplier_in_each_block_or_at_an_end_is_enough_however_the_tensors_are_called() -> None:
    experts: Family[int] = Family(Mixture, 16, 32)
    flat: Family[int] = Family(Flat, 16, 32)
    layers: Family[int] = Family(perceptron, 16, 32, sites={"output": "4"})
    for family, example in ((experts, torch.arange(5)), (flat, torch.arange(5)), (layers, torch.ones(5, 3))):
        result = family.at(64)
        model = result.build(seed=0)
        given: Any = {"at_init": True, "forward": lambda m=model, x=example: m(x)}
        assert not findings(model, result.optimizer(model), result.plan, **given)
    model = experts.at(64).build(seed=0)
    model.set_submodule("layers.1.branch", nn.Identity())
    plan = experts.at(64).plan
    branch = replace(plan.multipliers["residual.mlp"], value=0.5, formula="1 / m_L")
    plan = replace(plan, multipliers={**plan.multipliers, "residual.mlp": branch})
    model.get_submodule("layers.0.branch").value = 0.5  # type: ignore[assignment]
    found = findings(model, experts.at(64).optimizer(model), plan, forward=lambda: model(torch.arange(5)))
    assert [finding.quantity for finding in found] == ["calls of multiplier residual.mlp"]


def test_a_scheduler_that_cannot_be_run_ahead_is_said_to_be_so() -> None:
    class Waiting(lr_scheduler.LambdaLR):
        def step(self, metric: float | None = None) -> None:
            if self.last_epoch >= 0 and metric is None:
                raise TypeError("step() needs a metric")
            super().step()

    run = live()
    run.scheduler = Waiting(run.optimizer, lambda step: 1.0)
    (finding,) = findings(run.model, run.optimizer, run.plan, run.scheduler)
    assert "needs a metric" in str(finding)


# --------------------------------------------------------------------------------------------------- it leaves no trace
class Noisy(nn.Module):
    """A model with dropout, a running mean and a counter that its forward pass moves."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder, self.dropout, self.norm = decoder, nn.Dropout(0.5), nn.BatchNorm1d(VOCAB, affine=False)
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))
        self.decoder.h[0].eval()

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.calls += 1
        torch.rand(3)
        return self.norm(self.dropout(self.decoder(ids_BT)).flatten(0, 1))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def trace(model: nn.Module) -> list[Any]:
    tensors = [tensor.clone() for tensor in model.state_dict().values()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    return [torch.get_rng_state(), *tensors, modes(model), hooks]


@pytest.mark.parametrize("fails", [False, True])
def test_a_forward_check_leaves_modes_buffers_generators_and_hooks_as_they_were(fails: bool) -> None:
    run = live()
    model = Noisy(run.model)
    ids_BT = torch.arange(12)[None]
    own = modes(model)
    seen: list[torch.Tensor] = []

    def forward() -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert modes(model) == (own if not seen else [False] * len(own))  # its own mode once, then evaluation
        seen.append(ids_BT)
        result: torch.Tensor = model(ids_BT)
        if fails:
            raise KeyError("in the forward pass")
        return result

    plan = replace(
        run.plan, parameters={f"decoder.{n}": replace(r, name=f"decoder.{n}") for n, r in run.plan.parameters.items()}
    )
    before = trace(model)
    with pytest.raises(KeyError) if fails else warnings.catch_warnings():
        findings(model, tiny_optimizer(run.model, run.plan), plan, at_init=True, forward=forward)
    assert len(seen) == 1 if fails else len(seen) > 2
    assert all(a == b if isinstance(a, list) else torch.equal(a, b) for a, b in zip(before, trace(model), strict=True))


def test_an_audited_run_has_the_losses_of_an_unaudited_one_bit_for_bit() -> None:
    one, other = live(), live()
    ids_BT = torch.arange(12)[None]
    records = []
    for step in range(6):
        audit(one.model, one.optimizer, one.plan, at_init=step == 0, forward=lambda: one.model(ids_BT))
        records += tiny_train(one.model, one.optimizer, step + 1, start_step=step)
    assert records == tiny_train(other.model, other.optimizer, 6)
    assert same_parameters(one.model, other.model)


def test_a_forward_that_returns_nothing_is_refused() -> None:
    run = live()
    with pytest.raises(Refusal, match=r"forward= returned no tensor; return the model's output"):
        findings(run.model, run.optimizer, run.plan, forward=lambda: None)


# ---------------------------------------------------------------------------------------------------------------- names
@pytest.mark.parametrize(
    ("raw", "bare"),
    [
        ("h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.weight"),
        ("module.h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.weight"),
        ("_orig_mod.module.wte.weight", "wte.weight"),
        ("h.0._orig_mod.attn.c_proj.bias", "h.0.attn.c_proj.bias"),
        ("h.0.mlp.parametrizations.weight.original", "h.0.mlp.weight"),
        ("parametrizations.weight.original", "weight"),
        ("modules.weight", "modules.weight"),
        ("parametrizations.weight.original0", "parametrizations.weight.original0"),
    ],
)
def test_a_canonical_name_is_the_one_without_wrappers(raw: str, bare: str) -> None:
    assert canonical_name(raw) == bare


# ------------------------------------------------------------------------------------------------------- second opinion
@contextmanager
def on_meta() -> Iterator[None]:
    with torch.device("meta"):
        yield


def opinion(shape: ModelConfig, table: str, change: Callable[[Any], Any] = lambda plan: plan) -> list[Finding]:
    plan = change(tiny_plan(shape, table))
    base = replace(BASE, depth=shape.depth, activation=shape.activation, tied=shape.tied, positions=shape.positions)
    sites = dict.fromkeys(plan.multipliers, 1.0)
    with on_meta():
        shapes = (base, replace(base, width=2 * base.width, ffn_width=2 * base.ffn), shape)
        models = [Decoder(s, VOCAB, sites) for s in shapes]
    return second_opinion(plan, *models)


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize(
    "shape",
    [TIED, replace(TIED, tied=False), replace(TIED, activation="gelu", positions="learned"), replace(BASE, depth=2)],
    ids=["tied", "untied", "gelu", "base"],
)
def test_mup_is_of_the_plan_s_opinion_where_its_rules_apply(table: str, shape: ModelConfig) -> None:
    assert opinion(replace(shape, tied=shape.tied and not TABLES[table].untied), table) == []


@pytest.mark.parametrize(
    ("key", "quantity"), [("lr_mult", "multiplier of lr"), ("wd_mult", "multiplier of weight_decay")]
)
def test_mup_is_of_another_opinion_where_a_fan_in_is_wrong(key: str, quantity: str) -> None:
    def change(plan: Any) -> Any:
        row = plan.parameters[MATRIX]
        return replace(plan, parameters={**plan.parameters, MATRIX: replace(row, **{key: 0.5})})

    (finding,) = opinion(TIED, "mup", change)
    assert (finding.tensor, finding.quantity, finding.found) == (MATRIX, quantity, 0.5)
    assert opinion(TIED, "sp", change) == []


class Native(nn.Module):
    """Two blocks of torch's own attention, whose inside no function mode sees."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.embedding, self.output = nn.Embedding(50, width), Multiplier("embedding"), Multiplier("output")
        self.h = nn.ModuleList(NativeBlock(width) for _ in range(2))
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(self.embed(ids))
        for block in self.h:
            x = block(x)
        logits: Tensor = self.head(self.output(x))
        return logits


class NativeBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 8, batch_first=True)
        self.scale = Multiplier("attention_logits")
        self.wo = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        attended: Tensor = self.attn(self.scale(x), x, x, need_weights=False)[0]
        return x + self.wo(attended)


def test_nan_reaches_the_result_through_torch_s_own_attention_too() -> None:
    """Its fused kernel for CPUs makes zeros of queries that are NaN, in short sequences."""
    roles: dict[str, Role | str] = {
        "*.in_proj_weight": Role("hidden", fan_in=1),
        "*.out_proj.weight": "hidden",
        "*.wo.weight": "residual_output",
    }
    family = parametrize(Native, base=32, delta=64, target=128, head_size=8, roles=roles)
    model, ids = Native(128), torch.randint(50, (2, 8))
    family.place(model)
    family.initialise(model, 0)
    assert findings(model, family.optimizer(model), family.plan, forward=lambda: model(ids)) == []
