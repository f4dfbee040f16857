"""What can be wrong with a call, before and beside the engine and the registry.

CallError               base; each kind is answered with one status
├── MalformedBody       the body is not JSON, or not the multipart form it claims to be
├── BodyTooLarge        more bytes than `max_body_bytes`
├── BodyTooComplex      more values than are parsed
├── BadArchive          an archive that is none, or holds what is not read
├── ArchiveTooLarge     an archive of too many members, or that unpacks to too much
├── UnsupportedContent  a content type or encoding that this call does not read
├── InvalidValue        a value is wrong; carries the path of each one
│   └── UnknownTaskNamed  the value is the id of a task that is not registered
├── KeyMissing          no key was given where one is needed
├── KeyInvalid          the key is not one of those in force
├── MissingScope        the key is not for this call
├── OutsidePrefix       a new task's id does not begin with the key's prefix
├── ForeignHost         without keys: the call was addressed to another name than loopback's
├── CrossOrigin         without keys: another web site's page sends the call
├── TooManyRequests     the key's requests per minute are used up
├── TokenRateExceeded   the key's tokens per minute are used up
├── TooManyAtOnce       as many of the key's calls run as may
├── GenerationFailed    the step that the request was part of raised
├── ReaderTooSlow       the client left more of its stream unread than is kept
├── ReplicaLost         the replica that had the call is gone
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


class BodyTooComplex(CallError):
    """The body holds more values than are parsed."""

    def __init__(self, values: int, limit: int) -> None:
        super().__init__(
            f"the body holds about {values} values and at most {limit} are parsed; large tensors "
            "go as safetensors"
        )


class BadArchive(CallError):
    """The archive is none, or holds links, devices, paths that lead out of it, or not the files."""


class ArchiveTooLarge(CallError):
    """The archive holds too many members, or would unpack to more bytes than are accepted."""


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


class KeyMissing(CallError):
    """No key was given where one is needed."""

    def __init__(self) -> None:
        super().__init__("this call needs a key: Authorization: Bearer KEY")
        self.headers = {"WWW-Authenticate": "Bearer"}


class KeyInvalid(CallError):
    """The key is not one of those in force; the message never repeats it."""

    def __init__(self) -> None:
        super().__init__("the key is not one of those in force")
        self.headers = {"WWW-Authenticate": 'Bearer error="invalid_token"'}


class MissingScope(CallError):
    """The key has none of `scopes`, one of which this call needs."""

    def __init__(self, scopes: Sequence[str]) -> None:
        super().__init__(f"the key lacks the scope {' or '.join(scopes)}")
        wanted = " ".join(scopes)
        self.headers = {"WWW-Authenticate": f'Bearer error="insufficient_scope", scope="{wanted}"'}


class OutsidePrefix(CallError):
    """A new task's id does not begin with the key's prefix."""

    def __init__(self, task_id: str, prefix: str) -> None:
        super().__init__(f"task id {shown(task_id)}: expected one that begins with {prefix!r}")


class ForeignHost(CallError):
    """The call was addressed to another name than loopback's, and there are no keys."""

    def __init__(self, host: str) -> None:
        super().__init__(
            f"the header Host is {shown(host)}: without keys only localhost is answered for"
        )


class CrossOrigin(CallError):
    """A page of another web site sends the call, and there are no keys."""

    def __init__(self, origin: str) -> None:
        super().__init__(f"pages of {shown(origin)} may not call this server; see --cors-origin")


class TooManyRequests(CallError):
    """The key's requests per minute are used up; `retry_after` seconds bring the next one."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the key's requests per minute are used up")
        self.retry_after = retry_after


class TokenRateExceeded(CallError):
    """The key's tokens per minute are used up; `retry_after` seconds bring the next ones."""

    def __init__(self, retry_after: float) -> None:
        super().__init__("the key's tokens per minute are used up")
        self.retry_after = retry_after


class TooManyAtOnce(CallError):
    """As many of the key's calls run as may."""

    def __init__(self, most: int, retry_after: float) -> None:
        super().__init__(f"{most} calls of the key are running, and no more are taken")
        self.retry_after = retry_after


class GenerationFailed(CallError):
    """The step that the request was part of raised."""


class ReaderTooSlow(CallError):
    """The client left more of its stream unread than the server keeps."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the client left {limit} outputs unread, and no more are kept")


class ReplicaLost(CallError):
    """The replica that had the call is gone. Only where several replicas stand behind a gateway."""

    retry_after = 1.0

    def __init__(self, repeatable: bool) -> None:
        advice = (
            "the call can be sent again"
            if repeatable
            else "whether it took effect is not known: look before sending it again"
        )
        super().__init__(f"the replica that had this call was lost; {advice}")


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
