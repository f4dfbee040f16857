"""What the OpenAPI description says of answers that every call may give."""

from typing import Any

from pydantic import BaseModel

from polyhead.server.http.problems import Problem

Responses = dict[int | str, dict[str, Any]]


class OpenAIError(BaseModel):
    """What is wrong, as OpenAI's clients read it; `param` is the path of the first wrong value."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIRefusal(BaseModel):
    """A refusal of a call below `/v1`."""

    error: OpenAIError


RETRY_AFTER = {"description": "Seconds to wait", "schema": {"type": "integer"}}
EVENT = {
    "type": "object",
    "required": ["data"],
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
}
EVENTS: Responses = {200: {"content": {"text/event-stream": {"schema": EVENT}}}}
"""The answer is, or may be, a stream of such events."""


def _refusals(model: type[BaseModel], media_type: str) -> Responses:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    content = {media_type: {"schema": schema}}
    described: Responses = {
        401: {"description": "A key is needed, or the one given is not in force"},
        403: {"description": "The key, or the page that calls, is not for this"},
        "4XX": {"description": "Something is wrong with the call; `code` tells what"},
        429: {
            "description": "One of the key's limits is used up",
            "headers": {"Retry-After": RETRY_AFTER},
        },
        503: {
            "description": "Full, or shutting down",
            "headers": {"Retry-After": RETRY_AFTER},
        },
        "5XX": {"description": "The server failed"},
    }
    return {status: {**told, "content": content} for status, told in described.items()}


PROBLEMS = _refusals(Problem, "application/problem+json")
OPENAI_ERRORS = _refusals(OpenAIRefusal, "application/json")
