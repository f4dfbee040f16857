"""Clients for a Polyhead server: `Client` and `AsyncClient`. Needs httpx and pydantic only."""

from polyhead.clients.async_client import AsyncClient
from polyhead.clients.client import Client
from polyhead.clients.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ConflictError,
    JobFailedError,
    NotFoundError,
    OutOfSpaceError,
    PermissionDeniedError,
    PolyheadError,
    RateLimitError,
    ServerError,
    StaleError,
    TooLargeError,
    UnavailableError,
    UnprocessableError,
    UnreadableAnswerError,
)
from polyhead.clients.models import Generated, Job, Piece, Point, Scored, Task, Version
from polyhead.clients.routing import Routing

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequestError",
    "Client",
    "ConflictError",
    "Generated",
    "Job",
    "JobFailedError",
    "NotFoundError",
    "OutOfSpaceError",
    "PermissionDeniedError",
    "Piece",
    "Point",
    "PolyheadError",
    "RateLimitError",
    "Routing",
    "Scored",
    "ServerError",
    "StaleError",
    "Task",
    "TooLargeError",
    "UnavailableError",
    "UnprocessableError",
    "UnreadableAnswerError",
    "Version",
]
