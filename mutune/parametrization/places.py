"""Where a model multiplies: the modules of each site, the tensors that they act on, and the sites that lack one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mutune.errors import Refusal, require
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.plan import TensorSpec
from mutune.parametrization.roles import check_patterns
from mutune.parametrization.rules import Site, Table
from mutune.parametrization.survey import Survey, Tensor, block_of, blocks

#: The one site that may be left to the model: its value follows the head size alone.
LOGITS = "attention_logits"
#: The sites of residual branches, and what modules of such a branch have in their names.
_BRANCHES = {"residual.attn": ("attn", "attention"), "residual.mlp": ("mlp", "ffn", "feed_forward", "feedforward")}
_PROPOSALS = {LOGITS: "*.q_proj", "residual.attn": "*.attn", "residual.mlp": "*.mlp", "output": "lm_head"}


@dataclass(frozen=True)
class Place:
    """A module of a site: one that the user named (its output is multiplied), or one whose child is a Multiplier."""

    module: str
    named: bool


def places_of(found: Survey, sites: Mapping[str, str]) -> dict[str, list[Place]]:
    """Site → places: the Multipliers in the model's code, and the modules that the user's patterns name.

    Raises:
        Refusal: a pattern that matches nothing, or a site that has a Multiplier already.
    """
    places = {
        site: [Place(name.rpartition(".")[0], named=False) for name in names]
        for site, names in found.multipliers.items()
    }
    for site, pattern in sites.items():
        require(
            site not in places,
            f"sites names {pattern} for {site}, where the model already has a Multiplier; leave one of them out.",
        )
        check_patterns(f"sites[{site!r}]", {pattern: None}, list(found.modules), "module")
        places[site] = [Place(name, named=True) for name in found.modules if fnmatchcase(name, pattern)]
    return places


def sites_of(
    found: Survey, roles: Mapping[str, str], in_block: Mapping[str, bool], places: Mapping[str, list[Place]]
) -> dict[str, tuple[str, ...]]:
    """Tensor → the sites that act on its product: at both ends by role, inside blocks by the module that multiplies."""
    sites = {name: _end_sites(found.tensors[name], role, in_block[name]) for name, role in roles.items()}
    tables = [name for name, role in roles.items() if role == "embedding" and not in_block[name]]
    if "output" in places and tables and not any("output" in held for held in sites.values()):
        sites[tables[0]] = ("embedding", "output")  # tied in the forward pass: the table is the output
    matrices = [name for name, tensor in found.tensors.items() if len(tensor.shape) > 1]
    for site in places.keys() - {"embedding", "output"}:
        for place in places[site]:
            target = _acted_on(site, place, matrices, in_block)
            sites[target] = tuple(dict.fromkeys((*sites[target], site)))
    return sites


def _end_sites(tensor: Tensor, role: str, in_block: bool) -> tuple[str, ...]:
    tied = all(any(issubclass(owner, end) for owner in tensor.owners) for end in (nn.Embedding, nn.Linear))
    if tied:
        return ("embedding", "output")
    if role == "output":
        return ("output",)
    return ("embedding",) if role in ("embedding", "position_embedding") and not in_block else ()


def _acted_on(site: str, place: Place, matrices: list[str], in_block: Mapping[str, bool]) -> str:
    """The matrix whose product a site inside a block multiplies: what `multipliers.csv` shows.

    `attention_logits`: the first matrix below its module, or below the module that holds its Multiplier. Others: the
    last one, below the holder's child that the site is called after (`residual.attn` → `attn`) where there is one. Both
    of the matrices whose names say what is multiplied, where there are any: the whole model may hold one Multiplier.
    """
    child = f"{place.module}.{site.rpartition('.')[2]}".removeprefix(".")
    modules = [place.module] if place.named else [child, place.module]
    while modules[-1]:
        modules.append(modules[-1].rpartition(".")[0])
    below = next(found for found in ([m for m in matrices if _below(m, module)] for module in modules) if found)
    words = _BRANCHES.get("residual.attn" if site == LOGITS else site, ())
    below = [m for m in below if in_block[m] and any(word in m.lower() for word in words)] or below
    return below[0] if site == LOGITS else below[-1]


def _below(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")


def check_sites(table: Table, places: Iterable[str], specs: Iterable[TensorSpec]) -> None:
    """Refuse a place of a site that the table does not have, or that no trained tensor stands at."""
    held = {site for spec in specs for site in spec.sites}
    for site in places:
        require(
            site in table.sites,
            f"the model multiplies at site {site}, which table {table.name} does not have; its sites: "
            f"{list(table.sites)}.",
        )
        require(
            site in held,
            f"the model multiplies at site {site}, and no trained tensor stands there; take the multiplier out, or "
            f"name the tensor's role, for example roles={{'lm_head.weight': 'output'}}.",
        )


def absent_branches(found: Survey, placed: Iterable[str]) -> set[str]:
    """The sites of residual branches that the model does not have, by the names in its blocks; never all of them."""
    known, placed = blocks(found.tensors.values()), set(placed)
    names = [name.lower() for name in found.modules if block_of(name, known) is not None]
    there = {site for site, words in _BRANCHES.items() if any(word in name for word in words for name in names)}
    there |= {"residual.attn"} if LOGITS in placed else set()
    return _BRANCHES.keys() - (placed & _BRANCHES.keys() | there or {"residual.mlp"})


def unplaced_sites(
    table: Table,
    placed: Iterable[str],
    absent: Iterable[str],
    hyperparameters: BaseHyperparameters,
    proposals: Mapping[str, str],
) -> tuple[str, ...]:
    """The sites left to the model; nothing stands at the absent ones.

    Raises:
        Refusal: a site without a place whose number depends on the shape or is not 1.
    """
    unplaced = []
    for name, site in table.sites.items():
        alpha = getattr(hyperparameters, site.hyperparameter) if site.hyperparameter else 1.0
        if name in placed or name in absent or (alpha == 1.0 and not (site.width or site.depth or site.head)):
            continue
        if name == LOGITS and alpha == 1.0:
            unplaced.append(name)
            continue
        easier = ", or, untied, take table=mup_table3, which needs none" if name == "output" and alpha == 1.0 else ""
        raise Refusal(
            f"table {table.name} multiplies at site {name} by {site.formula}, and the model has no place for it; "
            f"{_without(name, site, alpha)}put mutune.Multiplier({name!r}) into its code, or name the module whose "
            f"output it multiplies, for example sites={{{name!r}: {proposals.get(name, 'block.module')!r}}}{easier}."
        )
    return tuple(unplaced)


def _without(name: str, site: Site, alpha: float) -> str:
    """The hyperparameter whose 1 needs no place, where that is what is in the way."""
    if alpha == 1.0 or (name != LOGITS and (site.width or site.depth or site.head)):
        return ""
    key = f"hyperparameters.{site.hyperparameter}"
    return f"take {key}=1 in place of {alpha:g}, which needs none, or "


def proposals(found: Survey, specs: Iterable[TensorSpec]) -> dict[str, str]:
    """Site → the module that a refusal proposes for it: where the embedding and the output matrix live."""
    known = dict(_PROPOSALS)
    for spec in specs:
        tensor = found.tensors[spec.name]
        for name, owner in zip(tensor.names, tensor.owners, strict=True):
            for site, end in (("embedding", nn.Embedding), ("output", nn.Linear)):
                if site in spec.sites and issubclass(owner, end):
                    known[site] = name.rpartition(".")[0]
    return known
