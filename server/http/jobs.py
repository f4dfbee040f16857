"""`/jobs`: list, look, follow, cancel."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Query
from pydantic_core import to_json
from starlette.responses import Response, StreamingResponse

from polyhead.server.engine.errors import EngineDraining
from polyhead.server.http.callers import the_caller
from polyhead.server.http.described import EVENTS
from polyhead.server.http.job_schemas import JobAnswer, JobPage, PointAnswer, job_answer
from polyhead.server.http.parameters import TheService
from polyhead.server.http.service import Service
from polyhead.server.http.stream import DONE, error_event, event
from polyhead.server.tasks.errors import UnknownJob
from polyhead.server.tasks.job import Job, JobState

router = APIRouter(prefix="/jobs")

MAX_PAGE = 1000
STILL_THERE = b": the job has no news\n\n"
SILENCE_SECONDS = 10.0
"""After which a line is sent that keeps proxies from closing the connection."""


@router.get("", response_model=JobPage)
async def list_jobs(
    service: TheService,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 100,
    cursor: Annotated[str | None, Query()] = None,
    task: Annotated[str | None, Query()] = None,
    state: Annotated[JobState | None, Query()] = None,
) -> Response:
    """Jobs, newest first, a page at a time."""
    found, after = await service.pool.run(
        service.jobs.list, limit, cursor, task, state, the_caller().task_prefix
    )
    return _json({"jobs": [_shown(service, job) for job in found], "next": after})


@router.get("/{job_id}", response_model=JobAnswer)
async def read(job_id: str, service: TheService) -> Response:
    """One job."""
    return _json(_shown(service, await service.pool.run(_seen, service, job_id)))


@router.post("/{job_id}/cancel", response_model=JobAnswer)
async def cancel(job_id: str, service: TheService) -> Response:
    """End a job that is queued or running; its task stays as it is."""
    await service.pool.run(_seen, service, job_id)
    job = await service.pool.run(service.jobs.cancel, job_id)
    service.lane.cancel(job_id)
    return _json(_shown(service, job))


@router.get("/{job_id}/events", response_class=StreamingResponse, responses=EVENTS)
async def events(job_id: str, service: TheService) -> Response:
    """Server-sent events: `job` with the whole job at first and at every change of its state,
    `progress` in between, from the beginning of the run; `[DONE]` after the job has ended."""
    job = await service.pool.run(_seen, service, job_id)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(service, job), 200, headers, "text/event-stream")


def _seen(service: Service, job_id: str) -> Job:
    """Raises `UnknownJob` also for a job of a task that the caller may not see."""
    job = service.jobs.get(job_id)
    if not the_caller().may_see(job.task):
        raise UnknownJob(job_id)
    return job


async def _events(service: Service, job: Job) -> AsyncIterator[bytes]:
    loop, news = asyncio.get_running_loop(), asyncio.Event()
    state, seen = None, 0

    def wake() -> None:
        loop.call_soon_threadsafe(news.set)

    with service.board.listening(job.id, wake):
        while True:
            news.clear()
            if state != "running" or not service.board.curve(job.id, seen):
                job = await service.pool.run(service.jobs.get, job.id)
            points = service.board.curve(job.id, seen)
            if job.is_open and job.state != state:
                yield b"event: job\n" + event(_shown(service, job))
            state = job.state
            for number, point in points:
                seen = number
                yield b"event: progress\n" + event(_point(point))
            if not job.is_open:
                yield b"event: job\n" + event(_shown(service, job)) + DONE
                return
            if service.board.closed:
                yield error_event(EngineDraining("the server is shutting down; the job goes on"))
                return
            if not await _within(news, SILENCE_SECONDS):
                yield STILL_THERE


async def _within(news: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(news.wait(), seconds)
    except TimeoutError:
        return False
    return True


def _point(point: dict[str, Any]) -> dict[str, Any]:
    return PointAnswer.model_validate(point).model_dump(exclude_none=True)


def _shown(service: Service, job: Job) -> dict[str, Any]:
    curve = service.board.curve(job.id)
    return job_answer(job, curve[-1][1] if curve and job.state == "running" else None)


def _json(body: dict[str, Any]) -> Response:
    return Response(to_json(body), media_type="application/json")
