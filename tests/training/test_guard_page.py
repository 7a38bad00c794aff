"""docs/guard.md says what the code says."""

import dataclasses

from mutune.certificate.config import Overrides
from mutune.training.alarms import KINDS, GuardConfig
from mutune.training.config import LoopConfig
from mutune.training.schedule import ScheduleConfig
from tests.training.guard_page import PAGE, alarms, filled, settings


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert filled(page) == page
    assert alarms() in page
    assert settings() in page


def keys(cls: type, prefix: str) -> set[str]:
    return {f"{prefix}.{field.name}" for field in dataclasses.fields(cls)}


def test_advice_names_keys_that_the_target_s_commands_have() -> None:
    known = keys(GuardConfig, "guard") | {"guard.policy=rollback"}  # of train, and those of transfer:
    for group, cls in (
        ("hyperparameters", Overrides),
        ("target.loop", LoopConfig),
        ("target.schedule", ScheduleConfig),
    ):
        known |= keys(cls, group)
    for name, kind in KINDS.items():
        words = [word.strip(",;.()`") for word in f"{kind.means} {kind.advice}".split()]
        groups = ("hyperparameters.", "loop.", "schedule.", "guard.", "target.")
        named = [word for word in words if word.startswith(groups)]
        assert set(named) <= known, name
