"""The table side of the mutation matrix, and false alarms: the full counts, by `make soak`."""

import multiprocessing
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mutune.data.config import TokenizerConfig
from mutune.model.shape import ModelConfig
from mutune.parametrization.rules import BTLM, MUP, MUP_TABLE3, MUP_TABLE9, SP, SP_EMBED, TABLES, Table, completep
from mutune.search.workers import default_workers
from mutune.verification.subjects import Text
from mutune.verification.verdict import WIDTH
from tests import doors, soak
from tests.verification.mutants import EVERY_ROLE, HYPER, Mutant, judged, mutants

#: Mutants that are the same theory, or no bug: they must not be caught, and why.
SYMMETRIES = {
    "site attention_logits.head -0.5": "d_head is the same at every width, so its power is a constant",
    "site attention_logits.head +0.5": "d_head is the same at every width, so its power is a constant",
}
#: Seen where ε is judged, through the gradient; without it no fault: logits of order 1 at init instead of m^-1/2.
HARMLESS = {
    ("btlm", "output.std +0.5"): "logits start at order 1 instead of m^-1/2, which arXiv:2404.05728 finds harmless"
}

#: The exponents of every table, written down from the papers beside `rules.py`: role → std, lr, eps, wd.
MATRIX, END = (-0.5, -1.0, -1.0, 1.0), (0.0, 0.0, -1.0, 0.0)
VECTOR, NOTHING = (0.0, 0.0, -1.0, 0.0), (0.0, 0.0, 0.0, 0.0)
HALFWAY = (-0.5, -0.5, -0.5, 0.5)
MUP_RULES = {"embedding": END, "position_embedding": END, "hidden": MATRIX, "residual_output": MATRIX, "output": END}
MUP_RULES |= {"input": END, "gain": VECTOR, "bias": VECTOR}
GOLDEN = {
    "sp": dict.fromkeys(MUP_RULES, NOTHING),
    "sp_embed": {
        **dict.fromkeys(MUP_RULES, NOTHING),
        "embedding": (0.0, 1.0, 0.0, 0.0),
        "position_embedding": (0.0, 1.0, 0.0, 0.0),
    },
    "mup": MUP_RULES,
    "mup_table3": {**MUP_RULES, "output": (-1.0, -1.0, 0.0, 1.0)},
    "mup_table9": {**MUP_RULES, "embedding": HALFWAY, "position_embedding": HALFWAY, "output": HALFWAY},
    "btlm": {
        **dict.fromkeys(MUP_RULES, NOTHING),
        "hidden": (-0.5, -1.0, 0.0, 0.0),
        "residual_output": (-0.5, -1.0, 0.0, 0.0),
    },
    "completep": MUP_RULES,
}
#: site → exponents of m, d_head and m_L.
SITES = {
    "embedding": (0.0, 0.0, 0.0),
    "attention_logits": (0.0, -1.0, 0.0),
    "residual.attn": (0.0, 0.0, 0.0),
    "residual.mlp": (0.0, 0.0, 0.0),
    "output": (-1.0, 0.0, 0.0),
}
SP_SITES = {**SITES, "attention_logits": (0.0, -0.5, 0.0), "output": (0.0, 0.0, 0.0)}
GOLDEN_SITES = {
    "sp": SP_SITES,
    "sp_embed": SP_SITES,
    "mup": SITES,
    "mup_table3": {**SITES, "output": (0.0, 0.0, 0.0)},
    "mup_table9": {**SITES, "embedding": (0.5, 0.0, 0.0), "output": (-0.5, 0.0, 0.0)},
    "btlm": SITES,
    "completep": {**SITES, "residual.attn": (0.0, 0.0, -1.0), "residual.mlp": (0.0, 0.0, -1.0)},
}


def is_golden(table: Table) -> bool:
    """Whether every exponent of the table is the one written down here."""
    rules = {role: (rule.std, rule.lr, rule.eps, rule.wd) for role, rule in table.rules.items()}
    inside = [(rule.lr_depth, rule.eps_depth) for role, rule in table.rules.items() if role in INSIDE]
    outside = [(rule.lr_depth, rule.eps_depth) for role, rule in table.rules.items() if role not in INSIDE]
    depth = (0.0, -1.0) if table.name == "completep" else (0.0, 0.0)
    sites = {name: (site.width, site.head, site.depth) for name, site in table.sites.items()}
    return (
        rules == GOLDEN[table.name]
        and sites == GOLDEN_SITES[table.name]
        and set(inside) == {depth}
        and set(outside) == {(0.0, 0.0)}
    )


INSIDE = ("input", "hidden", "residual_output", "gain", "bias")


def test_every_exponent_of_every_table_is_the_one_written_down_here() -> None:
    assert set(GOLDEN) == set(TABLES)
    assert all(is_golden(table) for table in TABLES.values())


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_mutant_of_every_table_breaks_a_golden_exponent(table: Table) -> None:
    assert not [mutant.what for mutant in mutants(table) if is_golden(mutant.table)]


def test_a_wrong_decay_exponent_breaks_the_constancy_of_rate_times_decay() -> None:
    """In μP, lr + wd is one exponent for everything that is decayed; moved placements keep it."""
    for table in (MUP, MUP_TABLE3, MUP_TABLE9, completep()):
        assert {rule.lr + rule.wd for rule in table.rules.values() if rule.decayed} == {0.0}
        for mutant in mutants(table):
            if ".wd" in mutant.what:
                assert {rule.lr + rule.wd for rule in mutant.table.rules.values() if rule.decayed} != {0.0}


@dataclass(frozen=True)
class Case:
    """One table to judge."""

    table: Table
    mutant: Mutant
    axis: str


def cases() -> Iterator[Case]:
    """What slopes are asked to see: mutants of μP in three placements, BTLM's rates and stds, CompleteP's depth."""
    for table in (MUP, MUP_TABLE3, MUP_TABLE9, BTLM, completep()):
        for mutant in mutants(table):
            column = mutant.what.split()[-2].rpartition(".")[2]
            if column == "wd" or (table.name == "btlm" and column == "eps"):
                continue  # a wrong decay does not show in ten steps; BTLM does not scale ε, so its ε is not judged
            if mutant.what.startswith("input."):
                continue  # the decoder has no such tensor; `test_check.py` has a model that does
            if table.name in ("mup", "btlm") or moved_by(table, mutant):
                yield Case(table, mutant, mutant.axis)


def moved_by(table: Table, mutant: Mutant) -> bool:
    """Whether the mutant's rule or site is not μP's own."""
    if table.name == "completep":
        return mutant.axis != WIDTH
    subject = mutant.what.split()[-2].rpartition(".")[0].removeprefix("site ")
    if mutant.what.startswith("site"):
        return table.sites[subject] != MUP.sites[subject]
    return table.rules[subject] != MUP.rules[subject]


def judge_case(case: Case) -> dict[str, Any]:
    """One row of the matrix."""
    model = replace(EVERY_ROLE, tied=False) if case.axis == WIDTH else None
    findings = judged(case.mutant.table, case.axis, model=model).findings
    why = SYMMETRIES.get(case.mutant.what) or HARMLESS.get((case.table.name, case.mutant.what))
    row = {
        "table": case.table.name,
        "mutant": case.mutant.what,
        "axis": case.axis,
        "caught": "by slopes" if findings else "no",
    }
    return row | {"first finding": findings[0].diagnosis if findings else (why or "**missed**")}


@pytest.mark.soak
def test_soak_the_table_side_of_the_mutation_matrix() -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(judge_case, list(cases()), chunksize=1)
    for table in (SP, SP_EMBED):
        golden = sum(not is_golden(mutant.table) for mutant in mutants(table))
        said = f"{golden} mutants; μP's slopes are not {table.name}'s, so its exponents are held by tests alone"
        rows.append(
            {"table": table.name, "mutant": "all", "axis": "—", "caught": "by golden exponents", "first finding": said}
        )
    for table in TABLES.values():
        decays = [mutant.what for mutant in mutants(table) if ".wd" in mutant.what]
        rows.append(
            {
                "table": table.name,
                "mutant": f"{len(decays)} of weight decay",
                "axis": "—",
                "caught": "by golden exponents",
            }
            | {"first finding": "and, but for sp and btlm, equivalence with another placement and lr + wd = 0"}
        )
    soak.record("../docs/mutations_tables", "Wrong tables, one exponent off by one half, and who catches them", rows)
    assert [row["mutant"] for row in rows if row["first finding"] == "**missed**"] == []
    passed = {(row["table"], row["mutant"]) for row in rows if row["caught"] == "no"}
    assert all(mutant in SYMMETRIES or (table, mutant) in HARMLESS for table, mutant in passed)


def correct_runs(count: int) -> Iterator[dict[str, Any]]:
    """Right tables over seeds, widths, depths, vocabularies, batch sizes, rates and multipliers."""
    draw = random.Random(23)
    for i in range(count):
        table = draw.choice([MUP, MUP, MUP_TABLE3, MUP_TABLE9, BTLM, completep()])
        tied = False if table.untied else draw.random() < 0.6
        depth = draw.choice([2, 3, 4, 6])
        model = ModelConfig(width=32, depth=depth, tied=tied, activation=draw.choice(["swiglu", "gelu"]))
        if draw.random() < 0.3:
            model = replace(model, positions="learned", max_positions=128)
        hyper = replace(
            HYPER,
            learning_rate=2.0 ** draw.choice([-9, -8, -7, -6]),
            init_std=draw.choice([0.05, 0.08, 0.11]),
            embedding_multiplier=draw.choice([1.0, 2.5, 12.5]),
            output_multiplier=draw.choice([1.0, 1.3, 3.0]),
            weight_decay=draw.choice([0.0, 0.1, 0.5]),
        )
        text = Text(
            context_length=draw.choice([32, 64, 128]),
            batch_sequences=draw.choice([4, 8, 16]),
            tokenizer=draw.choice([TokenizerConfig(), TokenizerConfig(kind="bytes")]),
        )
        widths = draw.choice([(128, 256, 512), (96, 192, 384), (112, 224, 448)])
        yield {
            "table": table,
            "seed": 3000 + i,
            "hyperparameters": hyper,
            "model": model,
            "text": text,
            "widths": widths,
        }


def judge_correct(arguments: dict[str, Any]) -> dict[str, Any]:
    """One row of the false alarms."""
    model, hyper, text = arguments["model"], arguments["hyperparameters"], arguments["text"]
    judgement = judged(**arguments)
    row: dict[str, Any] = {"table": arguments["table"].name, "tied": model.tied, "depth": model.depth}
    row |= {"widths": "/".join(map(str, arguments["widths"])), "vocabulary": text.tokenizer.num_ids}
    row |= {"batch": f"{text.batch_sequences}×{text.context_length}", "rate": f"{hyper.learning_rate:g}"}
    row |= {"std, α_emb, α_out": f"{hyper.init_std:g}, {hyper.embedding_multiplier:g}, {hyper.output_multiplier:g}"}
    for quantity in ("activation", "gradient", "weight_update", "update"):
        means = [slope.mean for slope, _ in judgement.judged if slope.quantity == quantity]
        row[quantity] = f"{min(means):+.2f} … {max(means):+.2f}" if means else "—"
    return row | {"false alarm": judgement.findings[0].diagnosis if judgement.findings else ""}


@pytest.mark.soak
def test_soak_no_false_alarm_in_sixty_correct_runs() -> None:
    """One seed each, which is stricter than the command's three. None in n gives a rate below 3/n at 95 %."""
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        rows = pool.map(judge_correct, list(correct_runs(64)), chunksize=1)
    soak.record("check", f"Coordinate checks of {len(rows)} correct runs, one seed each (slopes judged)", rows)
    assert [row["false alarm"] for row in rows if row["false alarm"]] == []


@pytest.mark.soak
def test_soak_how_long_the_default_check_takes(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for name, arguments in (
        ("default: widths 128, 256, 512", []),
        ("completep over depths 2 to 16", ["parametrization=completep", *DEPTH_CHECK]),
        ("examples/llama.py: widths 128, 256, 512", ["family=examples.llama:family"]),
    ):
        seconds = []
        for i in range(3):
            started = time.monotonic()
            doors.run("check", *arguments, f"out={tmp_path / f'{len(rows)}-{i}'}")
            seconds.append(time.monotonic() - started)
        rows.append(
            {"check": name, "median, s": round(statistics.median(seconds)), "of 3 runs": seconds_shown(seconds)}
        )
    soak.record("check_time", f"Wall time of `python -m mutune.check`, 3 seeds, {default_workers()} workers", rows)


DEPTH_CHECK = ["model.width=64", "model.depth=2", "widths=[]", "depths=[2,4,8,16]"]


def seconds_shown(seconds: list[float]) -> str:
    return ", ".join(f"{s:.0f}" for s in sorted(seconds))
