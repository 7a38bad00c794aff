"""The applied side of the mutation matrix: every way to alter a live run against its plan, and what must be said of it.

`python -m tests.parametrization.mutations` writes the table into docs/mutations.md.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

from mutune.model.decoder import Decoder
from mutune.model.shape import ModelConfig
from mutune.parametrization.apply import initialise, make_optimizer
from mutune.parametrization.audit import findings
from mutune.parametrization.finding import Finding
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.plan import Plan
from tests.training.tiny import HYPER, VOCAB, tiny_decoder, tiny_optimizer, tiny_plan

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "mutations.md"
HEADING = "## Applied side"
TIED = ModelConfig(width=64, depth=3, head_size=16)
TWO_BLOCKS = replace(TIED, depth=2)
UNTIED = replace(TIED, tied=False)
FIRST_MATRIX, MATRIX = "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"
EMBEDDING, GAIN = "wte.weight", "h.0.ln_1.weight"
BETAS = (HYPER.beta1, HYPER.beta2)


@dataclass
class Live:
    """A run that was just built, as `audit` sees it."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    plan: Plan
    scheduler: Any = None
    factor: float | None = None
    at_init: bool = True
    betas: tuple[float, float] | None = BETAS

    def findings(self) -> list[Finding]:
        """Everything that an audit says, the forward pass included."""
        ids_BT = torch.arange(12).reshape(1, 12) % VOCAB
        return findings(
            self.model,
            self.optimizer,
            self.plan,
            self.scheduler,
            at_init=self.at_init,
            factor=self.factor,
            betas=self.betas,
            forward=lambda: self.model(ids_BT),
        )

    def group(self, name: str) -> dict[str, Any]:
        """The group that holds a parameter."""
        tensor = self.model.get_parameter(name)
        return next(g for g in self.optimizer.param_groups if any(p is tensor for p in g["params"]))

    def regroup(self, plan: Plan) -> None:
        """One group for each tensor, with the values of `plan`."""
        groups = [
            {
                "params": [parameter],
                "lr": plan.parameters[name].peak_lr,
                "weight_decay": plan.parameters[name].weight_decay,
                "eps": plan.parameters[name].adam_eps,
            }
            for name, parameter in self.model.named_parameters()
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=BETAS)

    def set_groups(self, key: str, value: Callable[[Any], Any]) -> None:
        """Give `key` of every group the value of a function of the plan's row of its first tensor."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            group[key] = value(self.plan.parameters[names[group["params"][0]]])


def live(shape: ModelConfig = TIED, table: str = "mup") -> Live:
    """A correct run at four times the base's width."""
    plan = tiny_plan(shape, table)
    model = tiny_decoder(shape, plan)
    return Live(model, tiny_optimizer(model, plan), plan)


@dataclass(frozen=True)
class Mutation:
    """What is altered, and a finding that must be among those that the audit makes."""

    name: str
    apply: Callable[[Live], None] = field(repr=False)
    tensor: str
    quantity: str
    words: str
    shape: ModelConfig = TIED

    def live(self) -> Live:
        """The altered run."""
        run = live(self.shape)
        self.apply(run)
        return run

    def caught(self, found: Sequence[Finding]) -> Finding | None:
        """The finding that must be there."""
        return next(
            (f for f in found if (f.tensor, f.quantity) == (self.tensor, self.quantity) and self.words in f.diagnosis),
            None,
        )


# -------------------------------------------------------------------------------------------------------- the scheduler
def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Callable[[Live], None]:
    def apply(run: Live) -> None:
        run.scheduler = make(run.optimizer)

    return apply


def warm_up(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)


def constant_then_averaged(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 1.0), SWALR(optimizer, swa_lr=0.05)]
    return lr_scheduler.SequentialLR(optimizer, parts, [5000])


def warm_up_then_floor(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    after = lr_scheduler.CosineAnnealingLR(optimizer, 10**6, eta_min=1e-4)
    return lr_scheduler.SequentialLR(optimizer, [warm_up(optimizer), after], [5])


def one_group_decays(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    rates: list[Callable[[int], float]] = [lambda step: 1.0 for _ in optimizer.param_groups]
    rates[1] = lambda step: 1.0 if step < 200 else 0.5
    return lr_scheduler.LambdaLR(optimizer, rates)


def another_s(optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    return lr_scheduler.LambdaLR(copy.deepcopy(optimizer), lambda step: 1.0)


class Absolute(lr_scheduler.LRScheduler):
    """A user's own scheduler that sets one rate for all groups after ten steps."""

    def get_lr(self) -> list[float | Tensor]:
        """The rates of all groups."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return rates if self.last_epoch < 10 else [1e-3 for _ in rates]


# ------------------------------------------------------------------------------------------------ rates, decay, epsilon
def one_rate(run: Live) -> None:
    for group in run.optimizer.param_groups:
        group["lr"] = 0.01


def never_applied(run: Live) -> None:
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=HYPER.learning_rate, betas=BETAS)


def matrices_not_divided(run: Live) -> None:
    for group in run.optimizer.param_groups:
        if run.model.get_parameter(MATRIX) in set(group["params"]):
            group["lr"] = HYPER.learning_rate


def one_group_by_hand(run: Live) -> None:
    run.group(MATRIX)["lr"] *= 3.0


def another_step(run: Live) -> None:
    run.factor = 0.5


def schedule_s_start(run: Live) -> None:
    run.group(MATRIX)["peak_lr"] = HYPER.learning_rate


def checkpoint_of(table: str) -> Callable[[Live], None]:
    """An optimizer's state of the same model under another table, loaded into this one."""

    def apply(run: Live) -> None:
        run.regroup(tiny_plan(TIED, table))
        state = run.optimizer.state_dict()
        run.regroup(run.plan)
        run.optimizer.load_state_dict(state)

    return apply


def setting(key: str, value: Callable[[Any], Any]) -> Callable[[Live], None]:
    return lambda run: run.set_groups(key, value)


# -------------------------------------------------------------------------------------------------------- the optimizer
def missing(run: Live) -> None:
    group = run.group(MATRIX)
    group["params"] = [p for p in group["params"] if p is not run.model.get_parameter(MATRIX)]


def in_two_groups(run: Live) -> None:
    run.group(GAIN)["params"].append(run.model.get_parameter(MATRIX))


def frozen(run: Live) -> None:
    run.model.get_submodule("h.0.mlp.c_fc").requires_grad_(False)


def sgd(run: Live) -> None:
    run.optimizer = torch.optim.SGD([{k: g[k] for k in ("params", "lr")} for g in run.optimizer.param_groups])


def coupled(run: Live) -> None:
    keys = ("params", "lr", "weight_decay", "eps", "betas")
    run.optimizer = torch.optim.Adam([{k: g[k] for k in keys} for g in run.optimizer.param_groups])


def another_model_s(run: Live) -> None:
    run.model = copy.deepcopy(run.model)


def strangers(run: Live) -> None:
    run.group(GAIN)["params"].append(nn.Parameter(torch.zeros(3)))


# ---------------------------------------------------------------------------------------------------------- the tensors
def reset(name: str) -> Callable[[Live], None]:
    def apply(run: Live) -> None:
        torch.manual_seed(0)
        layer: Any = run.model.get_submodule(name)
        layer.reset_parameters()

    return apply


def never_initialised(run: Live) -> None:
    torch.manual_seed(0)
    run.model = Decoder(run.model.shape, VOCAB, {site: row.value for site, row in run.plan.multipliers.items()})
    run.optimizer = make_optimizer(run.model, run.plan, betas=BETAS)


@torch.no_grad()
def ten_percent(run: Live) -> None:
    run.model.get_parameter(MATRIX).mul_(1.1)


@torch.no_grad()
def shifted(run: Live) -> None:
    run.model.get_parameter(MATRIX).add_(0.02)


@torch.no_grad()
def gain_of_zero(run: Live) -> None:
    run.model.get_parameter(GAIN).zero_()


def initialised_by(table: str) -> Callable[[Live], None]:
    return lambda run: initialise(run.model, tiny_plan(TIED, table), seed=0)


def untied(run: Live) -> None:
    head = nn.Linear(TIED.width, VOCAB, bias=False)
    head.weight = nn.Parameter(run.model.wte.weight.detach().clone())
    run.model.lm_head = head


def untied_transposed(run: Live) -> None:
    run.model.register_parameter("head", nn.Parameter(run.model.wte.weight.detach().T.clone()))


def tied_again(run: Live) -> None:
    assert run.model.lm_head is not None
    run.model.lm_head.weight = run.model.wte.weight


def extra_layer(run: Live) -> None:
    run.model.add_module("adapter", nn.Linear(8, 8, bias=False))


def normalised(run: Live) -> None:
    weight_norm(run.model.get_submodule("h.0.mlp.c_fc"))


def another_width(run: Live) -> None:
    other = live(replace(TIED, width=32))
    run.model, run.optimizer = other.model, other.optimizer


# ------------------------------------------------------------------------------------------------------ the multipliers
def forgotten(name: str) -> Callable[[Live], None]:
    def apply(run: Live) -> None:
        run.model.set_submodule(name, nn.Identity())

    return apply


def never_set(run: Live) -> None:
    for module in run.model.modules():
        if isinstance(module, Multiplier):
            module.value = 1.0


def another_value(run: Live) -> None:
    run.model.output_multiplier.value *= 2.0


def another_site(run: Live) -> None:
    run.model.output_multiplier.site = "logits"


class InEvaluationOnly(nn.Module):
    """Uses a module in evaluation and passes its own input on in training."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """The input, or what the module makes of it."""
        return x if self.training else self.inner(x)


def bypassed_in_training(run: Live) -> None:
    run.model.set_submodule("output_multiplier", InEvaluationOnly(run.model.output_multiplier))


def bypassed(run: Live) -> None:
    def forward(self: Decoder, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding_multiplier(self.wte(ids_BT))
        for block in self.h:
            x_BTD = block(x_BTD, self._attention_bias(ids_BT.shape[1], x_BTD.device, x_BTD.dtype))
        return F.linear(self.ln_f(x_BTD), self.wte.weight)

    run.model.forward = MethodType(forward, run.model)  # type: ignore[method-assign]


def discarded(run: Live) -> None:
    def forward(self: Decoder, ids_BT: Tensor) -> Tensor:
        x_BTD = self.embedding_multiplier(self.wte(ids_BT))
        for block in self.h:
            x_BTD = block(x_BTD, self._attention_bias(ids_BT.shape[1], x_BTD.device, x_BTD.dtype))
        x_BTD = self.ln_f(x_BTD)
        self.output_multiplier(x_BTD)
        return F.linear(x_BTD, self.wte.weight)

    run.model.forward = MethodType(forward, run.model)  # type: ignore[method-assign]


def divides(run: Live) -> None:
    module = run.model.output_multiplier
    module.forward = lambda x: x / module.value  # type: ignore[method-assign]


OUTPUT = "output_multiplier"
MUTATIONS = [
    Mutation(
        "OneCycleLR with one max_lr",
        scheduled(lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=100)),
        FIRST_MATRIX,
        "OneCycleLR's max_lr",
        "erases the ratios",
    ),
    Mutation(
        "CyclicLR with one base_lr and one max_lr",
        scheduled(lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.02, cycle_momentum=False)),
        FIRST_MATRIX,
        "CyclicLR's max_lrs",
        "erases the ratios",
    ),
    Mutation(
        "CosineAnnealingLR with eta_min, a million steps long",
        scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 10**6, eta_min=1e-4)),
        FIRST_MATRIX,
        "CosineAnnealingLR's eta_min",
        "erases the ratios",
    ),
    Mutation(
        "CosineAnnealingWarmRestarts with eta_min",
        scheduled(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 50, eta_min=1e-4)),
        FIRST_MATRIX,
        "CosineAnnealingWarmRestarts's eta_min",
        "erases the ratios",
    ),
    Mutation(
        "SequentialLR of a warm-up and a cosine with eta_min",
        scheduled(warm_up_then_floor),
        FIRST_MATRIX,
        "CosineAnnealingLR's eta_min",
        "erases the ratios",
    ),
    Mutation(
        "SWALR with one swa_lr after 5,000 steps",
        scheduled(constant_then_averaged),
        FIRST_MATRIX,
        "SWALR's swa_lr",
        "erases the ratios",
    ),
    Mutation(
        "ReduceLROnPlateau with one min_lr",
        scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, min_lr=1e-4)),
        FIRST_MATRIX,
        "ReduceLROnPlateau's min_lrs",
        "erases the ratios",
    ),
    Mutation(
        "LambdaLR with another function for one group after 200 steps",
        scheduled(one_group_decays),
        GAIN,
        "LambdaLR's learning rate in 200 steps",
        "changes the ratios",
    ),
    Mutation(
        "a scheduler of one's own that sets a rate after 10 steps",
        scheduled(Absolute),
        FIRST_MATRIX,
        "Absolute's learning rate in 10 steps",
        "changes the ratios",
    ),
    Mutation("a scheduler of another optimizer", scheduled(another_s), "optimizer", "scheduler LambdaLR", "go nowhere"),
    Mutation("one rate set by hand in every group", one_rate, MATRIX, "learning rate", "every group has the same rate"),
    Mutation(
        "μP in the configuration, one group of model.parameters()",
        never_applied,
        MATRIX,
        "learning rate",
        "the table was never applied",
    ),
    Mutation("the rate of matrices not divided", matrices_not_divided, MATRIX, "learning rate", "0.25 was not applied"),
    Mutation(
        "rates divided by √m",
        setting("lr", lambda row: HYPER.learning_rate * row.lr_mult**0.5),
        MATRIX,
        "learning rate",
        "only the square root",
    ),
    Mutation(
        "groups applied twice",
        setting("lr", lambda row: row.peak_lr * row.lr_mult),
        MATRIX,
        "learning rate",
        "0.25 was applied twice",
    ),
    Mutation("one group's rate set by hand", one_group_by_hand, MATRIX, "learning rate", "set after the groups"),
    Mutation("the schedule at another step", another_step, EMBEDDING, "learning rate", "at another step"),
    Mutation(
        "the peak that the schedule multiplies", schedule_s_start, MATRIX, "peak_lr", "another plan or checkpoint"
    ),
    Mutation("an optimizer's state of table sp", checkpoint_of("sp"), MATRIX, "learning rate", "never applied"),
    Mutation("an optimizer's state of table btlm", checkpoint_of("btlm"), MATRIX, "Adam's eps", "torch's default"),
    Mutation(
        "an optimizer's state of table sp_embed",
        checkpoint_of("sp_embed"),
        EMBEDDING,
        "learning rate",
        "set after the groups",
    ),
    Mutation("torch's default eps", setting("eps", lambda row: 1e-8), MATRIX, "Adam's eps", "torch's default"),
    Mutation("eps not scaled", setting("eps", lambda row: 1e-12), MATRIX, "Adam's eps", "does not follow"),
    Mutation(
        "decay not scaled",
        setting("weight_decay", lambda row: 0.1 if row.wd_mult else 0.0),
        MATRIX,
        "weight decay",
        "set after the groups",
    ),
    Mutation(
        "decay on gains and biases",
        setting("weight_decay", lambda row: row.weight_decay or 0.1),
        GAIN,
        "weight decay",
        "does not decay this gain",
    ),
    Mutation("betas changed", setting("betas", lambda row: (0.9, 0.999)), "optimizer", "betas", "hyperparameters"),
    Mutation("betas not finite", setting("betas", lambda row: (0.9, float("nan"))), "optimizer", "betas", "not decay"),
    Mutation("maximize", setting("maximize", lambda row: True), "optimizer", "maximize", "goes up the gradient"),
    Mutation("SGD", sgd, "optimizer", "family", "scales rates for Adam"),
    Mutation("Adam with coupled decay", coupled, "optimizer", "weight decay", "does not scale like"),
    Mutation("a tensor missing from the optimizer", missing, MATRIX, "number of optimizer groups", "never updated"),
    Mutation("a tensor in two groups", in_two_groups, MATRIX, "number of optimizer groups", "more than once"),
    Mutation(
        "an optimizer built before the model was copied",
        another_model_s,
        "optimizer",
        "number of the model's tensors in it",
        "copied, converted or wrapped",
    ),
    Mutation(
        "tensors of another model in the optimizer",
        strangers,
        "optimizer",
        "number of tensors that the model does not have",
        "built elsewhere",
    ),
    Mutation("a frozen layer", frozen, MATRIX, "requires_grad", "frozen"),
    Mutation("a layer that the plan does not rule", extra_layer, "adapter.weight", "trainable tensor", "not rule it"),
    Mutation(
        "tying lost",
        untied,
        "lm_head.weight",
        "trainable tensor",
        "tying lost: the plan has it as one tensor with wte.weight",
    ),
    Mutation("tying lost, transposed", untied_transposed, "head", "trainable tensor", "tying lost"),
    Mutation(
        "tied where the plan has two tensors",
        tied_again,
        "lm_head.weight",
        "trainable tensor",
        "shares it with another",
        UNTIED,
    ),
    Mutation("weight_norm after the plan", normalised, MATRIX, "trainable tensor", "lacks it"),
    Mutation("a model of another width", another_width, MATRIX, "shape", "another shape"),
    Mutation("a linear layer reset", reset("h.0.mlp.c_fc"), MATRIX, "initial std", "torch's own initial value"),
    Mutation("an embedding reset", reset("wte"), EMBEDDING, "initial std", "torch's own initial value"),
    Mutation("a bias reset", reset("h.0.mlp.c_fc"), "h.0.mlp.c_fc.bias", "initial value", "not applied"),
    Mutation("a model never initialised", never_initialised, MATRIX, "initial std", "torch's own initial value"),
    Mutation("a model initialised by table sp", initialised_by("sp"), MATRIX, "initial std", "another rule"),
    Mutation("a model initialised by table btlm", initialised_by("btlm"), MATRIX, "initial std", "another rule"),
    Mutation("an initial std off by 10 %", ten_percent, MATRIX, "initial std", "another rule, or changed"),
    Mutation("initial values with a mean", shifted, MATRIX, "initial mean", "not a fresh draw"),
    Mutation("a gain of zero", gain_of_zero, GAIN, "initial value", "not applied"),
    Mutation(
        "the output multiplier forgotten", forgotten(OUTPUT), EMBEDDING, "number of multipliers output", "forgotten"
    ),
    Mutation(
        "an attention multiplier forgotten in one block",
        forgotten("h.1.attn.logit_multiplier"),
        "h.*.attn.c_attn.weight",
        "number of multipliers attention_logits",
        "forgotten",
    ),
    Mutation(
        "an attention multiplier forgotten in one of two blocks",
        forgotten("h.1.attn.logit_multiplier"),
        "h.0.attn.logit_multiplier",
        "calls of multiplier attention_logits",
        "some blocks go without it",
        TWO_BLOCKS,
    ),
    Mutation("multipliers never set", never_set, OUTPUT, "multiplier output", "not set by the plan"),
    Mutation("a multiplier's value changed", another_value, OUTPUT, "multiplier output", "was changed since"),
    Mutation("a multiplier of another site", another_site, OUTPUT, "multiplier logits", "no such site"),
    Mutation("a multiplier that the forward pass goes around", bypassed, OUTPUT, "multiplier output", "goes around it"),
    Mutation(
        "a multiplier that the forward pass goes around in training",
        bypassed_in_training,
        "output_multiplier.inner",
        "multiplier output",
        "goes around it",
    ),
    Mutation("a multiplier whose result is dropped", discarded, OUTPUT, "multiplier output", "then not used"),
    Mutation(
        "a multiplier that divides",
        divides,
        OUTPUT,
        "norm of the output of multiplier output",
        "not the input times",
    ),
]


def applied_table() -> str:
    """The matrix as Markdown, each row with the sentence that the audit says."""
    lines = ["| mutation | caught by | message |", "|---|---|---|"]
    for mutation in MUTATIONS:
        finding = mutation.caught(mutation.live().findings())
        message = "**not caught**" if finding is None else str(finding)
        lines.append(f"| {mutation.name} | {mutation.quantity} | {message} |")
    return "\n".join(lines)


def section(document: str) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, rest = document.split(f"{HEADING}\n", 1)
    start, end = rest.index("| mutation |"), rest.find("\n## ")
    end = len(rest) if end < 0 else end
    return f"{before}{HEADING}\n{rest[:start]}", rest[start:end].rstrip("\n"), rest[end:]


if __name__ == "__main__":
    before, _, after = section(DOCUMENT.read_text())
    DOCUMENT.write_text(f"{before}{applied_table()}\n{after}")
