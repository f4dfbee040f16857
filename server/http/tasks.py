"""`/tasks`: register, list, read, replace, edit, remove."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import Response

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.engine.request import BASE_TASK
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.callers import the_caller
from polyhead.server.http.checks import unknown_task
from polyhead.server.http.contexts import with_generated
from polyhead.server.http.errors import InvalidValue, shown
from polyhead.server.http.fitting import accepted, refuse_holdout, submit_new
from polyhead.server.http.job_schemas import JobAnswer
from polyhead.server.http.parameters import Holdout, IfMatch, TaskId, TheService
from polyhead.server.http.registering import (
    Registration,
    given_fields,
    registration,
    takes_registration,
)
from polyhead.server.http.schemas import (
    EditBody,
    Neighbour,
    SimilarAnswer,
    TaskAnswer,
    TaskPage,
)
from polyhead.server.http.service import Service
from polyhead.server.tasks.catalogue import BASE
from polyhead.server.tasks.contents import Content
from polyhead.server.tasks.errors import NotARouting, UnknownTask
from polyhead.server.tasks.task import Task

router = APIRouter(prefix="/tasks")

T = TypeVar("T")

MAX_PAGE = 1000
Registered = Annotated[Registration, Depends(registration)]


async def _filter(metadata: Annotated[list[str], Query()] = []) -> dict[str, str]:  # noqa: B006
    """`metadata=key:value`, any number of times; all of them must hold."""
    pairs = {}
    for place, text in enumerate(metadata):
        key, colon, value = text.partition(":")
        if not key or not colon:
            raise InvalidValue.of(
                f"query.metadata[{place}]", "not a pair", found=shown(text), expected="key:value"
            )
        pairs[key] = value
    return pairs


Filter = Annotated[dict[str, str], Depends(_filter)]


@router.post(
    "",
    status_code=201,
    response_model=TaskAnswer,
    responses={202: {"model": JobAnswer, "description": "A job will register the task"}},
    openapi_extra=takes_registration(),
)
async def create(
    call: Request, registered: Registered, service: TheService, holdout: Holdout = None
) -> Response:
    """Register a task; it is on disk, and served, when the answer comes. From `examples` it is
    fitted first: the answer is the job, on disk, and the task is there once that has succeeded.
    From a `context` the inventory's generator makes it, in one pass of the backbone."""
    if registered.body.examples is not None:
        return accepted(await service.pool.run(submit_new, service, registered, holdout))
    refuse_holdout(holdout)
    _new_id(registered)
    registered = await with_generated(call, service, registered)
    task = await service.pool.run(_create, service, registered, the_caller().id)
    return task_response(task, 201, {"Location": f"/tasks/{task.id}"})


@router.get("", response_model=TaskPage)
async def list_tasks(
    service: TheService,
    metadata: Filter,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query()] = None,
    prefix: Annotated[str | None, Query()] = None,
) -> Response:
    """Tasks in the order of their ids, a page at a time."""
    tasks, after = await service.pool.run(
        service.registry.list, limit, cursor, metadata=metadata, prefix=the_caller().narrow(prefix)
    )
    page = TaskPage(tasks=[TaskAnswer(**asdict(task)) for task in tasks], next=after)
    return Response(page.model_dump_json(), media_type="application/json")


@router.get("/{task_id}", response_model=TaskAnswer)
async def read(task_id: TaskId, service: TheService) -> Response:
    """One task; the `ETag` is its generation."""
    if task_id == BASE_TASK:
        return task_response(BASE.task)
    return task_response(await service.pool.run(service.registry.get, task_id))


@router.put("/{task_id}", response_model=TaskAnswer, openapi_extra=takes_registration())
async def replace(
    call: Request, task_id: TaskId, registered: Registered, service: TheService, if_match: IfMatch
) -> Response:
    """Replace everything but the id; with `If-Match` only the generation named there."""
    registered = await with_generated(call, service, registered)
    by = the_caller().id
    work = partial(_replace, service, task_id, registered, if_match, by)
    return task_response(await service.pool.run(work))


@router.patch("/{task_id}", response_model=TaskAnswer, openapi_extra=takes(EditBody))
async def edit(
    task_id: TaskId,
    body: Annotated[EditBody, Depends(json_body(EditBody))],
    service: TheService,
    if_match: IfMatch,
) -> Response:
    """Replace template, defaults or metadata, each as a whole; null removes it."""
    fields = given_fields(body, service.settings)
    by = the_caller().id
    work = partial(service.registry.edit, task_id, **fields, if_match=if_match, by=by)
    return task_response(await service.pool.run(work))


@router.delete("/{task_id}", status_code=204)
async def remove(task_id: TaskId, service: TheService, if_match: IfMatch) -> Response:
    """Remove a task; requests that run on it finish. It can be restored for a while."""
    await service.pool.run(service.registry.delete, task_id, if_match, the_caller().id)
    return Response(status_code=204)


@router.get("/{task_id}/routing", response_class=Response)
async def routing(task_id: TaskId, service: TheService) -> Response:
    """The routing as a safetensors file, as it was given."""
    task, content = await service.pool.run(service.registry.load, task_id)
    if not isinstance(content, Routing):
        raise NotARouting(task_id)
    headers = {
        "ETag": f'"{task.generation}"',
        "Content-Disposition": f'attachment; filename="{task.id}.safetensors"',
    }
    return Response(content.to_safetensors(), 200, headers, "application/octet-stream")


@router.get("/{task_id}/similar", response_model=SimilarAnswer)
async def similar(
    task_id: TaskId, service: TheService, limit: Annotated[int, Query(ge=1, le=100)] = 10
) -> SimilarAnswer:
    """The tasks whose routings point the same way."""
    prefix = the_caller().task_prefix
    found = await service.pool.run(service.registry.similar, task_id, limit, prefix)
    return SimilarAnswer(similar=[Neighbour(id=name, cosine=cosine) for name, cosine in found])


def _content(service: Service, registered: Registration) -> Content | None:
    content = registered.content(service.inventory, service.settings)
    if isinstance(content, PrivateAdapter):
        service.slots.check(content)
    return content


def _new_id(registered: Registration) -> str:
    if registered.body.id is None:
        raise InvalidValue.of("id", "missing", found="nothing", expected="a task id")
    return registered.body.id


def _create(service: Service, registered: Registration, by: str | None) -> Task:
    new_id = _new_id(registered)
    fields = {**registered.fields(service.settings), "by": by}
    content = _content(service, registered)
    if content is not None:
        precision = registered.precision
        return service.registry.create(new_id, content, **fields, precision=precision)
    source = str(registered.body.copy_of)
    return _from_source(source, lambda: service.registry.copy(source, new_id, **fields))


def _replace(
    service: Service,
    task_id: str,
    registered: Registration,
    if_match: str | None,
    by: str | None,
) -> Task:
    body = registered.body
    if body.id not in (None, task_id):
        raise InvalidValue.of(
            "id", "differs from the path's", found=shown(body.id), expected=repr(task_id)
        )
    fields = registered.fields(service.settings)
    if registered.body.examples is not None:
        raise InvalidValue.of(
            "examples",
            "not taken here",
            found=shown(body.examples),
            expected=f"POST /tasks/{task_id}/fit, which fits a task that exists",
        )
    content = _content(service, registered)
    if content is None:
        name = str(body.copy_of)
        source, content = _from_source(name, lambda: service.registry.load(name))
        copied = {"how": "copied", "from": name, "generation": source.generation}
        inherited = {"template": source.template, "defaults": source.defaults}
        fields = {**inherited, "metadata": source.metadata, "provenance": copied, **fields}
    fields = {**fields, "precision": registered.precision, "by": by}
    return service.registry.replace(task_id, content, **fields, if_match=if_match)


def _from_source(source: str, work: Callable[[], T]) -> T:
    try:
        return work()
    except UnknownTask as exc:
        raise unknown_task("copy_of", source) from exc


def task_response(task: Task, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A task as the answer of a call, its generation as the tag."""
    tagged = {"ETag": f'"{task.generation}"', **(headers or {})}
    body: Any = TaskAnswer(**asdict(task)).model_dump_json()
    return Response(body, status, tagged, "application/json")
