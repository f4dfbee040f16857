"""What can be asked of the registry."""

from collections.abc import Mapping, Sequence

from polyhead.adapters.routing import Layout
from polyhead.server.tasks import audit, history, store
from polyhead.server.tasks.audit import Entry
from polyhead.server.tasks.blobs import Blobs
from polyhead.server.tasks.contents import Content, unpack
from polyhead.server.tasks.cursors import (
    decode_cursor,
    decode_number,
    encode_cursor,
    encode_number,
)
from polyhead.server.tasks.errors import NotARouting, StaleGeneration
from polyhead.server.tasks.history import Version
from polyhead.server.tasks.neighbours import neighbours
from polyhead.server.tasks.sketch import Sketcher
from polyhead.server.tasks.sql import Database
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import JsonScalar, Task


class Lookups:
    """Reads of one registry, from any thread. Every method raises `RegistryUnavailable`."""

    def __init__(self, database: Database, layout: Layout, blobs: Blobs) -> None:
        self.database = database
        self.layout = layout
        self.blobs = blobs
        self._sketcher = Sketcher(layout)

    def get(self, task_id: str) -> Task:
        """Raises `UnknownTask`."""
        with self.database.read() as connection:
            return store.find(connection, task_id).task

    def load(self, task_id: str) -> tuple[Task, Content]:
        """A task and its content, of the same generation. Raises `UnknownTask`."""
        record, data = self._read(task_id)
        return record.task, unpack(record.task.kind, data, self.layout)

    def content(self, task_id: str, generation: str) -> Content:
        """Raises `UnknownTask`, or `StaleGeneration` where the task is at another one."""
        task, content = self.load(task_id)
        if task.generation != generation:
            raise StaleGeneration(task_id, found=task.generation, expected=generation)
        return content

    def content_bytes(self, task_id: str) -> bytes:
        """The newest generation's content as safetensors. Raises `UnknownTask`."""
        return self._read(task_id)[1]

    def count(self) -> int:
        with self.database.read() as connection:
            return store.count(connection)

    def list(
        self,
        limit: int = 100,
        cursor: str | None = None,
        metadata: Mapping[str, JsonScalar] | None = None,
        prefix: str | None = None,
    ) -> tuple[Sequence[Task], str | None]:
        """Up to `limit` tasks in the order of their ids, and the cursor of the next page.

        A task that is there all the while is on exactly one page, whatever is added or removed in
        between. A filter's value matches as text: 5 and "5" are the same, so are true and "true".
        Raises `InvalidCursor`.
        """
        after = None if cursor is None else decode_cursor(cursor)
        with self.database.read() as connection:
            found = store.page(connection, after, limit + 1, metadata or {}, prefix)
        more = len(found) > limit
        return found[:limit], encode_cursor(found[limit - 1].id) if more else None

    def history(self, task_id: str) -> Sequence[Version]:
        """What the task is and was, newest first. Changes of metadata alone are no versions.

        Raises `UnknownTask` for a task that is not there now.
        """
        with self.database.read() as connection:
            now = Version(store.find(connection, task_id).task)
            return [now, *history.of_task(connection, task_id)]

    def audit(
        self,
        limit: int = 100,
        cursor: str | None = None,
        task: str | None = None,
        prefix: str | None = None,
    ) -> tuple[Sequence[Entry], str | None]:
        """Up to `limit` changes, newest first, and the cursor of the next page.

        Raises `InvalidCursor`.
        """
        before = None if cursor is None else decode_number(cursor)
        with self.database.read() as connection:
            found = audit.page(connection, before, limit + 1, task, prefix)
        more = len(found) > limit
        return found[:limit], encode_number(found[limit - 1].number) if more else None

    def similar(
        self, task_id: str, limit: int = 10, prefix: str | None = None
    ) -> Sequence[tuple[str, float]]:
        """Ids of the nearest other routings with their cosines, nearest first; with `prefix` only
        among tasks whose ids begin so.

        The cosine is of the weights minus the uniform average, exact for those returned; which
        ones are compared exactly is picked by their sketches. The average itself has no direction
        and so no neighbours. Raises `UnknownTask`, `NotARouting`.
        """
        with self.database.read() as connection:
            record = store.find(connection, task_id)
            if record.task.kind != "routing":
                raise NotARouting(task_id)
            return neighbours(connection, record, self.layout, self._sketcher, limit, prefix)

    def _read(self, task_id: str) -> tuple[Record, bytes]:
        with self.database.read() as connection:
            record = store.find(connection, task_id)
            data = store.content_data(connection, record.content)
        # Blobs are named by their content, so this one is the record's whatever happened since.
        return record, data or self.blobs.get(record.content)
