"""How a registry is kept: what an operator may choose."""

from dataclasses import dataclass

from polyhead.server.config import Settings


@dataclass(frozen=True)
class Options:
    """database_url: of PostgreSQL; None is SQLite in the data folder. lock_timeout: seconds that a
    call waits for another writer."""

    database_url: str | None = None
    lock_timeout: float = 5.0

    @classmethod
    def of(cls, settings: Settings) -> "Options":
        """As the server's settings say."""
        return cls(database_url=settings.database_url)


DEFAULTS = Options()
