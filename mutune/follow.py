"""A sweep that goes on from a finished study: its run, its best values, and a space around them."""

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mutune.compose import build, plain
from mutune.config import SweepConfig
from mutune.errors import Refusal, require, require_number, shown
from mutune.folders import differences
from mutune.parametrization.hyperparameters import NAMES
from mutune.search.config import SCHEDULE, WHERE
from mutune.training.config import RunSpec

if TYPE_CHECKING:
    from mutune.search.config import Dimension

#: What the sweep itself decides; all else is the study's.
OWN = (
    "out",
    *WHERE,
    "seed",
    "device",
    "dry_run",
    "overwrite",
    "study",
    "follows",
    "search",
    "status",
    "for_target",
    "prices",
)
OCTAVES, DECAY = "octaves", "decay"  # of a space: {octaves: 2} reaches two octaves to either side of the best


def follow(config: SweepConfig, words: Sequence[str] = ()) -> SweepConfig:
    """The sweep that `config.follows` asks for, of the study that `config.study` names, as a study of its own.

    Args:
        words: the command line; what it sets must be the sweep's own.

    Raises:
        Refusal: no such study, or one without a proxy of its own; a key that the study decides; a space that cannot be
            placed around its best.
    """
    from mutune.search.results import check_best, load_study
    from mutune.search.study import DECAY_NAMES, finished_trials
    from mutune.search.trial import trial_spec

    name = str(config.study)
    _check_own(config, name, words)
    study = load_study(Path(config.out) / "sweeps", name)
    try:
        stored = build(SweepConfig, study.config)
    except Refusal as refusal:
        raise Refusal(f"study={name}: its config.yaml is damaged ({refusal}); run its sweep again.") from refusal
    best = trial_spec(stored.spec(), study.best.params)
    check_best(study, stored.search.space, best.hyperparameters, best.schedule)
    odd = next((key for key in ("width", "seed") if key in stored.search.space), None)
    require(
        odd is None,
        f"study={name} searched over {odd}, so it has no proxy of its own; use another, for example study=proxy.",
    )
    reads = DECAY_NAMES[1] if best.parametrization.decay == "horizon" else DECAY_NAMES[0]
    if config.follows == "refine" and not config.search.space:
        trials = finished_trials(study.directory, name, stored.search.storage)
        space = _narrowed(name, stored, best, [trial for trial, _ in trials])
    else:
        space = {(reads if key == DECAY else key): data for key, data in config.search.space.items()}
    seeded = any(word.partition("=")[0] == "seed" for word in words)
    return replace(
        config,
        study=f"{name}-{config.follows}",
        seed=config.seed if seeded else stored.seed,
        model=best.model,
        data=stored.data,
        tokenizer=stored.tokenizer,
        parametrization=best.parametrization,
        hyperparameters=best.hyperparameters,
        schedule=best.schedule,
        run=stored.run,
        loop=stored.loop,
        search=replace(config.search, space={key: _placed(key, data, best) for key, data in space.items()}),
    )


def _check_own(config: SweepConfig, name: str, words: Sequence[str]) -> None:
    """Refuse a key that the followed study decides, on the command line or in the sweep's file."""
    given = [word.lstrip("+~").partition("=")[0] for word in words]
    for key in given:
        if key.partition(".")[0] not in (*OWN, "sweep"):
            raise Refusal(_is_the_study_s(key, name, config))
    others = [field.name for field in fields(config) if field.name not in OWN]
    said, default = plain(config), plain(SweepConfig())
    changed = differences({key: default[key] for key in others}, {key: said[key] for key in others})
    if changed:
        raise Refusal(_is_the_study_s(changed[0].partition(":")[0], name, config))


def _is_the_study_s(key: str, name: str, config: SweepConfig) -> str:
    return (
        f"{key} is that of study={name}, which +sweep={config.follows} goes on from; leave it out, or sweep another "
        "study first."
    )


def _placed(name: str, data: Any, best: RunSpec) -> Any:
    """A range with `octaves` as one with bounds; others as they are."""
    if name in SCHEDULE and isinstance(data, dict) and isinstance(data.get("values"), list):
        own = getattr(best.schedule, SCHEDULE[name])  # so that the first trial is the study's best
        return {"values": [*data["values"], *([] if own in data["values"] else [own])]}
    if not isinstance(data, dict) or OCTAVES not in data:
        return data
    key, octaves = f"search.space.{name}", data[OCTAVES]
    require(list(data) == [OCTAVES], f"{key} has octaves and something else; for example {key}={{octaves: 2}}.")
    require_number(f"{key}.octaves", octaves, above=0, at_most=10, example=2)
    require(name in NAMES, f"{key}.octaves={octaves} is for base hyperparameters; list its values instead.")
    value = getattr(best.hyperparameters, name)
    require(
        isinstance(value, float) and value > 0,
        f"{key}.octaves={octaves} has nothing to reach from, since the study's best {name} is {shown(value)}; for "
        f"example {key}={{low: 0.001, high: 0.1}}.",
    )
    return {"low": value * 2.0**-octaves, "high": value * 2.0**octaves}


def _narrowed(name: str, stored: SweepConfig, best: RunSpec, trials: Sequence[Any]) -> dict[str, Any]:
    """The study's own ranges, each around the best as wide as its curvature asks for, and no wider than before.

    Listed values stay with the best one.
    """
    from mutune.search.config import dimensions
    from mutune.search.economics import local_model

    space = [dimension for dimension in dimensions(stored.search.space) if not dimension.values]
    local = local_model(space, trials)
    if not space or local is None:
        why = f"has {len(trials)} finished trials, too few to measure how the loss curves"
        why = "searched no range that could be narrowed" if not space else why
        why = why if trials else "has a storage that is gone or cannot be read, so that nothing is known of its trials"
        raise Refusal(
            f"study={name} {why}; give the space yourself, for example '+search.space.learning_rate={{octaves: 1}}'."
        )
    return {dimension.name: _around(dimension, best, local.reach(dimension.name)) for dimension in space}


def _around(dimension: "Dimension", best: RunSpec, reach: float) -> dict[str, Any]:
    """A range of `reach` octaves, or of so many quarters of a linear range, to either side of the best."""
    assert dimension.low is not None
    assert dimension.high is not None
    centre = float(getattr(best.hyperparameters, dimension.name))
    if dimension.log:
        low, high = centre * 2.0**-reach, centre * 2.0**reach
    else:
        quarter = (dimension.high - dimension.low) / 4
        low, high = centre - reach * quarter, centre + reach * quarter
    return {"low": max(dimension.low, low), "high": min(dimension.high, high), "log": dimension.log}
