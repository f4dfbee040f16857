"""A task as the registry describes it: everything except the numbers."""

import re
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Literal

from polyhead.adapters.routing import Granularity, RoutingKind
from polyhead.server.engine.request import BASE_TASK
from polyhead.server.tasks.errors import InvalidId, ReservedId

TaskKind = Literal["base", "routing", "private"]
JsonScalar = str | int | float | bool | None

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Unchanged(Enum):
    """The type of `UNCHANGED`, which None cannot stand for: a template may be set to None."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED


@dataclass(frozen=True)
class Task:
    """One generation of a task. Treat the dictionaries as read-only: instances are shared."""

    id: str
    generation: str
    kind: TaskKind  # only the bare backbone is "base"
    granularity: Granularity | None  # None for a private adapter
    routing_kind: RoutingKind | None  # None for a private adapter
    template: str | None
    defaults: dict[str, Any]  # sampling parameters used where a request names none
    metadata: dict[str, JsonScalar]
    provenance: dict[str, Any]
    """"how": uploaded, copied, fitted, generated, converted, seeded; "by" a key."""
    created_at: datetime  # UTC
    updated_at: datetime  # UTC


def check_id(task_id: str) -> None:
    """Raises `InvalidId`, or `ReservedId` for the bare backbone's."""
    if not ID_PATTERN.fullmatch(task_id):
        raise InvalidId(task_id, expected=ID_PATTERN.pattern)
    if task_id == BASE_TASK:
        raise ReservedId(task_id)
