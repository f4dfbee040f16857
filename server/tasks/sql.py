"""The database: how it is brought up to date, its transactions, its errors in our words."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from polyhead.server.tasks.dialects import open_engine, reader_of, refusal, writer_of
from polyhead.server.tasks.errors import RegistryUnavailable, SchemaTooNew

MIGRATIONS = Path(__file__).parent / "migrations"


class Database:
    """SQLite in WAL mode in `folder`, or the PostgreSQL at `url`. What `write` committed survives
    a crash of the process or the machine.

    lock_timeout: seconds to wait for another writer. Raises `RegistryUnavailable` for everything
    that the database or the disk refuses, `StorageFull` where there is no room, `SchemaTooNew` on
    opening what it cannot read, `UnsupportedDatabase` for a URL of another kind.
    """

    def __init__(self, folder: Path, lock_timeout: float, url: str | None = None) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise RegistryUnavailable(f"{folder}: {exc.strerror}") from exc
        self._lock_timeout = lock_timeout
        self._write_lock = threading.Lock()
        self._engine = open_engine(folder, url, lock_timeout)
        self._reader, self._writer = reader_of(self._engine), writer_of(self._engine)
        try:
            with self.write() as connection:
                _migrate(connection)
        except BaseException:
            self.close()
            raise

    @property
    def place(self) -> str:
        """Where it is, without a password."""
        return self._engine.url.render_as_string(hide_password=True)

    @property
    def address(self) -> str:
        """The URL with which libpq reaches a shared database."""
        return self._engine.url.set(drivername="postgresql").render_as_string(hide_password=False)

    @property
    def is_shared(self) -> bool:
        """Whether servers on other machines may use it as well."""
        return self._engine.dialect.name == "postgresql"

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """One consistent view of the database."""
        with _translated(), self._reader.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction, on disk when the block ends, undone when it raises.

        There is one at a time, whatever the database and however many servers use it.
        """
        # SQLite lets the others poll, PostgreSQL holds connections; a lock hands over at once.
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
        raise refusal(exc) from exc
