"""Any torch model: its plan, initial values and optimizer groups, from a function that builds it at a shape."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Generic, TypeVar, cast

import torch
from torch import nn

from mutune.errors import Refusal, require, require_number
from mutune.parametrization.arguments import (
    as_decay,
    as_hyperparameters,
    as_table,
    called,
    check_build,
    check_head_size,
    check_options,
    shown_value,
)
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.names import matching
from mutune.parametrization.parametrized import Parametrized
from mutune.parametrization.places import (
    LOGITS,
    absent_branches,
    check_sites,
    places_of,
    proposals,
    sites_of,
    unplaced_sites,
)
from mutune.parametrization.plan import BaseShape, Decay, Plan, TensorPlan, TensorSpec, kind, make_plan
from mutune.parametrization.roles import Role, check_patterns, named_roles, settle
from mutune.parametrization.rules import Table
from mutune.parametrization.survey import Survey, Tensor, block_of, blocks, stack_depths, survey, with_infinite

Shape = TypeVar("Shape")


class Family(Generic[Shape]):
    """A model at every shape: which dimensions are widths, which role each tensor has, and where its base is.

    `build(base)` is made on the CPU, since a gain is known by its initial values; every other shape on the meta
    device, which costs nothing (on the CPU where `build` needs numbers). Nothing is kept of any of them.

    Args:
        build: shape → a fresh model; a shape is whatever `build` takes.
        base: the shape at which base hyperparameters live.
        delta: the base with every width changed, and nothing else: what changes is infinite, what does not is finite.
        roles: pattern → role, over what is inferred. Patterns are `fnmatch`'s, on parameter names.
        sites: site → pattern of modules whose output is multiplied, for models without a `Multiplier` there.
            A model that scales attention itself must scale by 1 where `attention_logits` is placed.
        base_fan_in: pattern → a declared base fan-in, real-valued; other tensors have the base's own.
        depth: shape → number of blocks; by default the indices in the names of blocks are counted. A list of parts that
            stand side by side counts as blocks too where it is not called experts; say then `depth=lambda shape: 1`.
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
        check_build(build)
        check_options(roles, sites, base_fan_in, depth, head_size)
        self.build, self.base, self.delta = build, base, delta
        self.roles, self.sites, self.base_fan_in = dict(roles), dict(sites), dict(base_fan_in)
        self._depth, self._head_size = depth, head_size
        with torch.random.fork_rng(devices=[]):
            own = survey(self._built(base))
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
        hyperparameters: BaseHyperparameters | Mapping[str, float] = BaseHyperparameters(),
        decay: str | Decay = Decay(),
    ) -> Plan:
        """The plan at `shape`; see `at`."""
        return self.at(shape, table, hyperparameters, decay).plan

    def at(
        self,
        shape: Shape,
        table: str | Table = "mup",
        hyperparameters: BaseHyperparameters | Mapping[str, float] = BaseHyperparameters(),
        decay: str | Decay = Decay(),
    ) -> Parametrized:
        """The table applied at `shape`, which may be the base: there a proxy is trained.

        Raises:
            Refusal: a role or a site that the table does not have, or a site of the table that has no place.
        """
        theory, values, rule = as_table(table), as_hyperparameters(hyperparameters), as_decay(decay)
        found = self._at(shape)
        places = places_of(found, self.sites)
        specs = tuple(spec for spec, _ in self._measured(found))
        check_sites(theory, places, specs)
        require(
            not theory.untied or any("output" in spec.sites for spec in specs),
            f"table {theory.name} gives the output its own rule, and the model has no output matrix of its own; take "
            f"table=mup, or name it, for example roles={{'lm_head.weight': 'output'}}.",
        )
        absent = absent_branches(found, places)
        unplaced = unplaced_sites(theory, places, absent, values, proposals(found, specs))
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
        plan = self._plan(shape, found, theory, values, rule)
        return Parametrized(plan, specs, self.sites, unplaced, values, theory, partial(self.build, shape))

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

    def _head_size_at(self, shape: Shape) -> int | None:
        if not callable(self._head_size):
            return self._head_size
        size = called("head_size", self._head_size, shape, "return d_head at every shape")
        check_head_size(size)
        return cast(int | None, size)

    def _survey(self, shape: Shape) -> Survey:
        """On the meta device; on the CPU where the model looks at numbers as it is built."""
        try:
            with torch.device("meta"):
                return survey(self.build(shape))
        except Refusal:
            raise
        except Exception:  # `item()` has no answer there; where it is the model's own fault, the CPU says so too
            with torch.random.fork_rng(devices=[]):
                return survey(self._built(shape))

    def _built(self, shape: Shape) -> nn.Module:
        return called("build", self.build, shape, "make a model at every shape")

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
        return replace(tensor, infinite=base.infinite, start=base.start)

    def _measured(self, found: Survey) -> list[tuple[TensorSpec, float]]:
        """Each spec with its base fan-in."""
        tensors = found.tensors
        known = blocks(tensors.values())
        chosen = named_roles(self.roles, tensors)
        in_block = {name: block_of(name, known) is not None for name in tensors}
        settled = {name: settle(tensor, chosen.get(name), in_block[name]) for name, tensor in tensors.items()}
        _check_one_output([name for name, (role, _) in settled.items() if role == "output" and name not in chosen])
        roles = {name: role for name, (role, _) in settled.items()}
        sites = sites_of(found, roles, in_block, places_of(found, self.sites))
        declared = self._declared(tensors)
        measured = []
        for name, (role, axes) in settled.items():
            shape = tensors[name].shape
            require(
                all(shape[axis] > 0 for axis in axes),
                f"{name} of shape {_by(shape)} has a fan-in of 0; make its size at least 1, or where it is meant to be "
                f"empty, call requires_grad_(False) on it.",
            )
            spec = TensorSpec(
                name=name,
                role=role,
                shape=shape,
                fan_in=math.prod(shape[axis] for axis in axes),
                in_block=in_block[name],
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
            depth = called("depth", self._depth, shape, "return the number of blocks at every shape")
            require_number(f"depth({shown_value(shape)})", depth, above=0.0, example=4)
            return cast(int, depth)
        stacks = stack_depths(found.tensors, blocks(found.tensors.values()))
        require(
            len(set(stacks.values())) <= 1,
            f"the model's stacks have different numbers of blocks, {stacks}; say which is the depth, for example "
            f"depth=lambda shape: {max(stacks.values(), default=1)}.",
        )
        return next(iter(stacks.values()), 1)


def parametrize(
    build: Callable[[Shape], nn.Module],
    *,
    base: Shape,
    delta: Shape,
    target: Shape,
    table: str | Table = "mup",
    hyperparameters: BaseHyperparameters | Mapping[str, float] = BaseHyperparameters(),
    decay: str | Decay = Decay(),
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


def _check_one_output(outputs: list[str]) -> None:
    require(
        len(outputs) <= 1,
        f"{' and '.join(outputs[:2])} both look like the output; name the role of each, for example "
        f'roles={{"{outputs[0] if outputs else ""}": "output", "{outputs[-1] if outputs else ""}": "hidden"}}.',
    )


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
