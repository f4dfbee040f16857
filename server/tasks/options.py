"""How a registry is kept: what an operator may choose."""

from dataclasses import dataclass

from polyhead.server.config import Settings
from polyhead.server.tasks.contents import Precision


@dataclass(frozen=True)
class Options:
    """database_url: of PostgreSQL; None is SQLite in the data folder. blob_store: `s3://` URL for
    private adapters; None is a folder beside SQLite, and PostgreSQL itself. precision: of routings
    that are stored without saying one. kept_versions: former versions of a task that are kept.
    restore_seconds: how long a deleted task can be restored. poll_seconds: between two looks at
    what others changed. lock_timeout: seconds that a call waits for another writer."""

    database_url: str | None = None
    blob_store: str | None = None
    precision: Precision = "float32"
    kept_versions: int = 20
    restore_seconds: float = 7 * 86400.0
    poll_seconds: float = 0.5
    lock_timeout: float = 5.0

    @classmethod
    def of(cls, settings: Settings) -> "Options":
        """As the server's settings say."""
        return cls(
            database_url=settings.database_url,
            blob_store=settings.blob_store,
            precision=settings.routing_precision,
            kept_versions=settings.kept_versions,
            restore_seconds=settings.restore_seconds,
        )


DEFAULTS = Options()
