"""Full curves of random trials of `+sweep=proxy`: `python -m tests.search.store_curves FOLDER`, ten minutes on 2 cores.

64 configurations drawn from the sweep's space, two seeds each, 240 steps on the default corpus, none pruned. What is
stored in curves/pruning.csv: the configuration, the training loss averaged over a twentieth of the run at every
twentieth, and the held-out loss at the end. FOLDER keeps the runs themselves, so that a rerun goes on.
"""

import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.search.config import dimensions
from mutune.search.proposals import propose
from mutune.search.study import base_values
from mutune.search.trial import trial_spec
from mutune.training.result import METRICS, smoothing
from mutune.training.run import run_to_end

CONFIGURATIONS, SEEDS = 64, 2
STORED = Path(__file__).parent / "curves" / "pruning.csv"


def curve(folder: Path, work: tuple[int, int, dict[str, Any]]) -> dict[str, Any]:
    """Train one configuration by one seed; its row."""
    number, seed, params = work
    spec = trial_spec(compose("sweep", SweepConfig, ["+sweep=proxy"]).spec(), {**params, "seed": seed})
    result = run_to_end(spec, folder / f"{number}-{seed}", "cpu", {})
    losses = [json.loads(line)["loss"] for line in (folder / f"{number}-{seed}" / METRICS).read_text().splitlines()]
    width = smoothing(spec.num_steps)
    ends = [round(k * spec.num_steps / 20) for k in range(1, 20)]
    means = {f"s{end}": fmean(losses[end - width : end]) if end <= len(losses) else math.nan for end in ends}
    facts = {"configuration": number, "seed": seed, **params, "diverged": result.diverged}
    return {**facts, **means, "heldout": result.value}


def main(folder: Path) -> None:
    """Make the runs and write `STORED`."""
    asked = ["search.sampler=random", "search.initial=[]", f"search.n_trials={CONFIGURATIONS}"]
    config = compose("sweep", SweepConfig, ["+sweep=proxy", *asked, f"search.cohort={CONFIGURATIONS}"])
    space = dimensions(config.search.space)
    points = propose(config.search, space, base_values(config.spec()), 0, [])
    work = [(number, seed, params) for number, params in enumerate(points) for seed in range(SEEDS)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(partial(curve, folder), work))
    pd.DataFrame(rows).round(5).to_csv(STORED, index=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
