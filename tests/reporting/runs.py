"""Hand-made run folders, as the doors leave them, with losses that a reader can compute."""

import json
from pathlib import Path
from typing import Any

import yaml

VOCAB_SIZE = 1024
NUM_STEPS = 20
HYPERPARAMETERS = {
    "learning_rate": 2.0**-6,
    "init_std": 0.08,
    "embedding_multiplier": 1.0,
    "output_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": None,
}


def write_run(
    directory: Path,
    *,
    loss: float = 4.0,
    width: int = 32,
    table: str = "mup",
    seed: int = 0,
    note: dict[str, Any] | None = None,
    contexts: tuple[int, ...] = (128,),
    **hyperparameters: float,
) -> Path:
    """A finished run of `NUM_STEPS` steps of 4 sequences per context, falling from 7 to `loss` at the end."""
    stages = [{"context_length": c, "batch_sequences": 4, "num_steps": NUM_STEPS, "end_ratio": None} for c in contexts]
    run = {
        "model": {"width": width, "depth": 4},
        "parametrization": {"table": table},
        "hyperparameters": {**HYPERPARAMETERS, **hyperparameters},
        "stages": stages,
        "seed": seed,
    }
    directory.mkdir(parents=True)
    config = {**(note or {}), "data_hash": "0", "vocab_size": VOCAB_SIZE, "run": run}
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records(loss, contexts)))
    return directory


def records(loss: float, contexts: tuple[int, ...]) -> list[dict[str, Any]]:
    """The records of `write_run`."""
    made: list[dict[str, Any]] = []
    total = NUM_STEPS * len(contexts)
    for step in range(1, total + 1):
        context = contexts[(step - 1) // NUM_STEPS]
        record = {"step": step, "tokens": (made[-1]["tokens"] if made else 0) + 4 * context}
        record |= {"loss": 7.0 + (loss - 7.0) * step / total, "lr": 0.01 * step / total, "grad_norm": 1.0}
        record |= {"diverged": False, "context_length": context}
        if step % NUM_STEPS == 0:
            record |= {"heldout_loss": record["loss"], "heldout_bits_per_byte": record["loss"] / 2}
        made.append(record | {"seconds": 0.5 * step})
    return made


def cut(directory: Path, steps: int, torn: str = "") -> Path:
    """Keep the first `steps` records, as if the run were still going; `torn` is a half-written line."""
    path = directory / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:steps]) + torn)
    return directory


def diverge(directory: Path, *losses: float) -> Path:
    """End the run after these training losses, the last of which left the bounds."""
    path = directory / "metrics.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()[: len(losses)]]
    for record, loss in zip(kept, losses, strict=True):
        record |= {"loss": loss, "diverged": record is kept[-1]}
    path.write_text("".join(json.dumps(record) + "\n" for record in kept))
    return directory


def write_search(directory: Path, losses: tuple[float, ...] = (5.0, 4.5, 4.8, 4.2)) -> Path:
    """A study that searched the learning rate and the initial standard deviation; trial i has `losses[i]`."""
    for number, loss in enumerate(losses):
        note = {"study": directory.name, "trial": number}
        point: dict[str, Any] = {"learning_rate": 2.0 ** -(5 + number % 3), "init_std": 0.05 * (1 + number)}
        write_run(directory / "trials" / str(number), loss=loss, note=note, **point)
    write_space(
        directory, {"learning_rate": {"low": 0.001, "high": 0.1}, "init_std": {"low": 0, "high": 1, "log": False}}
    )
    return directory


def write_valleys(
    directory: Path,
    optima: dict[str, dict[int, float]],
    *,
    seeds: tuple[int, ...] = (0,),
    folder: str = "trials",
    exponents: tuple[int, ...] = (-9, -8, -7, -6, -5),
) -> Path:
    """A grid whose losses are exact parabolas: table → width → log2 of the best rate; 0.1 nats at an octave."""
    number = 0
    for table, by_width in optima.items():
        for width, optimum in by_width.items():
            for seed in seeds:
                for exponent in exponents:
                    note = {"study": directory.name, "trial": number}
                    loss = 4.0 + 0.01 * seed + 1.0 / width + 0.1 * (exponent - optimum) ** 2
                    facts: dict[str, Any] = {"loss": loss, "width": width, "table": table, "seed": seed, "note": note}
                    write_run(directory / folder / str(number), learning_rate=2.0**exponent, **facts)
                    number += 1
    values = {"width": sorted(next(iter(optima.values()))), "table": list(optima), "seed": list(seeds)}
    space: dict[str, Any] = {name: {"values": listed} for name, listed in values.items()}
    write_space(directory, space | {"learning_rate": {"values": [2.0**e for e in exponents]}}, sampler="grid")
    return directory


def write_space(directory: Path, space: dict[str, Any], sampler: str = "tpe") -> None:
    """The study's own configuration."""
    search = {"space": space, "sampler": sampler}
    config = {"inputs": {"config": {"search": search}, "data_hash": "0"}, "versions": {}}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
