"""A table applied to one shape of a user's model, and the functions that put it on a live one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mutune.errors import require
from mutune.parametrization import apply
from mutune.parametrization.arguments import shown_value
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.plan import Plan, TensorSpec
from mutune.parametrization.rules import Table
from mutune.parametrization.sites import place

#: Options of an optimizer that its groups have from the plan → the hyperparameter that they come from.
PLANNED = {"lr": "learning_rate", "weight_decay": "weight_decay", "eps": "adam_eps"}


@dataclass(frozen=True)
class Parametrized:
    """A table applied to one shape of a family: plain numbers, and the functions that put them on a live model.

    Every function takes the model bare or wrapped (DDP, FSDP2, `torch.compile`, an average, a parametrization).

    Attributes:
        plan: per-tensor and per-site values, keyed by canonical name.
        specs: the tensors that the plan is about.
        sites: site → pattern of the modules that `initialise` makes multiply; other sites are in the model's code.
        unplaced: sites of the table that are left to the model; only `attention_logits` may be.
        hyperparameters: the values at the base.
        table: the parametrization.
        make: builds the model at this shape, as the user's `build` leaves it.
    """

    plan: Plan
    specs: tuple[TensorSpec, ...]
    sites: Mapping[str, str]
    unplaced: tuple[str, ...]
    hyperparameters: BaseHyperparameters
    table: Table
    make: Callable[[], nn.Module]

    def place(self, model: nn.Module) -> None:
        """Give the model its multipliers with the plan's values: all that a resumed model needs beside its state.

        Raises:
            Refusal: a site of the plan that the model, unlike the one that was planned, has no place for.
        """
        apply.check_model(model)
        place(model, self.sites)
        held = {module.site for module in model.modules() if isinstance(module, Multiplier)}
        for site, row in self.plan.multipliers.items():
            require(
                site in held or row.value == 1.0,
                f"the model has no multiplier at site {site}, where the plan has {row.value:g}; build it as the family "
                f"does.",
            )
        apply.set_multipliers(model, self.plan)

    def initialise(self, model: nn.Module, seed: int) -> None:
        """Initial values and multipliers; a pure function of (plan, seed), whatever the device, dtype or sharding.

        Raises:
            Refusal: other tensors than the plan's (a tie lost by `to_empty`, say), or parameters on the meta device.
        """
        self.place(model)
        apply.initialise(model, self.plan, seed)

    def build(self, seed: int) -> nn.Module:
        """The model at this shape, initialised."""
        model = self.make()
        self.initialise(model, seed)
        return model

    def optimizer_groups(self, model: nn.Module) -> list[dict[str, object]]:
        """Ordinary `torch.optim.AdamW` groups, with `peak_lr` beside `lr`."""
        return apply.optimizer_groups(model, self.plan)

    def optimizer(
        self,
        model: nn.Module,
        family: type[torch.optim.Optimizer] = torch.optim.AdamW,
        *,
        betas: tuple[float, float] | None = None,
        **options: Any,
    ) -> torch.optim.Optimizer:
        """An optimizer of the table's family over the groups; `betas` are those of the hyperparameters by default.

        Raises:
            Refusal: a family that the table's rates are not for; coupled decay, which no table has a rule for; an
                option that the plan sets.
        """
        require(
            isinstance(family, type),
            f"optimizer {shown_value(family)} must be a class of optimizers; for example torch.optim.AdamW.",
        )
        for name, key in PLANNED.items():
            require(
                name not in options,
                f"optimizer has {name}={shown_value(options.get(name))}, which the plan sets for each tensor; give "
                f"hyperparameters={{{key!r}: {shown_value(options.get(name))}}} to parametrize instead.",
            )
        require(
            issubclass(family, torch.optim.Adam | torch.optim.AdamW),
            f"optimizer {family.__name__} is not of the family of table {self.table.name}, whose rates are for "
            f"{self.table.optimizer}; take torch.optim.AdamW.",
        )
        decayed = any(row.weight_decay for row in self.plan.parameters.values())
        require(
            issubclass(family, torch.optim.AdamW) or not decayed,
            f"optimizer {family.__name__} couples weight decay with the gradient, and table {self.table.name} rules "
            f"decoupled decay; take torch.optim.AdamW, or hyperparameters.weight_decay=0.",
        )
        chosen = betas or (self.hyperparameters.beta1, self.hyperparameters.beta2)
        make: Any = family
        optimizer: torch.optim.Optimizer = make(self.optimizer_groups(model), betas=chosen, **options)
        return optimizer
