"""The durable registry of tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as with_fields
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Layout
from polyhead.server.tasks import store
from polyhead.server.tasks.contents import Content, pack, unpack
from polyhead.server.tasks.cursors import decode_cursor, encode_cursor
from polyhead.server.tasks.errors import InventoryMismatch, NotARouting, StaleGeneration
from polyhead.server.tasks.generations import copied, first_generation, next_generation
from polyhead.server.tasks.neighbours import neighbours
from polyhead.server.tasks.options import DEFAULTS, Options
from polyhead.server.tasks.sketch import Sketcher
from polyhead.server.tasks.sql import Database
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import UNCHANGED, JsonScalar, Task, Unchanged, check_id

INVENTORY_KEY = "inventory"

Also = Callable[[Connection, Task], None]
"""Work done in a change's own transaction, with the new task: both are stored, or neither."""


class Registry:
    """Tasks of one inventory, kept in `data_dir` or in PostgreSQL; safe to call from any thread.

    A change is on disk when its call returns. Nothing about single tasks stays in memory.

    Every method raises `RegistryUnavailable` where the database or its disk refuses; the
    constructor also raises `InventoryMismatch` where the database holds tasks of another inventory,
    and `UnsupportedDatabase`.
    """

    def __init__(
        self,
        data_dir: Path,
        inventory_fingerprint: str,
        layout: Layout,
        options: Options = DEFAULTS,
    ) -> None:
        self.layout = layout
        self._inventory = inventory_fingerprint
        self._sketcher = Sketcher(layout)
        self._listeners: list[Callable[[str], None]] = []
        self.database = Database(data_dir, options.lock_timeout, options.database_url)
        try:
            with self.database.write() as connection:
                _claim_for(connection, inventory_fingerprint, self.database.place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.database.close()

    def subscribe(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with a task's id after each change of it and before the change's own
        call returns; also after a failed one, because a lost answer may hide a success."""
        self._listeners.append(listener)

    def create(
        self,
        task_id: str,
        content: Content,
        *,
        template: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        metadata: Mapping[str, JsonScalar] | None = None,
        provenance: Mapping[str, Any] | None = None,
        also: Also | None = None,
    ) -> Task:
        """Raises `InvalidId`, `ReservedId`, `TaskExists`, and an `AdapterError` for a content that
        does not fit the inventory."""
        check_id(task_id)
        packed = pack(content, self.layout, self._sketcher)
        record = first_generation(
            self._inventory,
            task_id,
            packed,
            template=template,
            defaults=defaults,
            metadata=metadata,
            provenance=provenance,
        )
        with self._changing(task_id) as connection:
            store.put_content(connection, packed)
            store.add(connection, record)
            if also is not None:
                also(connection, record.task)
        return record.task

    def get(self, task_id: str) -> Task:
        """Raises `UnknownTask`."""
        with self.database.read() as connection:
            return store.find(connection, task_id).task

    def load(self, task_id: str) -> tuple[Task, Content]:
        """A task and its content, of the same generation. Raises `UnknownTask`."""
        with self.database.read() as connection:
            record = store.find(connection, task_id)
            data = store.content_data(connection, record.content)
        return record.task, unpack(record.task.kind, data, self.layout)

    def content(self, task_id: str, generation: str) -> Content:
        """Raises `UnknownTask`, or `StaleGeneration`: only the newest generation is kept."""
        task, content = self.load(task_id)
        if task.generation != generation:
            raise StaleGeneration(task_id, found=task.generation, expected=generation)
        return content

    def content_bytes(self, task_id: str) -> bytes:
        """The newest generation's content as safetensors. Raises `UnknownTask`."""
        with self.database.read() as connection:
            return store.content_data(connection, store.find(connection, task_id).content)

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

    def replace(
        self,
        task_id: str,
        content: Content,
        *,
        template: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        metadata: Mapping[str, JsonScalar] | None = None,
        provenance: Mapping[str, Any] | None = None,
        if_match: str | None = None,
    ) -> Task:
        """Everything but the id and the day of creation becomes new.

        Raises `UnknownTask`, `StaleGeneration` when the task is not at generation `if_match`, and
        an `AdapterError` for a content that does not fit the inventory.
        """
        fields: dict[str, Any] = {
            "template": template,
            "defaults": defaults,
            "metadata": metadata,
            "provenance": provenance,
        }
        return self._renew(task_id, content, lambda _: fields, if_match)

    def refit(
        self,
        task_id: str,
        content: Content,
        *,
        template: str | None,
        provenance: Mapping[str, Any],
        if_match: str,
        also: Also | None = None,
    ) -> Task:
        """New numbers and the template they were fitted with; the rest of the task stays.

        Raises what `replace` raises.
        """

        def fields(old: Task) -> dict[str, Any]:
            kept = {"defaults": old.defaults, "metadata": old.metadata}
            return {"template": template, "provenance": provenance, **kept}

        return self._renew(task_id, content, fields, if_match, also)

    def edit(
        self,
        task_id: str,
        *,
        template: str | Unchanged | None = UNCHANGED,
        defaults: Mapping[str, Any] | Unchanged = UNCHANGED,
        metadata: Mapping[str, JsonScalar] | Unchanged = UNCHANGED,
        if_match: str | None = None,
    ) -> Task:
        """Raises `UnknownTask`, `StaleGeneration`. Metadata alone leave the generation as it is."""
        with self._changing(task_id) as connection:
            old = store.claim(connection, task_id, if_match)
            new = next_generation(
                self._inventory, old, template=template, defaults=defaults, metadata=metadata
            )
            store.update(connection, new)
        return new.task

    def copy(
        self,
        source_id: str,
        task_id: str,
        *,
        template: str | Unchanged | None = UNCHANGED,
        defaults: Mapping[str, Any] | Unchanged = UNCHANGED,
        metadata: Mapping[str, JsonScalar] | Unchanged = UNCHANGED,
    ) -> Task:
        """Raises `UnknownTask` for the source, `InvalidId`, `ReservedId`, `TaskExists`."""
        check_id(task_id)
        with self._changing(task_id) as connection:
            source = store.claim(connection, source_id, None)
            edited = next_generation(
                self._inventory, source, template=template, defaults=defaults, metadata=metadata
            )
            record = copied(source, edited, task_id)
            store.add(connection, record)
        return record.task

    def delete(self, task_id: str, if_match: str | None = None) -> None:
        """Raises `UnknownTask`, `StaleGeneration`."""
        with self._changing(task_id) as connection:
            store.remove(connection, store.claim(connection, task_id, if_match))

    def seed(self, inventory: Inventory) -> Sequence[str]:
        """Register, all or none, the inventory's own tasks whose ids are free and that were never
        registered from it before: one that was deleted stays deleted.

        Returns the new ids. Raises `InvalidId`, `ReservedId`, `RoutingError`.
        """
        for task_id in inventory.tasks:
            check_id(task_id)
        provenance = {"how": "inventory", "from": inventory.fingerprint}
        with self.database.write() as connection:
            new = store.unseeded(connection, sorted(inventory.tasks))
            for task_id in new:
                packed = pack(inventory.tasks[task_id], self.layout, self._sketcher)
                record = first_generation(
                    self._inventory,
                    task_id,
                    packed,
                    template=inventory.templates.get(task_id),
                    provenance=provenance,
                )
                store.put_content(connection, packed)
                store.add(connection, record)
                store.mark_seeded(connection, task_id)
        return new

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

    def _renew(
        self,
        task_id: str,
        content: Content,
        fields: Callable[[Task], Mapping[str, Any]],
        if_match: str | None,
        also: Also | None = None,
    ) -> Task:
        """A new content under an id that is taken; `fields` tells the rest from the old task."""
        packed = pack(content, self.layout, self._sketcher)
        with self._changing(task_id) as connection:
            old = store.claim(connection, task_id, if_match)
            new = first_generation(self._inventory, task_id, packed, **fields(old.task))
            task = with_fields(new.task, created_at=old.task.created_at)
            store.put_content(connection, packed)
            store.update(connection, Record(task, new.content))
            store.drop_unused(connection, old.content)
            if also is not None:
                also(connection, task)
        return task

    @contextmanager
    def _changing(self, task_id: str) -> Iterator[Connection]:
        try:
            with self.database.write() as connection:
                yield connection
        finally:
            for listener in self._listeners:
                listener(task_id)


def _claim_for(connection: Connection, inventory: str, place: str) -> None:
    """Tie the registry to `inventory`. Tasks made for another one would answer nonsense, so they
    are refused, except those that came with that inventory and that nobody touched: the new one
    brings its own."""
    found = store.read_info(connection, INVENTORY_KEY)
    if found == inventory:
        return
    if found is not None:
        kept = [task for task in store.all_tasks(connection) if not _is_untouched_seed(task)]
        if kept:
            raise InventoryMismatch(place, tasks=len(kept), found=found, expected=inventory)
        store.clear(connection)
    store.write_info(connection, INVENTORY_KEY, inventory)


def _is_untouched_seed(task: Task) -> bool:
    return task.provenance.get("how") == "inventory" and task.updated_at == task.created_at
