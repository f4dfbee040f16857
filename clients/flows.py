"""What a call does over time, without doing it: tries, pauses and waits.

A flow is a generator. It yields what it wants done, an `Attempt` or a `Pause`; whoever drives it
does that, blocking or awaiting, and sends the reply in or throws in the transport's error. So
retries and waiting are written once for both clients.
"""

import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

import httpx

from polyhead.clients import task_calls
from polyhead.clients.call import Call, Reply
from polyhead.clients.calls import get_job
from polyhead.clients.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    JobFailedError,
    PolyheadError,
    status_error,
)
from polyhead.clients.models import Job, Task
from polyhead.clients.settings import Options

T = TypeVar("T")

NOT_DONE = (429, 503)
"""Statuses that say that the call was not carried out, so that any call may be repeated."""
NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
"""Errors before the first byte left, after which any call may be repeated too."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
LONGEST_RETRY_AFTER = 60.0
"""A server that asks for more patience than this is better answered by the caller."""
FIRST_LOOK, LONGEST_LOOK = 0.1, 2.0
"""Seconds between two looks at a job that is waited for."""


@dataclass(frozen=True)
class Attempt:
    """Send this and reply with what comes back, within `seconds`; a stream's body is left open."""

    call: Call[Any]
    seconds: float | None
    stream: bool = False


@dataclass(frozen=True)
class Pause:
    """Wait this long."""

    seconds: float


Flow = Generator[Attempt | Pause, Any, T]


def exchange(options: Options, call: Call[T]) -> Flow[T]:
    """Send `call`, again where that is safe, and read the answer."""
    reply: Reply = yield from _tries(options, call)
    return call.read(reply)


def opening(options: Options, call: Call[Any]) -> Flow[httpx.Response]:
    """Send `call` and give the answer that is open for reading its events."""
    response: httpx.Response = yield from _tries(options, call, stream=True)
    return response


def wait_for_job(options: Options, job: Job | str, timeout: float | None = None) -> Flow[Job]:
    """Look at a job until it has succeeded.

    timeout: seconds. Raises `JobFailedError` when it fails or is cancelled, `APITimeoutError` when
    the time is over; the job goes on then.
    """
    name = job if isinstance(job, str) else job.id
    end = _end(timeout)
    for look in count():
        found: Job = yield from exchange(options, get_job(name))
        if found.state == "succeeded":
            return found
        if not found.is_open:
            raise JobFailedError(found)
        pause = min(LONGEST_LOOK, FIRST_LOOK * 1.5 ** min(look, 20))
        if time.monotonic() + pause > end:
            raise APITimeoutError(f"{name} is still {found.state} after {timeout:g} s")
        yield Pause(pause)
    raise AssertionError


def wait_for_task(options: Options, job: Job | str, timeout: float | None = None) -> Flow[Task]:
    """Wait for a job as `jobs.wait` does, and read the task that it has made."""
    done: Job = yield from wait_for_job(options, job, timeout)
    task: Task = yield from exchange(options, task_calls.get(done.task))
    return task


def connection_error(exc: httpx.RequestError) -> APIConnectionError:
    """The transport's error as ours; raise it `from exc`."""
    told = str(exc) or type(exc).__name__
    if isinstance(exc, httpx.TimeoutException):
        return APITimeoutError(f"no answer in time: {told}")
    return APIConnectionError(f"the connection failed: {told}")


def _tries(options: Options, call: Call[Any], *, stream: bool = False) -> Flow[Any]:
    end = _end(options.total_timeout)
    for tried in count():
        error: PolyheadError
        cause: httpx.RequestError | None = None
        try:
            reply = yield Attempt(call, _shorter(options.timeout, end), stream)
        except httpx.RequestError as exc:
            error, cause, again = connection_error(exc), exc, _safe(call, exc)
        else:
            if not isinstance(reply, Reply) or reply.status in call.expected:
                return reply
            error = status_error(reply.status, reply.headers, reply.content)
            again = reply.status in NOT_DONE
        pause = _pause(tried, error)
        late = time.monotonic() + pause >= end
        if not again or tried >= options.max_retries or late or pause > LONGEST_RETRY_AFTER:
            raise error from cause
        yield Pause(pause)
    raise AssertionError


def _safe(call: Call[Any], exc: httpx.RequestError) -> bool:
    """Whether sending `call` again after `exc` does no harm and may help."""
    if isinstance(exc, NEVER_SENT):
        return True
    # A server that was too slow once is not asked to do the same work twice.
    return call.repeatable and isinstance(exc, httpx.NetworkError | httpx.RemoteProtocolError)


def _pause(tried: int, error: PolyheadError) -> float:
    """What the server asks for, or twice as long each time; never in step with other clients."""
    asked = error.retry_after if isinstance(error, APIStatusError) else None
    if asked is not None:
        return asked * random.uniform(1, 1.1)
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**tried) * random.uniform(0.5, 1)


def _end(seconds: float | None) -> float:
    return time.monotonic() + (float("inf") if seconds is None else seconds)


def _shorter(seconds: float | None, end: float) -> float | None:
    left = end - time.monotonic()
    if left == float("inf"):
        return seconds
    return max(0.001, left if seconds is None else min(seconds, left))
