"""What the two databases do differently: how they are opened and locked, and how they refuse."""

from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DataError, SQLAlchemyError

from polyhead.server.tasks.errors import (
    NotStorable,
    RegistryError,
    RegistryUnavailable,
    StorageFull,
    UnsupportedDatabase,
)

FILE_NAME = "registry.sqlite3"
POOL_SIZE = 8
"""Readers at a time; more would only take turns at the interpreter and hold page caches."""
WRITE_LOCK = 0x706F6C79
"""PostgreSQL's advisory lock that makes it, like SQLite, have one writer at a time."""
SQLITE_FULL = 13
POSTGRESQL_FULL = "53100"


def open_engine(folder: Path, url: str | None, lock_timeout: float) -> Engine:
    """The engine of SQLite in `folder`, or of the PostgreSQL that `url` names.

    Connections with the option `writes` have taken their turn to write when a transaction begins;
    all others see one state of the database during a transaction. Raises `UnsupportedDatabase`.
    """
    parsed = URL.create("sqlite", database=str(folder / FILE_NAME)) if url is None else _parse(url)
    arguments: dict[str, Any] = {"timeout": lock_timeout}
    if url is not None:
        # What commits is on the server's disk, whatever its configuration says.
        options = f"-c synchronous_commit=on -c lock_timeout={int(lock_timeout * 1000)}"
        arguments = {"connect_timeout": max(2, round(lock_timeout)), "options": options}
    engine = create_engine(
        parsed,
        connect_args=arguments,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_timeout=lock_timeout,
        pool_pre_ping=url is not None,
    )
    if url is None:
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "begin", _begin_postgresql)
    return engine


def reader_of(engine: Engine) -> Engine:
    """`engine` for transactions that see one state of the database and change nothing."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def writer_of(engine: Engine) -> Engine:
    """`engine` for transactions that hold the turn to write."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(writes=True)
    # Each statement sees what others committed before this one's turn came.
    return engine.execution_options(isolation_level="READ COMMITTED", writes=True)


def refusal(exc: SQLAlchemyError) -> RegistryError:
    """What a database's exception means in the registry's words."""
    reason = getattr(exc, "orig", None) or exc
    code = getattr(reason, "sqlite_errorcode", None)
    if code == SQLITE_FULL or getattr(reason, "sqlstate", None) == POSTGRESQL_FULL:
        return StorageFull(f"nothing was stored: {reason}")
    if isinstance(exc, DataError):
        return NotStorable(f"the database cannot hold a text of the task: {reason}")
    return RegistryUnavailable(f"the task registry cannot be used: {reason}")


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError as exc:
        raise UnsupportedDatabase("the database's URL cannot be read") from exc
    if url.get_backend_name() not in ("postgresql", "postgres"):
        raise UnsupportedDatabase(
            f"database: expected postgresql://user:password@host/name, found "
            f"{url.render_as_string(hide_password=True)}"
        )
    return url.set(drivername="postgresql+psycopg")


def _configure_sqlite(dbapi_connection: Any, _record: object) -> None:
    # The driver's own transactions begin too late and as readers; `_begin_sqlite` starts ours.
    dbapi_connection.isolation_level = None
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        dbapi_connection.execute(f"PRAGMA {setting}")


def _begin_sqlite(connection: Connection) -> None:
    # A reader that turns writer after another has written fails at once, without waiting.
    connection.exec_driver_sql("BEGIN IMMEDIATE" if _writes(connection) else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if _writes(connection):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITE_LOCK})")


def _writes(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("writes", False))
