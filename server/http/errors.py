"""What can be wrong with a call, before and beside the engine and the registry.

CallError               base; each kind is answered with one status
├── MalformedBody       the body is not JSON, or not the multipart form it claims to be
├── BodyTooLarge        more bytes than `max_body_bytes`
├── UnsupportedContent  a content type or encoding that this call does not read
├── InvalidValue        a value is wrong; carries the path of each one
│   └── UnknownTaskNamed  the value is the id of a task that is not registered
├── GenerationFailed    the step that the request was part of raised
├── DeadlinePassed      the deadline came before an answer that has no partial form
└── ClientGone          the client left before its answer; nobody reads this one
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class FieldError:
    """One wrong value: its dotted path, what was found there and what was expected."""

    field: str
    message: str
    found: str = ""
    expected: str = ""


class CallError(Exception):
    """Base of everything `http` raises on purpose."""


class MalformedBody(CallError):
    """The body is not JSON, or not the multipart form it claims to be."""


class BodyTooLarge(CallError):
    """The body holds more bytes than the server accepts."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than the {limit} bytes that are accepted")
        self.limit = limit


class UnsupportedContent(CallError):
    """The content type or encoding is not one that this call reads."""


class InvalidValue(CallError):
    """One or more values are wrong."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{e.field}: {e.message}" for e in errors))
        self.errors = tuple(errors)

    @classmethod
    def of(cls, field: str, message: str, *, found: str = "", expected: str = "") -> Self:
        """A refusal of one value."""
        return cls([FieldError(field, message, found, expected)])


class UnknownTaskNamed(InvalidValue):
    """A body names a task that is not registered."""


class GenerationFailed(CallError):
    """The step that the request was part of raised."""


class DeadlinePassed(CallError):
    """The deadline came before an answer that has no partial form."""


class ClientGone(CallError):
    """The client left before its answer."""


def shown(value: Any) -> str:
    """`value` as an error message quotes it: short whatever its size."""
    if isinstance(value, dict | list | tuple):
        kind = "an object" if isinstance(value, dict) else "a list"
        return f"{kind} of {len(value)}"
    if isinstance(value, str | bytes):
        cut = value[:SHOWN_CHARACTERS]
        return repr(cut) if len(cut) == len(value) else f"{cut!r}… ({len(value)} long)"
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)
