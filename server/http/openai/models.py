"""`/v1/models`: every task is a model, and so is the bare backbone."""

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter
from pydantic_core import to_json
from starlette.responses import Response

from polyhead.server.engine.request import BASE_TASK
from polyhead.server.http.callers import the_caller
from polyhead.server.http.parameters import TaskId, TheService
from polyhead.server.tasks.catalogue import BASE
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.task import Task

router = APIRouter(prefix="/models")

PAGE = 1000


@router.get("", response_class=Response)
async def list_models(service: TheService) -> Response:
    """Everything that this caller may name as `model`: OpenAI's list has no pages."""
    found = await service.pool.run(_all, service.registry, the_caller().task_prefix)
    return Response(found, media_type="application/json")


@router.get("/{task_id}", response_class=Response)
async def read_model(task_id: TaskId, service: TheService) -> Response:
    """One task as a model."""
    if task_id == BASE_TASK:
        return Response(to_json(_model(BASE.task)), media_type="application/json")
    task = await service.pool.run(service.registry.get, task_id)
    return Response(to_json(_model(task)), media_type="application/json")


def _all(registry: Registry, prefix: str | None) -> bytes:
    models = [_model(BASE.task), *map(_model, _tasks(registry, prefix))]
    return to_json({"object": "list", "data": models})


def _tasks(registry: Registry, prefix: str | None) -> Iterator[Task]:
    cursor = None
    while True:
        tasks, cursor = registry.list(PAGE, cursor, prefix=prefix)
        yield from tasks
        if cursor is None:
            return


def _model(task: Task) -> dict[str, Any]:
    return {
        "id": task.id,
        "object": "model",
        "created": int(task.created_at.timestamp()),
        "owned_by": "polyhead",
    }
