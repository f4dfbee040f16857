"""The database: how it is opened, its transactions, and its errors in the registry's words."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, create_engine, event
from sqlalchemy.exc import SQLAlchemyError

from polyhead.server.tasks.errors import RegistryUnavailable, SchemaTooNew

FILE_NAME = "registry.sqlite3"
POOL_SIZE = 8
"""Readers at a time; more would only take turns at the interpreter and hold page caches."""
MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """SQLite in WAL mode. What `write` committed survives a crash of the process or the machine.

    lock_timeout: seconds to wait for another writer. Raises `RegistryUnavailable` for everything
    that the database or the disk refuses, and `SchemaTooNew` on opening what it cannot read.
    """

    def __init__(self, folder: Path, lock_timeout: float) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise RegistryUnavailable(f"{folder}: {exc.strerror}") from exc
        self._lock_timeout = lock_timeout
        self._write_lock = threading.Lock()
        self._engine = create_engine(
            URL.create("sqlite", database=str(folder / FILE_NAME)),
            connect_args={"timeout": lock_timeout},
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=lock_timeout,
        )
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)
        self._writer = self._engine.execution_options(writes=True)
        try:
            with self.write() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of the database."""
        with _translated(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, on disk when the block ends, undone when it raises."""
        # SQLite has one writer at a time and lets the others poll; a lock hands over at once.
        if not self._write_lock.acquire(timeout=self._lock_timeout):
            raise RegistryUnavailable(
                f"the task registry is busy: no turn to write within {self._lock_timeout:g} s"
            )
        try:
            with _translated(), self._writer.begin() as connection:
                yield connection
        finally:
            self._write_lock.release()

    def close(self) -> None:
        self._engine.dispose()


def _configure(dbapi_connection: Any, _record: object) -> None:
    # The driver's own transactions begin too late and as readers; `_begin` starts ours.
    dbapi_connection.isolation_level = None
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        dbapi_connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    # A reader that turns writer after another has written fails at once, without waiting.
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as exc:
        raise SchemaTooNew(f"the task registry cannot be brought up to date: {exc}") from exc


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as exc:
        reason = getattr(exc, "orig", None) or exc
        raise RegistryUnavailable(f"the task registry cannot be used: {reason}") from exc
