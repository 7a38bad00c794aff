"""Wrong tables: every exponent of every rule and site of a table moved by one half, one at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from mutune.model.shape import ModelConfig
from mutune.parametrization.hyperparameters import BaseHyperparameters
from mutune.parametrization.rules import NORMAL, TRUNCATED_NORMAL, Table
from mutune.verification.check import plans_of
from mutune.verification.coordinates import measure
from mutune.verification.subjects import DecoderSubject, Text
from mutune.verification.verdict import DEPTH, WIDTH, Judgement, judge, slopes

VOCAB = 1024
WIDTHS = (128, 256, 512)
DEPTHS = (2, 4, 8, 16)
#: The stream starts with RMS 1; every role of every table is in the model, but for a block's inputs.
HYPER = BaseHyperparameters(learning_rate=2**-7, init_std=0.08, embedding_multiplier=12.5)
PLAIN = replace(HYPER, embedding_multiplier=1.0)
EVERY_ROLE = ModelConfig(width=32, depth=2, positions="learned", max_positions=64, tied=False)
DEEP = ModelConfig(width=64, depth=2)


@dataclass(frozen=True)
class Mutant:
    """A wrong table.

    Attributes:
        what: which exponent was moved, and by how much.
        table: the table with it.
        axis: over which it shows.
    """

    what: str
    table: Table
    axis: str


def mutants(table: Table) -> Iterator[Mutant]:
    """Every exponent that the table's rules and sites have, plus and minus one half."""
    for role, rule in table.rules.items():
        random = rule.init in (NORMAL, TRUNCATED_NORMAL)
        columns = ["std"] * random + ["lr", "eps"] + ["wd"] * rule.decayed
        if "depth" in table.transfers_over and role in ("input", "hidden", "residual_output", "gain", "bias"):
            columns += ["lr_depth", "eps_depth"]
        for column in columns:
            for by in (-0.5, 0.5):
                wrong = replace(rule, **{column: getattr(rule, column) + by})
                axis = DEPTH if column.endswith("depth") else WIDTH
                rules = {**table.rules, role: wrong}
                yield Mutant(f"{role}.{column} {by:+g}", replace(table, rules=rules), axis)
    for site, place in table.sites.items():
        columns = ["width"] + ["depth"] * ("depth" in table.transfers_over and site.startswith("residual"))
        for column in columns + ["head"] * (site == "attention_logits"):
            for by in (-0.5, 0.5):
                wrong_site = replace(place, **{column: getattr(place, column) + by})
                axis = DEPTH if column == "depth" else WIDTH
                sites = {**table.sites, site: wrong_site}
                yield Mutant(f"site {site}.{column} {by:+g}", replace(table, sites=sites), axis)


def judged(
    table: Table,
    axis: str = WIDTH,
    seed: int = 0,
    hyperparameters: BaseHyperparameters = HYPER,
    model: ModelConfig | None = None,
    text: Text | None = None,
    widths: tuple[int, ...] = WIDTHS,
) -> Judgement:
    """One seed of a coordinate check of `table`, in this process."""
    model = model or (EVERY_ROLE if axis == WIDTH else DEEP)
    subject = DecoderSubject(axis, model, table, hyperparameters, VOCAB)
    sizes = widths if axis == WIDTH else DEPTHS
    found = [c for size in sizes for c in measure(subject, size, seed, text or Text())]
    return judge(axis, slopes(found), plans_of(subject, sizes))
