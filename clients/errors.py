"""What a call can end in when it does not end well.

PolyheadError                    base of everything that the clients raise on purpose
├── APIConnectionError           no answer, or only a part of one, came back
│   └── APITimeoutError          ... within the time that was given
├── UnreadableAnswerError        an answer came that this version of the client does not know
├── JobFailedError               the job that was waited for failed or was cancelled
└── APIStatusError               the server refused; carries status, code, message and fields
    ├── BadRequestError          400  the body cannot be read
    ├── AuthenticationError      401  no key, or an unknown one
    ├── PermissionDeniedError    403  the key does not allow this
    ├── NotFoundError            404  no such task, job or path
    ├── ConflictError            409  the id is taken, or the state forbids it
    ├── StaleError               412  the task is no longer at the generation in `if_match`
    ├── TooLargeError            413  the body is larger than the server accepts
    ├── UnprocessableError       422  a value is wrong: `errors` names the fields
    ├── RateLimitError           429  over a limit of this key; `retry_after` says when to return
    └── ServerError              5xx  the server failed
        ├── UnavailableError     503  full, draining or cut off from its registry
        └── OutOfSpaceError      507  the server's disk is full
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from pydantic import BaseModel, ValidationError

from polyhead.clients.models import Job

SHOWN_BODY = 200


class PolyheadError(Exception):
    """Base of everything that the clients raise on purpose."""


class APIConnectionError(PolyheadError):
    """No answer, or only a part of one, came back."""


class APITimeoutError(APIConnectionError, TimeoutError):
    """No answer came back within the time that was given."""


class UnreadableAnswerError(PolyheadError):
    """An answer came that this version of the client does not know."""


class JobFailedError(PolyheadError):
    """The job that was waited for failed or was cancelled; `job` is its last state."""

    def __init__(self, job: Job) -> None:
        told = f": {job.error}" if job.error else ""
        super().__init__(f"{job.id} of the task {job.task} {job.state}{told}")
        self.job = job


class FieldError(BaseModel):
    """One wrong value: its dotted path in the body, what was found there, what was expected."""

    field: str
    message: str
    found: str = ""
    expected: str = ""

    def __str__(self) -> str:
        found = f", found {self.found}" if self.found else ""
        expected = f", expected {self.expected}" if self.expected else ""
        return f"{self.field}: {self.message}{found}{expected}"


class Problem(BaseModel):
    """The server's refusal as it is sent. Branch on `code`: it is stable, the texts are not."""

    status: int
    code: str
    title: str = ""
    detail: str = ""
    errors: list[FieldError] = []


class APIStatusError(PolyheadError):
    """The server refused the call.

    status: of HTTP. code: stable, to branch on. message: for people. errors: the wrong fields.
    request_id: to look for in the server's log. retry_after: seconds, where the server gave them.
    """

    def __init__(
        self, problem: Problem, request_id: str | None = None, retry_after: float | None = None
    ) -> None:
        self.status = problem.status
        self.code = problem.code
        self.message = problem.detail or problem.title
        self.errors = problem.errors
        self.request_id = request_id
        self.retry_after = retry_after
        super().__init__(self._line())

    def _line(self) -> str:
        told = "; ".join(map(str, self.errors)) or self.message
        tail = f" (request {self.request_id})" if self.request_id else ""
        return f"{self.status} {self.code}: {told}{tail}"


class BadRequestError(APIStatusError):
    """The body cannot be read."""


class AuthenticationError(APIStatusError):
    """No key was given, or an unknown one."""


class PermissionDeniedError(APIStatusError):
    """The key does not allow this call."""


class NotFoundError(APIStatusError):
    """There is no such task, job or path."""


class ConflictError(APIStatusError):
    """The id is taken, or the state of the thing forbids the call."""


class StaleError(APIStatusError):
    """The task is no longer at the generation in `if_match`."""


class TooLargeError(APIStatusError):
    """The body is larger than the server accepts."""


class UnprocessableError(APIStatusError):
    """A value is wrong; `errors` names the fields."""


class RateLimitError(APIStatusError):
    """Over a limit of this key."""


class ServerError(APIStatusError):
    """The server failed."""


class UnavailableError(ServerError):
    """The server is full, draining or cut off from its registry."""


class OutOfSpaceError(ServerError):
    """The server's disk is full."""


BY_STATUS: Mapping[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    412: StaleError,
    413: TooLargeError,
    422: UnprocessableError,
    429: RateLimitError,
    503: UnavailableError,
    507: OutOfSpaceError,
}


def status_error(status: int, headers: Mapping[str, str], content: bytes) -> APIStatusError:
    """The refusal of an answer with this status, whoever wrote its body."""
    try:
        problem = Problem.model_validate_json(content)
    except ValidationError:  # not ours: a proxy's page, or an empty body
        told = content[:SHOWN_BODY].decode(errors="replace").strip()
        problem = Problem(status=status, code=f"http_{status}", detail=told or "no explanation")
    problem.status = status
    wait = retry_after(headers.get("retry-after"))
    return problem_error(problem, headers.get("x-request-id"), wait)


def problem_error(problem: Problem, request_id: str | None, wait: float | None) -> APIStatusError:
    """`problem` as the exception of its status."""
    fallback = ServerError if problem.status >= 500 else APIStatusError
    return BY_STATUS.get(problem.status, fallback)(problem, request_id, wait)


def retry_after(value: str | None) -> float | None:
    """`Retry-After` in seconds from now, given as seconds or as a date; None if it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if value.strip().isdecimal() else _until(value)
    except ValueError:
        return None


def _until(date: str) -> float:
    moment: Any = parsedate_to_datetime(date)
    if moment.tzinfo is None:  # "-0000" means UTC
        moment = moment.replace(tzinfo=UTC)
    seconds: float = (moment - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds)
