"""Fixtures for tests that run commands: one cache of tokenized text for the whole session."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, as the workers have; text is prepared once for all tests, away from the user's own cache."""
    import torch

    torch.set_num_threads(1)
    before = os.environ.get("MUTUNE_CACHE")
    os.environ["MUTUNE_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    yield
    if before is None:
        del os.environ["MUTUNE_CACHE"]
    else:
        os.environ["MUTUNE_CACHE"] = before


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that does not exist yet."""
    return tmp_path / "runs"
