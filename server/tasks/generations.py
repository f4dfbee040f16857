"""How one generation of a task follows from what it is made of, or from the one before it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from polyhead.server.tasks.contents import StoredContent
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import JsonScalar, Task, Unchanged


def generation_of(
    inventory: str, content: str, template: str | None, defaults: Mapping[str, Any]
) -> str:
    """SHA-256 of everything that can change a task's output.

    inventory, content: their fingerprints. The id and the metadata are left out: they change no
    output, so a copy shares its source's generation and whatever was cached for it.
    """
    parts = ["generation-1", inventory, content, template, dict(defaults)]
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def first_generation(
    inventory: str,
    task_id: str,
    content: StoredContent,
    *,
    template: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    metadata: Mapping[str, JsonScalar] | None = None,
    provenance: Mapping[str, Any] | None = None,
    by: str | None = None,
) -> Record:
    """A task made from `content`, created now; without a provenance it was uploaded."""
    now = datetime.now(UTC)
    task = Task(
        id=task_id,
        generation=generation_of(inventory, content.fingerprint, template, defaults or {}),
        kind=content.kind,
        granularity=content.granularity,
        routing_kind=content.routing_kind,
        template=template,
        defaults=dict(defaults or {}),
        metadata=dict(metadata or {}),
        provenance=_signed(provenance or {"how": "uploaded"}, by),
        created_at=now,
        updated_at=now,
    )
    return Record(task, content.fingerprint)


def next_generation(
    inventory: str,
    old: Record,
    *,
    template: str | Unchanged | None,
    defaults: Mapping[str, Any] | Unchanged,
    metadata: Mapping[str, JsonScalar] | Unchanged,
) -> Record:
    """The same content with some of its fields edited now."""
    task = old.task
    new_template = task.template if isinstance(template, Unchanged) else template
    new_defaults = task.defaults if isinstance(defaults, Unchanged) else dict(defaults)
    edited = replace(
        task,
        generation=generation_of(inventory, old.content, new_template, new_defaults),
        template=new_template,
        defaults=new_defaults,
        metadata=task.metadata if isinstance(metadata, Unchanged) else dict(metadata),
        updated_at=datetime.now(UTC),
    )
    return Record(edited, old.content)


def copied(source: Record, edited: Record, task_id: str, by: str | None = None) -> Record:
    """`edited`, which follows from `source`, as a task of its own."""
    how = {"how": "copied", "from": source.task.id, "generation": source.task.generation}
    task = replace(
        edited.task,
        id=task_id,
        provenance=_signed(how, by),
        created_at=edited.task.updated_at,
    )
    return Record(task, edited.content)


def _signed(provenance: Mapping[str, Any], by: str | None) -> dict[str, Any]:
    return {**provenance, **({} if by is None else {"by": by})}
