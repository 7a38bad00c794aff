"""Where a study's trials are kept: SQLite or a journal in its folder, a database that has a URL, or a proxy of one.

What a kill or a full disk leaves is mended where a storage cannot do so itself, and a database that is gone for a while
is waited for.
"""

import contextlib
import json
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.exc import DBAPIError, PendingRollbackError, ResourceClosedError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from mutune.errors import Refusal, first_line
from mutune.search.config import FILES, without_password
from mutune.search.results import BEST

T = TypeVar("T")

TRIALS = "trials"  # the folder of the trials' records, in the study's
MARK = "inputs"  # the user attribute of a study that tells which inputs it is of
GRPC = "grpc://"
READY_SECONDS = 10.0  # for a proxy to answer at first
#: What a database that goes away leaves behind, also of a connection that it closed in the middle of a transaction.
GONE = (StorageInternalError, DBAPIError, PendingRollbackError, ResourceClosedError)
PATIENCE = 120.0  # seconds that a storage may be gone
CREATION_TRIES = 5  # of tables, which two studies that start at once make for each other


class StorageGone(Exception):
    """The storage has not answered for `PATIENCE` seconds."""


class _Lock(JournalFileOpenLock):
    """A lock that dies with its holder, where Optuna's own outlive a kill by half a minute. Who gets it finds a journal
    of whole lines: Optuna cannot read past a torn one, nor write behind it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))

    def acquire(self) -> bool:
        """Wait for it."""
        self._lock.acquire()
        _cut_torn_line(self._path)
        return True

    def release(self) -> None:
        """Give it back."""
        self._lock.release()


def open_storage(directory: Path, where: str, *, reads: bool = False) -> BaseStorage:
    """The storage `where` of the study in `directory`; files and tables are made where they are missing.

    Args:
        reads: nothing is made or mended: another process may be writing.

    Raises:
        Refusal: a database that cannot be reached, or a URL that none has.
    """
    if where == "sqlite":
        path = directory / FILES[where]
        if reads:  # connections that stay open would leave their side files behind
            return RDBStorage(f"sqlite:///{path}", engine_kwargs={"poolclass": NullPool}, skip_table_creation=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        return RDBStorage(f"sqlite:///{path}")
    if where == "journal":
        path = directory / FILES[where]
        lock = _Lock(path)
        if not reads:
            lock.acquire()
            lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    if where.startswith(GRPC):
        return _proxy(where)
    for left in reversed(range(CREATION_TRIES)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                pool = {"poolclass": NullPool}  # no connection outlives a database's restart
                return RDBStorage(where, engine_kwargs=pool, skip_table_creation=reads)
        except ImportError:
            raise Refusal(
                f"search.storage={without_password(where)} needs a driver that is not installed; for example "
                "pip install 'mutune[postgres]', and search.storage=postgresql+psycopg://user@host/database."
            ) from None
        except (SQLAlchemyError, StorageInternalError, ValueError) as error:
            if left and isinstance(error, DBAPIError) and not error.connection_invalidated and _is_race(error):
                time.sleep(0.5)
                continue
            raise Refusal(
                f"search.storage={without_password(where)} cannot be used ({_line(error)}); for example "
                "search.storage=postgresql+psycopg://user@host/database, or sqlite."
            ) from None
    raise AssertionError


def _proxy(where: str) -> BaseStorage:
    """Optuna's gRPC proxy of a storage."""
    try:
        place = urlsplit(where)
        if not place.hostname or not place.port:
            raise ValueError("it has no host and port")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            proxy = GrpcStorageProxy(host=place.hostname, port=place.port)
        proxy.wait_server_ready(timeout=READY_SECONDS)
    except ImportError:
        raise Refusal(
            f"search.storage={without_password(where)} needs grpcio, which is not installed; for example "
            "pip install 'mutune[grpc]'."
        ) from None
    except (ConnectionError, ValueError) as error:
        raise Refusal(
            f"search.storage={without_password(where)} cannot be used ({_line(error)}); for example "
            f"search.storage={GRPC}host:13000, or sqlite."
        ) from None
    return proxy


def open_study(directory: Path, name: str, where: str = "sqlite", mark: str = "") -> optuna.Study:
    """The study's Optuna object, created where it does not exist.

    Args:
        mark: of its inputs, kept with a new study.
    """
    study = optuna.create_study(
        storage=open_storage(directory, where),
        study_name=name,
        direction="minimize",
        sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: proposals are made in `proposals`
        load_if_exists=True,
    )
    if MARK not in study.user_attrs:
        study.set_user_attr(MARK, mark)
    return study


def read_study(directory: Path, name: str, where: str) -> optuna.Study | None:
    """The study as it is; None where the storage is gone, cannot be read, or does not have it."""
    if where in FILES and not (directory / FILES[where]).is_file():
        return None
    try:
        return optuna.load_study(storage=open_storage(directory, where, reads=True), study_name=name)
    except Exception:  # of SQLAlchemy, Optuna or JSON, whatever is wrong
        return None


def patiently(action: Callable[[], T]) -> T:
    """What `action` returns; where the storage does not answer it is tried again, so it has to bear that.

    Raises:
        StorageGone: not within `PATIENCE` seconds.
    """
    started, told = time.monotonic(), False
    while True:
        try:
            return action()
        except Exception as error:
            if not isinstance(error, GONE) and not _is_grpc(error):
                raise
            why = _line(error.__cause__ or error)
            if "full" in why or time.monotonic() - started > PATIENCE:  # a full disk empties itself for nobody
                raise StorageGone(f"the study's storage does not answer ({why}); mend that") from error
            if not told:
                print(f"storage    does not answer ({why}); waiting for it", file=sys.stderr)
                told = True
            time.sleep(1.0)


def check_storage(directory: Path, name: str, where: str) -> None:
    """Refuse a folder with trials or best values that its storage does not have; reads only.

    Raises:
        Refusal: the storage is missing, is damaged, or lacks a trial that has begun.
    """
    begun = directory / TRIALS
    path = directory / FILES[where] if where in FILES else None
    if not any(place.exists() for place in (path or begun, begun, directory / BEST)):
        return
    cure = f"restore it, or remove {directory} to start the study over"
    if path is not None and not path.is_file():
        raise Refusal(f"{path} is missing beside the study's results; {cure}.")
    try:
        known = _known_trials(directory, name, where)
    except Refusal:  # of a database that does not answer
        raise
    except (sqlite3.Error, ValueError) as error:
        raise Refusal(f"{path} cannot be read as a study ({error}); {cure}.") from error
    have = {entry.name for entry in begun.iterdir()} if begun.is_dir() else set()
    lost = sorted(entry for entry in have if entry.isdecimal() and int(entry) not in known)
    if lost:
        raise Refusal(f"{path or without_password(where)} lacks trial {lost[0]}, whose records are there; {cure}.")


def check_database(directory: Path, name: str, where: str, mark: str, overwrite: bool) -> None:
    """Refuse a database that does not answer, or whose study of this name is another's; files need no check.

    Args:
        mark: of the inputs that the study has to be of.
        overwrite: whether another's study is to be replaced: `drop_foreign` does so.

    Raises:
        Refusal: as said.
    """
    if (why := _foreign(directory, name, where, mark)) and not overwrite:
        raise Refusal(
            f"search.storage={without_password(where)} has a study {name} whose {why}; choose another study=NAME, or "
            "replace it with overwrite=true."
        )


def drop_foreign(directory: Path, name: str, where: str, mark: str) -> None:
    """Drop the study of this name from a database where it is another's; the folder's lock must be held."""
    if _foreign(directory, name, where, mark):
        optuna.delete_study(study_name=name, storage=open_storage(directory, where))


def _foreign(directory: Path, name: str, where: str, mark: str) -> str:
    """Why a database's study of this name is not that of the folder; an empty string where it is, or there is none."""
    if where in FILES:
        return ""
    storage = open_storage(directory, where)
    if name not in optuna.get_all_study_names(storage):
        return ""
    study = optuna.load_study(study_name=name, storage=storage)
    begun = bool(study.get_trials(deepcopy=False))
    known = study.user_attrs.get(MARK)
    if known != mark and (begun or known is not None):  # one that is being created has neither
        return "inputs were others"
    return f"records are not in {directory}" if begun and not (directory / TRIALS).is_dir() else ""


def _known_trials(directory: Path, name: str, where: str) -> set[int]:
    """The numbers of the trials that a storage has."""
    if where == "sqlite":
        uri = (directory / FILES[where]).absolute().as_uri()
        with contextlib.closing(sqlite3.connect(f"{uri}?mode=ro", uri=True)) as connection:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            known = {int(number) for (number,) in connection.execute("SELECT number FROM trials")}
        if state != "ok":
            raise ValueError(f"it is damaged: {state}")
        return known
    if where == "journal":
        return _journalled(directory / FILES[where])
    storage = open_storage(directory, where)
    if name not in optuna.get_all_study_names(storage):
        return set()
    study = optuna.load_study(study_name=name, storage=storage)
    return {trial.number for trial in study.get_trials(deepcopy=False)}


def _journalled(path: Path) -> set[int]:
    """The numbers of a journal's trials; a torn last line is cut when it is opened.

    Raises:
        ValueError: a line before the last is no record.
    """
    count = 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            count += record["op_code"] == CREATE_TRIAL
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(f"line {number} is no record") from None
    return set(range(count))


CREATE_TRIAL = 4  # of Optuna's `JournalOperation`; a test holds it against Optuna's


def _cut_torn_line(path: Path) -> None:
    """Cut what a kill or a full disk left of a last record."""
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))


def _is_race(error: Exception) -> bool:
    return any(word in str(error).lower() for word in ("already exists", "unique", "duplicate"))


def _is_grpc(error: Exception) -> bool:
    """Whether a proxy did not answer; its package is loaded only where there is one."""
    return any(kind.__module__ == "grpc" and kind.__name__ == "RpcError" for kind in type(error).__mro__)


def _line(error: BaseException) -> str:
    """The first line of what went wrong."""
    return without_password(first_line(error))
