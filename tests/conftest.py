"""Fixtures for tests that run commands: one cache of tokenized text for the whole session."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def one_thread_and_one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, as the workers have; text is prepared once for all tests, away from the user's own cache."""
    import torch

    torch.set_num_threads(1)
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("MUTUNE_CACHE", cache)
        environment.setenv("OMP_NUM_THREADS", "1")  # which commands take for their threads, here and in other processes
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An output folder that does not exist yet."""
    return tmp_path / "runs"
