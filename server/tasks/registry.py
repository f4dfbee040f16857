"""The durable registry of tasks: every change."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace as with_fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Layout
from polyhead.server.tasks import history, store
from polyhead.server.tasks.audit import Action
from polyhead.server.tasks.blobs import open_blobs
from polyhead.server.tasks.change import Change
from polyhead.server.tasks.contents import Content, Precision, StoredContent, pack
from polyhead.server.tasks.errors import TaskExists
from polyhead.server.tasks.following import Follower
from polyhead.server.tasks.generations import copied, first_generation, next_generation
from polyhead.server.tasks.lookups import Lookups
from polyhead.server.tasks.options import DEFAULTS, Options
from polyhead.server.tasks.owning import claim_for
from polyhead.server.tasks.seeding import seed
from polyhead.server.tasks.sql import Database
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import UNCHANGED, JsonScalar, Task, Unchanged, check_id

BLOBS = "blobs"

Also = Callable[[Connection, Task], None]
"""Work done in a change's own transaction, with the new task: both are stored, or neither."""


class Registry(Lookups):
    """Tasks of one inventory, kept in `data_dir` or in PostgreSQL; safe to call from any thread.

    A change is on disk when its call returns. Nothing about single tasks stays in memory. `by` is
    whoever makes the change, for the log: the id of a key.

    Every method raises `RegistryUnavailable` where the database or its disk refuses; the
    constructor also raises `InventoryMismatch` where the database holds tasks of another inventory,
    `UnsupportedDatabase` and `UnsupportedStore`.
    """

    def __init__(
        self,
        data_dir: Path,
        inventory_fingerprint: str,
        layout: Layout,
        options: Options = DEFAULTS,
    ) -> None:
        database = Database(data_dir, options.lock_timeout, options.database_url)
        try:
            blobs = open_blobs(options.blob_store, data_dir / BLOBS, shared=database.is_shared)
            super().__init__(database, layout, blobs)
            self.data_dir = data_dir
            self.inventory = inventory_fingerprint
            self.options = options
            self._listeners: list[Callable[[str], None]] = []
            with database.write() as connection:
                claim_for(connection, inventory_fingerprint, database.place)
            self._follower = Follower(database, self._tell, self.purge, options.poll_seconds)
        except BaseException:
            database.close()
            raise

    def close(self) -> None:
        self._follower.stop()
        self.database.close()

    def follow(self) -> None:
        """From now on tell the listeners of what other processes change, too, and forget what was
        deleted long ago."""
        self._follower.start()

    @property
    def convergence_lag(self) -> float:
        """For how many seconds others' changes may have been missed; 0 without `follow`."""
        return self._follower.lag

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
        precision: Precision | None = None,
        by: str | None = None,
        also: Also | None = None,
    ) -> Task:
        """precision: of a routing's stored numbers; None is the registry's.

        Raises `InvalidId`, `ReservedId`, `TaskExists`, and an `AdapterError` for a content that
        does not fit the inventory."""
        check_id(task_id)
        packed = self.pack(content, precision)
        record = first_generation(
            self.inventory,
            task_id,
            packed,
            template=template,
            defaults=defaults,
            metadata=metadata,
            provenance=provenance,
            by=by,
        )
        with self.changing(task_id, by) as change:
            store.put_content(change.connection, packed)
            store.add(change.connection, record)
            fitted = record.task.provenance["how"] == "fitted"
            change.note("fitted" if fitted else "created", None, record.task)
            if also is not None:
                also(change.connection, record.task)
        return record.task

    def replace(
        self,
        task_id: str,
        content: Content,
        *,
        template: str | None = None,
        defaults: Mapping[str, Any] | None = None,
        metadata: Mapping[str, JsonScalar] | None = None,
        provenance: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        if_match: str | None = None,
        by: str | None = None,
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
        return self._renew(task_id, self.pack(content, precision), lambda _: fields, if_match, by)

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

        return self._renew(task_id, self.pack(content), fields, if_match, None, also)

    def edit(
        self,
        task_id: str,
        *,
        template: str | Unchanged | None = UNCHANGED,
        defaults: Mapping[str, Any] | Unchanged = UNCHANGED,
        metadata: Mapping[str, JsonScalar] | Unchanged = UNCHANGED,
        if_match: str | None = None,
        by: str | None = None,
    ) -> Task:
        """Raises `UnknownTask`, `StaleGeneration`. Metadata alone leave the generation as it is."""
        with self.changing(task_id, by) as change:
            old = store.claim(change.connection, task_id, if_match)
            new = next_generation(
                self.inventory, old, template=template, defaults=defaults, metadata=metadata
            )
            change.supersede(old, new, "edited", self.options.kept_versions)
        return new.task

    def copy(
        self,
        source_id: str,
        task_id: str,
        *,
        template: str | Unchanged | None = UNCHANGED,
        defaults: Mapping[str, Any] | Unchanged = UNCHANGED,
        metadata: Mapping[str, JsonScalar] | Unchanged = UNCHANGED,
        by: str | None = None,
    ) -> Task:
        """Raises `UnknownTask` for the source, `InvalidId`, `ReservedId`, `TaskExists`."""
        check_id(task_id)
        with self.changing(task_id, by) as change:
            source = store.claim(change.connection, source_id, None)
            edited = next_generation(
                self.inventory, source, template=template, defaults=defaults, metadata=metadata
            )
            record = copied(source, edited, task_id, by)
            store.add(change.connection, record)
            change.note("copied", None, record.task)
        return record.task

    def delete(self, task_id: str, if_match: str | None = None, by: str | None = None) -> None:
        """The task is gone, but can be restored for a while.

        Raises `UnknownTask`, `StaleGeneration`."""
        with self.changing(task_id, by) as change:
            old = store.claim(change.connection, task_id, if_match)
            store.remove(change.connection, old)
            history.keep(change.connection, old, "deleted", self.options.kept_versions)
            change.note("deleted", old.task, None)
            if self.options.restore_seconds == 0:
                history.drop_task(change.connection, task_id)

    def restore(self, task_id: str, by: str | None = None) -> Task:
        """Bring back what was deleted last under this id.

        Raises `UnknownTask` where nothing was, or too long ago, and `TaskExists`.
        """
        with self.changing(task_id, by) as change:
            if store.exists_task(change.connection, task_id):
                raise TaskExists(task_id)
            record = history.take_deleted(change.connection, task_id, self._restorable_since())
            store.add(change.connection, record)
            change.note("restored", None, record.task)
        return record.task

    def roll_back(
        self, task_id: str, generation: str, if_match: str | None = None, by: str | None = None
    ) -> Task:
        """Make the task what it was at `generation`, metadata and provenance included; what it is
        now becomes a part of its history.

        Raises `UnknownTask`, `UnknownGeneration`, `StaleGeneration`.
        """
        with self.changing(task_id, by) as change:
            old = store.claim(change.connection, task_id, if_match)
            if old.task.generation == generation:
                return old.task
            former = history.find(change.connection, task_id, generation)
            now = datetime.now(UTC)
            task = with_fields(former.task, created_at=old.task.created_at, updated_at=now)
            new = Record(task, former.content)
            change.supersede(old, new, "rolled_back", self.options.kept_versions)
        return task

    def purge(self) -> Sequence[str]:
        """Forget what was deleted too long ago to be restored; returns the ids."""
        with self.database.write() as connection:
            gone = history.drop_deleted(connection, self._restorable_since())
            for task_id in gone:
                Change(connection, task_id, None).note("purged", None, None)
            self.blobs.sweep(store.private_contents(connection))
        return gone

    def seed(self, inventory: Inventory) -> Sequence[str]:
        """Register, all or none, the inventory's own tasks whose ids are free and that were never
        registered from it before: one that was deleted stays deleted.

        Returns the new ids. Raises `InvalidId`, `ReservedId`, `RoutingError`.
        """
        with self.database.write() as connection:
            return seed(connection, inventory, self.inventory, self.pack)

    def pack(self, content: Content, precision: Precision | None = None) -> StoredContent:
        """`content` as it is to be stored; a private adapter lies in the blob store already.

        Raises `RoutingError`, `PrivateAdapterError`.
        """
        packed = pack(content, self.layout, self._sketcher, precision or self.options.precision)
        if packed.kind == "private" and self.blobs.put(packed.fingerprint, packed.data):
            return with_fields(packed, data=b"")
        return packed

    def _renew(
        self,
        task_id: str,
        packed: StoredContent,
        fields: Callable[[Task], Mapping[str, Any]],
        if_match: str | None,
        by: str | None,
        also: Also | None = None,
    ) -> Task:
        """A new content under an id that is taken; `fields` tells the rest from the old task."""
        with self.changing(task_id, by) as change:
            old = store.claim(change.connection, task_id, if_match)
            new = first_generation(self.inventory, task_id, packed, by=by, **fields(old.task))
            task = with_fields(new.task, created_at=old.task.created_at)
            store.put_content(change.connection, packed)
            action: Action = "fitted" if task.provenance["how"] == "fitted" else "replaced"
            record = Record(task, new.content)
            change.supersede(old, record, action, self.options.kept_versions)
            if also is not None:
                also(change.connection, task)
        return task

    @contextmanager
    def changing(self, task_id: str, by: str | None) -> Iterator[Change]:
        """A transaction that changes one task, and who hears of it."""
        numbers: list[int] = []
        try:
            with self.database.write() as connection:
                yield Change(connection, task_id, by, numbers)
            self._follower.skip(numbers)
        finally:
            self._tell(task_id)

    def _tell(self, task_id: str) -> None:
        for listener in self._listeners:
            listener(task_id)

    def _restorable_since(self) -> datetime:
        return datetime.now(UTC) - timedelta(seconds=self.options.restore_seconds)
