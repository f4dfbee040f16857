"""A whole registry as one tar file of safetensors and JSON, and back.

`manifest.json` names the inventory. `contents/FINGERPRINT.safetensors` comes before the first
`tasks/ID.json` that names it. Equal registries make equal files.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from dataclasses import replace as with_fields
from datetime import datetime
from typing import IO, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from polyhead.adapters.errors import AdapterError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Granularity, Routing, RoutingKind
from polyhead.server.tasks import store
from polyhead.server.tasks.change import Change
from polyhead.server.tasks.contents import Content, StoredContent
from polyhead.server.tasks.errors import ArchiveError, UnknownTask
from polyhead.server.tasks.generations import generation_of
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import JsonScalar, Task, check_id

FORMAT = 1
MANIFEST = "manifest.json"
CONTENT_NAME = re.compile(r"contents/([0-9a-f]{64})\.safetensors")
TASK_NAME = re.compile(r"tasks/(.+)\.json")
PAGE = 500
"""Tasks in one transaction of an import."""


class Entry(BaseModel):
    """`tasks/ID.json`."""

    model_config = ConfigDict(extra="forbid")

    id: str
    generation: str
    kind: Literal["routing", "private"]
    granularity: Granularity | None
    routing_kind: RoutingKind | None
    template: str | None
    defaults: dict[str, Any]
    metadata: dict[str, JsonScalar]
    provenance: dict[str, Any]
    created_at: datetime
    updated_at: datetime
    content: str

    def record(self) -> Record:
        fields = dict(self)
        content = fields.pop("content")
        return Record(Task(**fields), content)


@dataclass
class Imported:
    """What an import did."""

    created: int = 0
    replaced: int = 0
    unchanged: int = 0


def export_tasks(registry: Registry, file: IO[bytes]) -> int:
    """Write every task as it is now, without its history; returns how many."""
    written: set[str] = set()
    count = 0
    with (
        tarfile.open(fileobj=file, mode="w|") as tar,
        registry.database.read() as connection,
    ):
        _add(tar, MANIFEST, _json({"format": FORMAT, "inventory": registry.inventory}))
        for record in store.all_records(connection):
            if record.content not in written:
                written.add(record.content)
                data = store.content_data(connection, record.content)
                data = data or registry.blobs.get(record.content)
                _add(tar, f"contents/{record.content}.safetensors", data)
            entry = Entry(**asdict(record.task), content=record.content)
            _add(tar, f"tasks/{entry.id}.json", _json(entry.model_dump(mode="json")))
            count += 1
    return count


def import_tasks(registry: Registry, inventory: Inventory, file: IO[bytes]) -> Imported:
    """Make every task of an archive what it is there; what was another becomes its history, what
    is the same is left alone, and so are tasks that the archive does not name.

    Raises `ArchiveError`, and `AdapterError` for a content that does not fit the inventory; what
    came before it in the archive is stored then.
    """
    done = Imported()
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=file, mode="r|") as tar:
            page: list[Entry] = []
            for member in _members(tar, registry.inventory):
                if isinstance(member, Entry):
                    page.append(member)
                else:
                    contents.update(member)
                if len(page) == PAGE:
                    _store(registry, inventory, page, contents, done)
            _store(registry, inventory, page, contents, done)
    except tarfile.TarError as exc:
        raise ArchiveError(f"not a whole tar file: {exc}") from exc
    return done


def _members(tar: tarfile.TarFile, inventory: str) -> Iterator[Entry | Mapping[str, bytes]]:
    """Tasks, and contents by their names."""
    for number, member in enumerate(tar):
        read = tar.extractfile(member)
        data = read.read() if read is not None else b""
        content, task = CONTENT_NAME.fullmatch(member.name), TASK_NAME.fullmatch(member.name)
        if number == 0:
            _check_manifest(member.name, data, inventory)
        elif content:
            yield {content[1]: data}
        elif task:
            try:
                entry = Entry.model_validate_json(data)
            except ValidationError as exc:
                raise ArchiveError(f"{member.name}: {exc.errors()[0]['msg']}") from exc
            check_id(entry.id)
            yield entry
        else:
            raise ArchiveError(f"{member.name[:200]!r}: expected contents/… or tasks/…")


def _check_manifest(name: str, data: bytes, inventory: str) -> None:
    if name != MANIFEST:
        raise ArchiveError(f"begins with {name[:200]!r}: expected {MANIFEST}")
    try:
        found = json.loads(data)
    except ValueError as exc:
        raise ArchiveError(f"{MANIFEST}: {exc}") from exc
    expected = {"format": FORMAT, "inventory": inventory}
    if found != expected:
        raise ArchiveError(f"{MANIFEST}: expected {expected}, found {found}")


def _store(
    registry: Registry,
    inventory: Inventory,
    page: list[Entry],
    contents: dict[str, bytes],
    done: Imported,
) -> None:
    """Everything that was read so far, in one transaction; empties `page` and `contents`."""
    packed = {
        entry.content: _packed(registry, inventory, entry, contents[entry.content])
        for entry in page
        if entry.content in contents
    }
    with registry.database.write() as connection:
        for entry in page:
            change = Change(connection, entry.id, None)
            if entry.content in packed:
                store.put_content(connection, packed[entry.content])
            elif not store.has_content(connection, entry.content):
                raise ArchiveError(f"tasks/{entry.id}.json: its content is missing")
            _put(registry, change, entry.record(), done)
        for content in packed:
            store.drop_unused(connection, content)
    page.clear()
    contents.clear()


def _put(registry: Registry, change: Change, new: Record, done: Imported) -> None:
    task = new.task
    own = generation_of(registry.inventory, new.content, task.template, task.defaults)
    if task.generation != own:
        raise ArchiveError(f"tasks/{task.id}.json: its generation is not that of what it holds")
    try:
        old = store.find(change.connection, task.id)
    except UnknownTask:
        store.add(change.connection, new)
        change.note("imported", None, task)
        done.created += 1
        return
    if old == new:
        done.unchanged += 1
    else:
        change.supersede(old, new, "imported", registry.options.kept_versions)
        done.replaced += 1


def _packed(registry: Registry, inventory: Inventory, entry: Entry, data: bytes) -> StoredContent:
    """A content that has been checked like an upload, to be stored with the archive's bytes."""
    content: Content
    try:
        if entry.kind == "routing":
            content = Routing.from_safetensors(data, registry.layout)
        else:
            content = PrivateAdapter.from_safetensors(data, inventory.header.modules)
        packed = registry.pack(content, "float32")
    except AdapterError as exc:
        raise ArchiveError(f"contents/{entry.content}.safetensors: {exc}") from exc
    if packed.fingerprint != entry.content:
        raise ArchiveError(f"contents/{entry.content}.safetensors: its numbers have changed")
    return packed if entry.kind == "private" else with_fields(packed, data=data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1).encode()
