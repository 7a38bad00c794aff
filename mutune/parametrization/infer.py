"""Any torch model: its plan, initial values and optimizer groups, from a function that builds it at a shape."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from mutune.errors import Refusal, require, require_number
from mutune.parametrization import apply
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.multiplier import Multiplier
from mutune.parametrization.names import matching
from mutune.parametrization.plan import BaseShape, Decay, Plan, TensorPlan, TensorSpec, kind, make_plan
from mutune.parametrization.roles import Role, check_patterns, named_roles, settle
from mutune.parametrization.rules import Table, get_table
from mutune.parametrization.sites import place
from mutune.parametrization.survey import (
    Survey,
    Tensor,
    block_of,
    blocks,
    stack_depths,
    survey,
    with_infinite,
)

Shape = TypeVar("Shape")

#: The site that a table's head-size rule needs and that a model may well have in its own form.
LOGITS = "attention_logits"
_PROPOSALS = {LOGITS: "*.q_proj", "residual.attn": "*.attn", "residual.mlp": "*.mlp", "output": "lm_head"}


@dataclass(frozen=True)
class Parametrized:
    """A table applied to one shape of a family: plain numbers, and the functions that put them on a live model.

    Every function takes the model bare or wrapped (DDP, FSDP2, `torch.compile`, an average, a parametrization).

    Attributes:
        plan: per-tensor and per-site values, keyed by canonical name.
        specs: the tensors that the plan is about.
        sites: site → pattern of the modules that `initialise` makes multiply; other sites are in the model's code.
        unplaced: sites of the table that are left to the model; only `attention_logits` may be.
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
            Refusal: a family that the table's rates are not for; coupled decay, which no table has a rule for.
        """
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


class Family(Generic[Shape]):
    """A model at every shape: which dimensions are widths, which role each tensor has, and where its base is.

    `build(base)` is made on the CPU, since a gain is known by its initial values; every other shape on the meta
    device, which costs nothing. Nothing is kept of any of them.

    Args:
        build: shape → a fresh model; a shape is whatever `build` takes.
        base: the shape at which base hyperparameters live.
        delta: the base with every width changed, and nothing else: what changes is infinite, what does not is finite.
        roles: pattern → role, over what is inferred. Patterns are `fnmatch`'s, on parameter names.
        sites: site → pattern of modules whose output is multiplied, for models without a `Multiplier` there.
            A model that scales attention itself must scale by 1 where `attention_logits` is placed.
        base_fan_in: pattern → a declared base fan-in, real-valued; other tensors have the base's own.
        depth: shape → number of blocks; by default the indices in the names of blocks are counted.
        head_size: d_head, or shape → d_head; needed where `attention_logits` is placed.

    Raises:
        Refusal: shapes that do not change, a tensor whose role cannot be told, a pattern that matches nothing, two that
            match one tensor.
    """

    def __init__(
        self,
        build: Callable[[Shape], nn.Module],
        base: Shape,
        delta: Shape,
        *,
        roles: Mapping[str, Role | str] = {},
        sites: Mapping[str, str] = {},
        base_fan_in: Mapping[str, float] = {},
        depth: Callable[[Shape], int] | None = None,
        head_size: int | Callable[[Shape], int] | None = None,
    ) -> None:
        self.build, self.base, self.delta = build, base, delta
        self.roles, self.sites, self.base_fan_in = dict(roles), dict(sites), dict(base_fan_in)
        self._depth, self._head_size = depth, head_size
        for pattern, value in base_fan_in.items():
            require_number(f"base_fan_in[{pattern!r}]", value, above=0.0, example=682.6)
        with torch.random.fork_rng(devices=[]):
            own = survey(build(base))
        self._base = replace(own, tensors=with_infinite(own, self._survey(delta)))
        self.specs(base)

    def specs(self, shape: Shape) -> list[TensorSpec]:
        """Every distinct trainable tensor of the model at `shape`, with its role, fan-in and sites.

        Raises:
            Refusal: a tensor that the base does not have, or a finite dimension that is not the base's.
        """
        return [spec for spec, _ in self._measured(self._at(shape))]

    def plan(
        self,
        shape: Shape,
        table: str | Table = "mup",
        hyperparameters: BaseHyperparameters = BaseHyperparameters(),
        decay: Decay = Decay(),
    ) -> Plan:
        """The plan at `shape`; see `at`."""
        return self.at(shape, table, hyperparameters, decay).plan

    def at(
        self,
        shape: Shape,
        table: str | Table = "mup",
        hyperparameters: BaseHyperparameters = BaseHyperparameters(),
        decay: Decay = Decay(),
    ) -> Parametrized:
        """The table applied at `shape`, which may be the base: there a proxy is trained.

        Raises:
            Refusal: a role or a site that the table does not have, or a site of the table that has no place.
        """
        theory = get_table(table) if isinstance(table, str) else table
        found = self._at(shape)
        places = self._places(found)
        _check_sites(theory, places)
        specs = tuple(spec for spec, _ in self._measured(found))
        unplaced = _unplaced(theory, set(places), hyperparameters, self._ends(found, specs))
        sizes = {self._head_size_at(s) for s in (self.base, shape)}
        require(
            None not in sizes or LOGITS not in places,
            f"site {LOGITS} is placed, and its value needs the head size; for example head_size=64.",
        )
        require(
            len(sizes) == 1 or LOGITS not in unplaced,
            f"the head size grows with the model, {sorted(sizes, key=str)}, and site {LOGITS}, whose value follows it, "
            f"has no place; put mutune.Multiplier({LOGITS!r}) on the queries, or fix head_size.",
        )
        plan = self._plan(shape, found, theory, hyperparameters, decay)
        return Parametrized(plan, specs, self.sites, unplaced, hyperparameters, theory, partial(self.build, shape))

    def rows(self, shape: Shape, table: Table) -> dict[str, TensorPlan]:
        """The plan's rows of tensors alone, whether or not the table's multipliers have a place; for auditing."""
        return self._plan(shape, self._at(shape), table, BaseHyperparameters(), Decay()).parameters

    def tensors(self, shape: Shape) -> dict[str, Tensor]:
        """The tensors at `shape` as they were found: names, owners, infinite dimensions."""
        return self._at(shape).tensors

    def like(self, name: str) -> Tensor:
        """The base's tensor of that name, or of that name in another block.

        Raises:
            Refusal: there is none, or several that differ.
        """
        if name in self._base.tensors:
            return self._base.tensors[name]
        alike = [tensor for tensor in self._base.tensors.values() if kind(tensor.name) == kind(name)]
        require(bool(alike), f"the base has no {kind(name)}; build base, delta and target with the same switches.")
        require(
            len({(tensor.shape, tensor.infinite) for tensor in alike}) == 1,
            f"the base has no {name}, and its {kind(name)} differ in shape; give the base the same number of blocks.",
        )
        return alike[0]

    def _plan(
        self, shape: Shape, found: Survey, table: Table, hyperparameters: BaseHyperparameters, decay: Decay
    ) -> Plan:
        measured = self._measured(found)
        return make_plan(
            table,
            [spec for spec, _ in measured],
            BaseShape(self._depth_at(self.base, self._base), {spec.name: fan_in for spec, fan_in in measured}),
            hyperparameters,
            depth=self._depth_at(shape, found),
            head_size=self._head_size_at(shape) or 1,  # of no consequence where the site is not placed
            decay=decay,
        )

    def _ends(self, found: Survey, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
        """Site → the module that a refusal proposes for it: where the embedding and the output matrix live."""
        proposals = dict(_PROPOSALS)
        for site, owner in (("embedding", nn.Embedding), ("output", nn.Linear)):
            for spec in specs:
                tensor = found.tensors[spec.name]
                homes = zip(tensor.names, tensor.owners, strict=True)
                here = [name.rpartition(".")[0] for name, kind_of in homes if issubclass(kind_of, owner)]
                if site in spec.sites and here:
                    proposals[site] = here[0]
        return proposals

    def _head_size_at(self, shape: Shape) -> int | None:
        return self._head_size(shape) if callable(self._head_size) else self._head_size

    def _survey(self, shape: Shape) -> Survey:
        with torch.device("meta"):
            return survey(self.build(shape))

    def _at(self, shape: Shape) -> Survey:
        """The survey at `shape`, each tensor with what the base knows of it: infinite dimensions, initial values."""
        found = self._base if shape is self.base else self._survey(shape)
        return replace(found, tensors={name: self._known(tensor) for name, tensor in found.tensors.items()})

    def _known(self, tensor: Tensor) -> Tensor:
        base = self.like(tensor.name)
        fixed = [axis for axis, grows in enumerate(base.infinite) if not grows]
        require(
            len(tensor.shape) == len(base.shape) and all(tensor.shape[axis] == base.shape[axis] for axis in fixed),
            f"{tensor.name} is {_by(tensor.shape)} here and {_by(base.shape)} at the base, in a dimension that does "
            f"not change from base to delta; change it in delta if it is a width, else give the base the same size.",
        )
        return replace(tensor, infinite=base.infinite, constant=base.constant)

    def _measured(self, found: Survey) -> list[tuple[TensorSpec, float]]:
        """Each spec with its base fan-in."""
        tensors = found.tensors
        known = blocks(tensors.values())
        chosen = named_roles(self.roles, tensors)
        settled = {
            name: settle(tensor, chosen.get(name), block_of(name, known) is not None)
            for name, tensor in tensors.items()
        }
        _check_one_output([name for name, (role, _) in settled.items() if role == "output" and name not in chosen])
        sites = self._sites_of(found, {name: role for name, (role, _) in settled.items()}, known)
        declared = self._declared(tensors)
        measured = []
        for name, (role, axes) in settled.items():
            shape = tensors[name].shape
            spec = TensorSpec(
                name=name,
                role=role,
                shape=shape,
                fan_in=math.prod(shape[axis] for axis in axes),
                in_block=block_of(name, known) is not None,
                sites=sites[name],
            )
            own = math.prod(self.like(name).shape[axis] for axis in axes)
            measured.append((spec, declared.get(name, own)))
        return measured

    def _declared(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        check_patterns("base_fan_in", self.base_fan_in, list(tensors), "parameter")
        declared = {}
        for name in tensors:
            hits = matching(self.base_fan_in, [name])
            require(len(hits) <= 1, f"base_fan_in {' and '.join(hits)} both match {name}; keep one of them.")
            if hits:
                declared[name] = self.base_fan_in[hits[0]]
        return declared

    def _depth_at(self, shape: Shape, found: Survey) -> int:
        """L, by the user's function or by counting; the same number in every stack."""
        if self._depth is not None:
            return self._depth(shape)
        stacks = stack_depths(found.tensors, blocks(found.tensors.values()))
        require(
            len(set(stacks.values())) <= 1,
            f"the model's stacks have different numbers of blocks, {stacks}; say which is the depth, for example "
            f"depth=lambda shape: {max(stacks.values(), default=1)}.",
        )
        return next(iter(stacks.values()), 1)

    def _places(self, found: Survey) -> dict[str, list[tuple[str, bool]]]:
        """Site → modules: (name, whether it is the user's named module rather than the holder of a Multiplier)."""
        places: dict[str, list[tuple[str, bool]]] = {
            site: [(name.rpartition(".")[0], False) for name in names] for site, names in found.multipliers.items()
        }
        for site, pattern in self.sites.items():
            require(
                site not in places,
                f"sites names {pattern} for {site}, where the model already has a Multiplier; leave one of them out.",
            )
            hosts = [name for name in found.modules if fnmatchcase(name, pattern)]
            check_patterns(f"sites[{site!r}]", {pattern: None}, list(found.modules), "module")
            places[site] = [(name, True) for name in hosts]
        return places

    def _sites_of(self, found: Survey, roles: Mapping[str, str], known: set[str]) -> dict[str, tuple[str, ...]]:
        """Tensor → sites: the ends by role, the sites in blocks by the module that holds them."""
        sites: dict[str, tuple[str, ...]] = dict.fromkeys(roles, ())
        places = self._places(found)
        outside = [name for name in roles if block_of(name, known) is None]
        for name in outside:
            tied = any(issubclass(owner, nn.Linear) for owner in found.tensors[name].owners)
            if roles[name] in ("embedding", "position_embedding"):
                sites[name] = ("embedding", "output") if tied and len(found.tensors[name].names) > 1 else ("embedding",)
        sites.update({name: ("output",) for name, role in roles.items() if role == "output"})
        tables = [name for name in outside if roles[name] == "embedding"]
        if "output" in places and tables and not any("output" in held for held in sites.values()):
            sites[tables[0]] = ("embedding", "output")  # tied in the forward pass: the table is the output
        matrices = [name for name, tensor in found.tensors.items() if len(tensor.shape) > 1]
        for site in places.keys() - {"embedding", "output"}:
            for holder, named in places[site]:
                target = _acted_on(site, holder, named, matrices)
                sites[target] = tuple(dict.fromkeys((*sites[target], site)))
        return sites


def parametrize(
    build: Callable[[Shape], nn.Module],
    *,
    base: Shape,
    delta: Shape,
    target: Shape,
    table: str | Table = "mup",
    hyperparameters: BaseHyperparameters = BaseHyperparameters(),
    decay: Decay = Decay(),
    roles: Mapping[str, Role | str] = {},
    sites: Mapping[str, str] = {},
    base_fan_in: Mapping[str, float] = {},
    depth: Callable[[Shape], int] | None = None,
    head_size: int | Callable[[Shape], int] | None = None,
) -> Parametrized:
    """Transfer base hyperparameters to a user's own model at `target`. Arguments are those of `Family`.

    Raises:
        Refusal: as `Family` and `Family.at`; and a target that is the base, where nothing transfers (the proxy itself
            is `Family(build, base, delta).at(base)`).
    """
    family = Family(
        build, base, delta, roles=roles, sites=sites, base_fan_in=base_fan_in, depth=depth, head_size=head_size
    )
    result = family.at(target, table, hyperparameters, decay)
    same = [(spec.name, spec.shape) for spec in result.specs] == [(s.name, s.shape) for s in family.specs(base)]
    require(
        not same,
        f"target={target} has the shapes of base={base}, so nothing would be transferred; name a larger target, or "
        f"take Family(build, base, delta).at(base) for the proxy itself.",
    )
    return result


def _acted_on(site: str, holder: str, named: bool, matrices: list[str]) -> str:
    """The matrix whose product a site inside a block multiplies: what `multipliers.csv` shows.

    `attention_logits`: the first matrix below its module, or below the module that holds its Multiplier. Others: the
    last one, below the holder's child that the site is called after (`residual.attn` → `attn`) where there is one.
    """
    child = f"{holder}.{site.rpartition('.')[2]}".removeprefix(".")
    places = [holder] if named else [child, holder]
    while places[-1]:
        places.append(places[-1].rpartition(".")[0])
    below = next(found for found in ([m for m in matrices if _below(m, place)] for place in places) if found)
    return below[0] if site == LOGITS else below[-1]


def _below(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def _check_one_output(outputs: list[str]) -> None:
    require(
        len(outputs) <= 1,
        f"{' and '.join(outputs[:2])} both look like the output; name the role of each, for example "
        f'roles={{"{outputs[0] if outputs else ""}": "output", "{outputs[-1] if outputs else ""}": "hidden"}}.',
    )


def _check_sites(table: Table, places: Mapping[str, object]) -> None:
    for site in places:
        require(
            site in table.sites,
            f"the model multiplies at site {site}, which table {table.name} does not have; its sites: "
            f"{list(table.sites)}.",
        )


def _unplaced(
    table: Table, placed: set[str], hyperparameters: BaseHyperparameters, proposals: Mapping[str, str]
) -> tuple[str, ...]:
    """The sites left to the model.

    Raises:
        Refusal: a site without a place whose number depends on the shape or is not 1.
    """
    unplaced = []
    for name, site in table.sites.items():
        alpha = getattr(hyperparameters, site.hyperparameter) if site.hyperparameter else 1.0
        if name in placed or (alpha == 1.0 and not (site.width or site.depth or site.head)):
            continue
        if name == LOGITS and alpha == 1.0:
            unplaced.append(name)
            continue
        easier = ", or, untied, take table=mup_table3, which needs none" if name == "output" and alpha == 1.0 else ""
        raise Refusal(
            f"table {table.name} multiplies at site {name} by {site.formula}, and the model has no place for it; put "
            f"mutune.Multiplier({name!r}) into its code, or name the module whose output it multiplies, for example "
            f"sites={{{name!r}: {proposals.get(name, 'block.module')!r}}}{easier}."
        )
    return tuple(unplaced)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
