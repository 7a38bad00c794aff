"""Real ladders of this model: runs of `+sweep=valley` (its multipliers) at other widths, under other tables and rules.

They are stored under `curves/` by `store_curves`, so that they are judged anew whenever the fit changes.
"""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pandas as pd

from mutune.certificate.rungs import place
from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.model import decoder
from mutune.model.alibi import alibi_slopes
from mutune.parametrization.rules import MUP, TABLES, Rule, Table
from mutune.training import run
from mutune.training.config import RunSpec
from mutune.training.run import run_to_end

LADDER, HIDDEN = (32, 48, 64, 96, 128), 256
OFFSETS = (-2, -1, 0, 1, 2)  # octaves around 2^-6
STORED = Path(__file__).parent / "curves"


def _ruled(role: str, **changes: Any) -> Table:
    rule: Rule = replace(MUP.rules[role], **changes)
    return replace(MUP, rules={**MUP.rules, role: rule})


def _hidden(**changes: Any) -> Table:
    table = _ruled("hidden", **changes)
    return replace(table, rules={**table.rules, "residual_output": table.rules["hidden"]})


def _site(name: str, **changes: Any) -> Table:
    return replace(MUP, sites={**MUP.sites, name: replace(MUP.sites[name], **changes)})


#: A rule broken → the table; the first three have to get NO-GO.
BROKEN = {
    "hidden rate unscaled": _hidden(lr=0.0),
    "hidden rate 1/√m": _hidden(lr=-0.5),
    "hidden rate 1/m²": _hidden(lr=-2.0),
    "hidden init unscaled": _hidden(std=0.0),
    "output multiplier unscaled": _site("output", width=0.0),
    "embedding rate × m": _ruled("embedding", lr=1.0),
    "embedding rate 1/m": _ruled("embedding", lr=-1.0),
}
MUST_FAIL = tuple(BROKEN)[:3]


class Work(NamedTuple):
    """One run: under which table or broken rule, octaves from 2^-6, where its records go, further words of the sweep,
    and whether heads have even slopes at any number, which ALiBi gives to powers of two alone."""

    rule: str
    width: int
    offset: float
    seed: int
    folder: str
    words: tuple[str, ...] = ()
    even: bool = False


def even_slopes(heads: int) -> list[float]:
    """2^(-8i/H), whether or not H is a power of two."""
    return [2.0 ** (-8.0 * (i + 1) / heads) for i in range(heads)]


def train(work: Work) -> dict[str, Any]:
    """Make a run; returns a row of points."""
    rule, width, offset, seed, folder, words, even = work
    asked = ["+sweep=valley", f"parametrization={rule if rule in TABLES else 'mup'}", *words]
    proxy: RunSpec = compose("sweep", SweepConfig, asked).spec()
    hyper = replace(proxy.hyperparameters, learning_rate=2.0 ** (offset - 6))
    spec = replace(proxy, model=proxy.model.at_width(width), hyperparameters=hyper, seed=seed)
    name = "-".join(map(str, (rule, width, offset, seed, even, *words))).replace("/", "-")
    with (
        patch.object(decoder, "alibi_slopes", even_slopes if even else alibi_slopes),
        patch.dict(TABLES, {"mup": BROKEN.get(rule, MUP)}),
        patch.object(run, "second_opinion_of", lambda spec, plan: []),  # the audit would stop a broken rule
    ):
        result = run_to_end(spec, Path(folder) / name, "cpu", {})
    loss = math.nan if result.diverged else result.value
    points = {"learning_rate": 2.0 ** (offset - 6), "seed": seed, "loss": loss, "diverged": result.diverged}
    return {"table": rule, **place(spec), **points}


def trained(runs: Iterable[Work]) -> pd.DataFrame:
    """Points of these runs, the widest first, on all cores."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return pd.DataFrame(list(pool.map(train, sorted(runs, key=lambda work: -work.width))))
