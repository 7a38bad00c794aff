"""docs/guard.md says what the code says."""

import dataclasses

from mutune.config import SweepConfig
from mutune.training.alarms import KINDS, GuardConfig
from tests.training.guard_page import PAGE, alarms, filled, settings


def test_the_tables_of_the_page_are_those_of_the_code() -> None:
    page = PAGE.read_text()
    assert filled(page) == page
    assert alarms() in page
    assert settings() in page


def keys(cls: type, prefix: str) -> set[str]:
    return {f"{prefix}.{field.name}" for field in dataclasses.fields(cls)}


def test_advice_names_keys_that_there_are() -> None:
    base = SweepConfig()
    known = keys(GuardConfig, "guard") | {"guard.policy=rollback"}
    for group in ("hyperparameters", "loop", "schedule"):
        known |= keys(type(getattr(base, group)), group)
    for name, kind in KINDS.items():
        words = [word.strip(",;.()`") for word in kind.advice.split()]
        groups = ("hyperparameters.", "loop.", "schedule.", "guard.")
        named = [word for word in words if word.startswith(groups)]
        assert set(named) <= known, name
