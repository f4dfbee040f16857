"""`/tasks/{id}/history`, `rollback` and `restore`: what a task was, and how it comes back."""

from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from pydantic import BaseModel
from starlette.responses import Response

from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.callers import the_caller
from polyhead.server.http.parameters import IfMatch, TaskId, TheService
from polyhead.server.http.schemas import Body, TaskAnswer
from polyhead.server.http.tasks import task_response
from polyhead.server.tasks.history import Version

router = APIRouter(prefix="/tasks")


class RollbackBody(Body):
    """`POST /tasks/{id}/rollback`: the generation to go back to, one of the history's."""

    generation: str


class VersionAnswer(TaskAnswer):
    """What a task is (`ended` is null) or was, until it was replaced or deleted."""

    ended: Literal["replaced", "deleted"] | None
    ended_at: datetime | None


class HistoryAnswer(BaseModel):
    """The answer of `GET /tasks/{id}/history`, newest first."""

    versions: list[VersionAnswer]


@router.get("/{task_id}/history", response_model=HistoryAnswer)
async def history(task_id: TaskId, service: TheService) -> Response:
    """What the task is and was; `--kept-versions` says how far back."""
    found = await service.pool.run(service.registry.history, task_id)
    answer = HistoryAnswer(versions=[_shown(version) for version in found])
    return Response(answer.model_dump_json(), media_type="application/json")


@router.post("/{task_id}/rollback", response_model=TaskAnswer, openapi_extra=takes(RollbackBody))
async def roll_back(
    task_id: TaskId,
    body: Annotated[RollbackBody, Depends(json_body(RollbackBody))],
    service: TheService,
    if_match: IfMatch,
) -> Response:
    """Make the task what it was at a generation; with `If-Match` only from the one named there."""
    by = the_caller().id
    work = service.registry.roll_back
    return task_response(await service.pool.run(work, task_id, body.generation, if_match, by))


@router.post("/{task_id}/restore", response_model=TaskAnswer)
async def restore(task_id: TaskId, service: TheService) -> Response:
    """Bring a deleted task back; `--restore-seconds` says for how long that can be done."""
    by = the_caller().id
    return task_response(await service.pool.run(service.registry.restore, task_id, by))


def _shown(version: Version) -> VersionAnswer:
    return VersionAnswer(**asdict(version.task), ended=version.ended, ended_at=version.ended_at)
