"""Every refusal as `application/problem+json` (RFC 9457): one table from exception to answer."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from polyhead.adapters import errors as adapters
from polyhead.adapters.training import errors as training
from polyhead.server.engine import errors as engine
from polyhead.server.http import errors as http
from polyhead.server.http.errors import FieldError, shown
from polyhead.server.metrics import Metrics
from polyhead.server.tasks import errors as tasks

log = logging.getLogger(__name__)

ROOTS: tuple[type[Exception], ...] = (
    adapters.AdapterError,
    engine.EngineError,
    tasks.RegistryError,
    http.CallError,
)
RETRY_AFTER = 5
"""Seconds after which another replica, or this one restarted, may answer."""
SHOWN_ERRORS = 16
SHOWN_TEXT = 2000
"""Characters of a detail or a value; a refusal does not send back all that was sent."""


@dataclass(frozen=True)
class Kind:
    """How one class of exceptions is answered. `code` is stable: clients branch on it."""

    status: int
    code: str
    title: str


INTERNAL = Kind(500, "internal_error", "The server failed")
INVALID = Kind(422, "invalid_value", "A value is wrong")
UNKNOWN = Kind(404, "unknown_task", "No such task")
MALFORMED = Kind(400, "malformed_body", "The body cannot be read")

KINDS: Mapping[type[Exception], Kind] = {
    adapters.AdapterError: INVALID,
    adapters.RoutingError: Kind(422, "invalid_routing", "The routing does not fit"),
    adapters.PrivateAdapterError: Kind(
        422, "invalid_private_adapter", "The private adapter does not fit"
    ),
    adapters.InventoryError: INTERNAL,
    adapters.BackboneMismatch: INTERNAL,
    adapters.InjectionError: INTERNAL,
    adapters.PlanError: INTERNAL,
    adapters.ConversionError: INTERNAL,
    training.TrainingError: INVALID,
    training.DataError: INVALID,
    training.ConfigError: INVALID,
    training.CheckpointError: INTERNAL,
    engine.EngineError: INTERNAL,
    engine.BackboneError: INTERNAL,
    engine.EngineFull: Kind(503, "engine_full", "The waiting line is full"),
    engine.EngineDraining: Kind(503, "engine_draining", "The server is shutting down"),
    engine.EngineDead: Kind(503, "engine_dead", "The engine has stopped"),
    engine.WorkerLost: Kind(503, "engine_dead", "The engine has stopped"),
    engine.RequestTooLarge: Kind(422, "request_too_large", "The request can never fit"),
    tasks.RegistryError: INTERNAL,
    tasks.UnknownTask: UNKNOWN,
    tasks.TaskExists: Kind(409, "task_exists", "The id is taken"),
    tasks.UnknownGeneration: Kind(
        404, "unknown_generation", "The task's history has no such generation"
    ),
    tasks.StaleGeneration: Kind(412, "stale_generation", "The task has changed"),
    tasks.InvalidId: Kind(422, "invalid_id", "The id cannot be used"),
    tasks.ReservedId: Kind(422, "reserved_id", "The id is reserved"),
    tasks.InvalidCursor: Kind(422, "invalid_cursor", "The cursor is not one of ours"),
    tasks.NotARouting: Kind(422, "not_a_routing", "The task has a private adapter"),
    tasks.UnknownJob: Kind(404, "unknown_job", "No such job"),
    tasks.TaskBeingFitted: Kind(409, "task_being_fitted", "The task is being fitted"),
    tasks.JobEnded: Kind(409, "job_ended", "The job has ended"),
    tasks.JobTakenOver: Kind(409, "job_taken_over", "Another server runs the job"),
    tasks.TooManyJobs: Kind(503, "too_many_jobs", "The line of jobs is full"),
    tasks.AdapterTooLarge: Kind(413, "adapter_too_large", "The private adapter is too large"),
    tasks.SlotsBusy: Kind(503, "no_adapter_slot", "No room for the private adapter"),
    tasks.ArchiveError: INTERNAL,
    tasks.InventoryMismatch: INTERNAL,
    tasks.SchemaTooNew: INTERNAL,
    tasks.UnsupportedDatabase: INTERNAL,
    tasks.UnsupportedStore: INTERNAL,
    tasks.NotStorable: INVALID,
    tasks.StorageFull: Kind(507, "storage_full", "There is no room left to store the change"),
    tasks.RegistryUnavailable: Kind(503, "registry_unavailable", "The registry cannot be reached"),
    http.CallError: INTERNAL,
    http.MalformedBody: MALFORMED,
    http.BodyTooLarge: Kind(413, "body_too_large", "The body is too large"),
    http.BodyTooComplex: Kind(413, "body_too_complex", "The body holds too many values"),
    http.BadArchive: Kind(422, "invalid_archive", "The archive is not read"),
    http.ArchiveTooLarge: Kind(413, "archive_too_large", "The archive holds too much"),
    http.UnsupportedContent: Kind(415, "unsupported_content", "The content type is not read"),
    http.InvalidValue: INVALID,
    http.UnknownTaskNamed: UNKNOWN,
    http.KeyMissing: Kind(401, "key_missing", "A key is needed"),
    http.KeyInvalid: Kind(401, "key_invalid", "The key is not valid"),
    http.MissingScope: Kind(403, "scope_missing", "The key is not for this"),
    http.OutsidePrefix: Kind(403, "outside_prefix", "The id is not for this key"),
    http.ForeignHost: Kind(403, "foreign_host", "The call is addressed to another host"),
    http.CrossOrigin: Kind(403, "cross_origin", "Another site's page may not call"),
    http.TooManyRequests: Kind(429, "request_rate_exceeded", "Too many requests"),
    http.TokenRateExceeded: Kind(429, "token_rate_exceeded", "Too many tokens"),
    http.TooManyAtOnce: Kind(429, "too_many_at_once", "Too many requests at once"),
    http.ReaderTooSlow: Kind(408, "reader_too_slow", "The stream was not read"),
    http.ReplicaLost: Kind(503, "replica_lost", "The replica is gone"),
    http.DeadlinePassed: Kind(504, "deadline_passed", "The deadline has passed"),
    http.GenerationFailed: Kind(500, "generation_failed", "The request failed in the engine"),
    http.ClientGone: Kind(499, "client_gone", "The client left"),
}


Form = Callable[["Problem"], tuple[bytes, str]]
"""Writes a problem as the bytes of a body and its content type."""


class FieldProblem(BaseModel):
    """One wrong value of a body."""

    field: str
    message: str
    found: str
    expected: str


class Problem(BaseModel):
    """RFC 9457's members, a stable `code`, and the wrong values where there are any."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldProblem] | None = None


def problem_of(exc: Exception) -> Problem:
    """The problem object that answers `exc`."""
    if isinstance(exc, HTTPException):
        kind = _kind_of_status(exc.status_code)
        return _problem(kind, str(exc.detail), [])
    if isinstance(exc, ValidationError | RequestValidationError):
        return _invalid(exc)
    kind = next(KINDS[cls] for cls in (*type(exc).__mro__, http.CallError) if cls in KINDS)
    detail = str(exc) if kind is not INTERNAL else "see the server's log for this request id"
    return _problem(kind, detail, list(_field_errors(exc)))


def native(problem: Problem) -> tuple[bytes, str]:
    """The form of RFC 9457."""
    return problem_json(problem), "application/problem+json"


def problem_response(exc: Exception, form: Form = native) -> Response:
    """`exc` as a response, with `Retry-After` where trying again can help."""
    problem = problem_of(exc)
    headers = dict(getattr(exc, "headers", None) or {})
    if problem.status in (429, 503):
        wait = getattr(exc, "retry_after", RETRY_AFTER)
        headers["Retry-After"] = str(max(1, math.ceil(wait)))
    body, media_type = form(problem)
    return Response(body, problem.status, headers, media_type=media_type)


def problem_json(problem: Problem) -> bytes:
    """The bytes of a problem object."""
    return to_json(problem.model_dump(exclude_none=True))


def install(app: FastAPI, metrics: Metrics, forms: Mapping[str, Form]) -> None:
    """Answer every exception of the trees, of the framework and the unforeseen with a problem.

    forms: for the paths below each of these, where it is not the native one.
    """

    async def answer(request: Request, exc: Exception) -> Response:
        path = request.url.path
        form = next((own for below, own in forms.items() if path.startswith(f"{below}/")), native)
        response = problem_response(exc, form)
        code = problem_of(exc).code
        metrics.refused.labels(code).inc()
        if response.status_code >= 500 and response.status_code != 503:
            log.error("%s %s failed", request.method, request.url.path, exc_info=exc)
        return response

    framework = (HTTPException, RequestValidationError, ValidationError, Exception)
    for root in (*ROOTS, *framework):
        app.add_exception_handler(root, answer)


def _problem(kind: Kind, detail: str, errors: list[FieldError]) -> Problem:
    return Problem(
        type=f"urn:polyhead:problem:{kind.code}",
        title=kind.title,
        status=kind.status,
        detail=_printable(detail),
        code=kind.code,
        errors=[_field_problem(error) for error in errors] or None,
    )


def _field_problem(error: FieldError) -> FieldProblem:
    return FieldProblem(**{key: _printable(value) for key, value in asdict(error).items()})


def _printable(text: str) -> str:
    if len(text) > SHOWN_TEXT:
        text = f"{text[:SHOWN_TEXT]}… ({len(text)} long)"
    return text.encode("utf-8", "backslashreplace").decode()


def _kind_of_status(status: int) -> Kind:
    phrase = HTTPStatus(status).phrase
    return Kind(status, phrase.lower().replace(" ", "_").replace("-", "_"), phrase)


def _field_errors(exc: Exception) -> Iterator[FieldError]:
    if isinstance(exc, http.InvalidValue):
        yield from exc.errors
    elif isinstance(exc, adapters.AdapterError) and exc.field:
        yield FieldError(exc.field, exc.message, exc.found, exc.expected)
    elif isinstance(exc, tasks.InvalidId):
        yield FieldError("id", "not a usable id", shown(exc.task_id), exc.expected)
    elif isinstance(exc, tasks.InvalidCursor):
        yield FieldError("query.cursor", "not a cursor", shown(exc.cursor), "an earlier 'next'")


def _invalid(exc: ValidationError | RequestValidationError) -> Problem:
    errors = exc.errors()
    broken = next((error for error in errors if error["type"] == "json_invalid"), None)
    if broken is not None:
        return _problem(MALFORMED, broken["msg"], [])
    fields = [_from_pydantic(error) for error in errors[:SHOWN_ERRORS]]
    detail = "; ".join(f"{e.field}: {e.message}, found {e.found}" for e in fields[:3])
    return _problem(INVALID, detail, fields)


def _from_pydantic(error: Mapping[str, Any]) -> FieldError:
    kind, message = error["type"], error["msg"]
    found = "nothing" if kind == "missing" else shown(error.get("input"))
    if kind == "extra_forbidden":
        return FieldError(field_path(error["loc"]), "unknown field", found, "no such field")
    expected = "a value" if kind == "missing" else message.partition(" should ")[2]
    return FieldError(
        field_path(error["loc"]), message, found, expected.removeprefix("be ") or message
    )


def field_path(location: tuple[int | str, ...]) -> str:
    """`("messages", 0, "content")` as `messages[0].content`; union branches are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("<"):
            path += f".{part}" if path else part
    return path
