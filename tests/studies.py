"""A finished study without its trials: the two files that a transfer reads, written by the code that writes them."""

from pathlib import Path

from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from mutune.compose import compose
from mutune.config import SweepConfig
from mutune.data.prepare import prepare
from mutune.folders import claim
from mutune.search.results import write_best
from mutune.search.trial import trial_spec

SWEEP = ["+sweep=smoke", "run.num_steps=20", "search.n_trials=2"]
RATE = 2.0**-6


def write_study(out: Path, name: str, *arguments: str) -> Path:
    """`SWEEP` as if it had finished with the learning rate `RATE`; returns the study's folder."""
    config = compose("sweep", SweepConfig, [*SWEEP, *arguments, f"study={name}"])
    folder = out / "sweeps" / name
    folder.mkdir(parents=True)
    inputs = {"config": config.identity(), "data_hash": prepare(config.data, config.tokenizer).content_hash}
    claim(folder, inputs, "study", overwrite=False)
    best = create_trial(
        state=TrialState.COMPLETE,
        value=6.5,
        params={"learning_rate": RATE},
        distributions={"learning_rate": FloatDistribution(0.002, 0.25, log=True)},
        user_attrs={"bits_per_byte": 3.2},
    )
    best.number = 0
    write_best(folder, name, best, trial_spec(config.spec(), best.params).hyperparameters)
    return folder
