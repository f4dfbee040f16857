"""Who may call: the dependency that every route but the health checks has, and its other half."""

import ipaddress
from collections.abc import Iterator
from typing import Annotated, get_origin
from urllib.parse import urlsplit

from fastapi import Depends, Request
from fastapi.dependencies.models import Dependant
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.types import ASGIApp, Receive, Scope, Send

from polyhead.server.http import keys
from polyhead.server.http.callers import Caller, set_caller
from polyhead.server.http.errors import CrossOrigin, ForeignHost, InvalidValue, shown
from polyhead.server.http.service import Service, the_service

ENTERED = "caller"
"""Where a call's state holds the caller whose turn has to end with the call."""

bearer = HTTPBearer(
    scheme_name="key",
    description="A key of the file that the server was started with; none without such a file.",
    auto_error=False,
)
Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]


class Needs:
    """A dependency: the call has a key with one of `scopes`, within its limits.

    It runs before the body is read, tells `the_caller()` to everything that follows, and puts the
    key's id (None where no keys are asked for) into `request.state.principal`.
    Raises `KeyMissing`, `KeyInvalid`, `MissingScope`, `TooManyRequests`, `TokenRateExceeded`,
    `TooManyAtOnce`; without keys `ForeignHost`, `CrossOrigin`; `InvalidValue` for a parameter of
    the query that the call does not know, or that is given twice.
    """

    def __init__(self, *scopes: keys.Scope) -> None:
        self.scopes = scopes

    async def __call__(
        self,
        request: Request,
        service: Annotated[Service, Depends(the_service)],
        credentials: Credentials,
    ) -> None:
        callers = service.callers
        if not callers.keyed:
            _check_browser(request, service)
        caller = callers.identify(credentials.credentials if credentials else None)
        caller.check_scope(self.scopes)
        caller.enter()
        request.scope["state"][ENTERED] = caller
        request.state.principal = caller.id
        set_caller(caller)
        _check_query(request)


class Turns:
    """ASGI middleware: whoever was let in by `Needs` leaves when the whole answer is sent."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        try:
            await self.app(scope, receive, send)
        finally:
            entered: Caller | None = state.pop(ENTERED, None)
            if entered is not None:
                entered.leave()


def _check_browser(request: Request, service: Service) -> None:
    """Without keys any page that a local browser shows could call: it may not.

    `Origin` tells a page of another site; `Host` tells one whose name was made to resolve to
    loopback. With keys neither matters: no browser adds a key by itself.
    """
    settings, host = service.settings, request.headers.get("host", "")
    if not settings.allow_remote and not is_loopback(_name(host)):
        raise ForeignHost(host)
    origin = request.headers.get("origin")
    if origin is None or origin in settings.cors_origin or "*" in settings.cors_origin:
        return
    if origin.partition("://")[2] != host:
        raise CrossOrigin(origin)


def _check_query(request: Request) -> None:
    """A misspelt filter would list everything, so it is refused as a misspelt field is; and of two
    values of one parameter nobody knows which was meant."""
    known = dict(_parameters(request.scope["route"].dependant))
    for name in request.query_params:
        values = request.query_params.getlist(name)
        if name not in known:
            expected = " or ".join(sorted(known)) or "none"
            raise _wrong_parameter(name, "unknown parameter", values, expected)
        if len(values) > 1 and not known[name]:
            raise _wrong_parameter(name, "given more than once", values, "one value")


def _wrong_parameter(name: str, message: str, values: list[str], expected: str) -> InvalidValue:
    found = shown(values if len(values) > 1 else values[0])
    return InvalidValue.of(f"query.{name[:64]}", message, found=found, expected=expected)


def _parameters(dependant: Dependant) -> Iterator[tuple[str, bool]]:
    """Names in the query that a call knows, and whether each may be repeated."""
    for field in dependant.query_params:
        yield field.alias, get_origin(field.field_info.annotation) is list
    for inner in dependant.dependencies:
        yield from _parameters(inner)


def _name(host: str) -> str:
    """A `Host` header without its port; empty where it is not one."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only. Names are not looked up."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
