"""`/audit`: who changed which task."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.responses import Response

from polyhead.server.http.callers import the_caller
from polyhead.server.http.parameters import TheService
from polyhead.server.tasks.audit import Action

router = APIRouter(prefix="/audit")

MAX_PAGE = 1000


class EntryAnswer(BaseModel):
    """One change. `before` and `after` are generations, null where there was or is no task;
    `actor` is the id of the key that made it, null where none was needed."""

    number: int
    at: datetime
    task: str
    action: Action
    before: str | None
    after: str | None
    actor: str | None


class AuditPage(BaseModel):
    """`next` is the cursor of the page after this one, null on the last."""

    entries: list[EntryAnswer]
    next: str | None


@router.get("", response_model=AuditPage)
async def read(
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query()] = None,
    task: Annotated[str | None, Query()] = None,
) -> Response:
    """Changes of tasks, newest first, a page at a time; those of deleted tasks as well."""
    prefix = the_caller().task_prefix
    entries, after = await service.pool.run(service.registry.audit, limit, cursor, task, prefix)
    page = AuditPage(entries=[EntryAnswer(**asdict(entry)) for entry in entries], next=after)
    return Response(page.model_dump_json(), media_type="application/json")
