"""What can be asked of the engine and of jobs, one function for each call; nothing is sent here.

`Client` and `AsyncClient` have methods of the same arguments.
"""

import base64
from collections.abc import Mapping
from typing import Any, Unpack

from polyhead.clients.asking import Asking, Generating
from polyhead.clients.call import Call, Page, Reply, StreamCall, answer, nothing, parse
from polyhead.clients.errors import status_error
from polyhead.clients.models import (
    Generated,
    Health,
    Inventory,
    Job,
    JobPage,
    JobState,
    Piece,
    Point,
    Scored,
)
from polyhead.clients.routing import Routing


def generate(task: str | None = None, **asked: Unpack[Generating]) -> Call[Generated]:
    """Continue a prompt with a task's adapter and give the whole answer.

    task: whose adapter; `base` is the bare backbone. Instead of it a `mixture` of tasks or a
    `routing`. What is asked is a `prompt`, an `input` for the task's template, or `messages`.
    """
    body = asked_body(task, asked)
    return Call("POST", "/generate", answer(Generated), body, repeatable=True)


def stream(task: str | None = None, **asked: Unpack[Generating]) -> StreamCall[Piece]:
    """As `generate`, piece by piece. Nothing is sent before the first piece is asked for.

    Leaving the `with` block, or closing the stream, ends the request on the server at once.
    """
    body = {**asked_body(task, asked), "stream": True}
    call = Call("POST", "/generate", nothing, body, repeatable=True)
    return StreamCall(call, lambda _, data: parse(Piece, data))


def score(
    task: str | None = None, *, choices: list[str] | list[list[int]], **asked: Unpack[Asking]
) -> Call[Scored]:
    """The log-likelihood of each choice after what is asked, and the best one.

    choices: texts or lists of token ids. The rest is as in `generate`.
    """
    body = {**asked_body(task, asked), "choices": choices}
    return Call("POST", "/score", answer(Scored), body, repeatable=True)


def inventory() -> Call[Inventory]:
    """What the server has loaded."""
    return Call("GET", "/inventory", answer(Inventory), repeatable=True)


def health() -> Call[Health]:
    """Whether the server would take a request now. An answer of no is not an error."""
    expected = frozenset({200, 503})
    return Call("GET", "/health/ready", _health, repeatable=True, expected=expected)


def get_job(job: Job | str) -> Call[Job]:
    """The job as it is now."""
    return Call("GET", f"/jobs/{job_id(job)}", answer(Job), repeatable=True)


def list_jobs(
    *, task: str | None = None, state: JobState | None = None, page_size: int = 100
) -> Call[Page[Job]]:
    """All jobs, newest first; pages are fetched as they are needed."""
    return _jobs({"limit": page_size, **given(task=task, state=state)})


def cancel_job(job: Job | str) -> Call[Job]:
    """End a job that is queued or running; its task stays as it is."""
    return Call("POST", f"/jobs/{job_id(job)}/cancel", answer(Job))


def job_events(job: Job | str) -> StreamCall[Job | Point]:
    """Follow a job: itself at first and whenever its state changes, and points of its curve.

    The points come from the beginning of the run. The stream ends when the job has ended, well or
    not.
    """
    call = Call("GET", f"/jobs/{job_id(job)}/events", nothing, repeatable=True)
    return StreamCall(call, _job_event)


def asked_body(task: str | None, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a question, with its routing as JSON carries it."""
    body = {**given(task=task), **asked}
    if isinstance(body.get("routing"), Routing):
        body["routing"] = routing_body(body["routing"])
    return body


def routing_body(routing: Routing) -> dict[str, str]:
    """A routing as a body carries it."""
    return {"safetensors": base64.b64encode(routing.safetensors).decode()}


def given(**values: Any) -> dict[str, Any]:
    """Those of `values` that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def job_id(job: Job | str) -> str:
    """The id of a job that is named or given."""
    return job if isinstance(job, str) else job.id


def _jobs(query: Mapping[str, Any]) -> Call[Page[Job]]:
    def read(reply: Reply) -> Page[Job]:
        page = parse(JobPage, reply.content)
        following = _jobs({**query, "cursor": page.next}) if page.next else None
        return Page(page.jobs, following)

    return Call("GET", "/jobs", read, query=query, repeatable=True)


def _job_event(name: str, data: bytes) -> Job | Point:
    return parse(Job, data) if name == "job" else parse(Point, data)


def _health(reply: Reply) -> Health:
    if reply.status == 200:
        return Health(ready=True)
    refusal = status_error(reply.status, reply.headers, reply.content)
    return Health(ready=False, code=refusal.code, detail=refusal.message)
