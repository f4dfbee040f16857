"""A problem in the form of OpenAI's errors, for every refusal below `/v1`."""

from typing import Any

from pydantic_core import to_json

from polyhead.server.http.problems import Problem, problem_of

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
SHOWN_ERRORS = 3
CODES = {"unknown_task": "model_not_found", "key_invalid": "invalid_api_key"}
"""Our codes that OpenAI's clients know by another name. All others are ours."""


def error_object(problem: Problem) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; `param` is the path of the first wrong value."""
    kind = "server_error" if problem.status >= 500 else "invalid_request_error"
    param = problem.errors[0].field if problem.errors else None
    return {
        "error": {
            "message": _message(problem),
            "type": TYPES.get(problem.status, kind),
            "param": param,
            "code": CODES.get(problem.code, problem.code),
        }
    }


def _message(problem: Problem) -> str:
    """All that the native form tells in members of its own: OpenAI's clients show no others."""
    wrong = [
        f"{error.field}: {error.message} (found {error.found}; expected {error.expected})"
        for error in problem.errors or ()
    ]
    return "; ".join(wrong[:SHOWN_ERRORS]) or problem.detail


def error_body(problem: Problem) -> tuple[bytes, str]:
    """The body of a refused call, and its content type."""
    return to_json(error_object(problem)), "application/json"


def error_event(exc: Exception) -> bytes:
    """An error after the first byte of a stream: OpenAI's clients raise on `error` in the data."""
    return b"data: " + to_json(error_object(problem_of(exc))) + b"\n\n"
