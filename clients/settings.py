"""How calls are sent: address, key, times and tries; and the requests that follow from it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from polyhead.clients.flows import Attempt

DEFAULT_URL = "http://127.0.0.1:8000"
CONNECT_SECONDS = 5.0
LOOPBACK = ("all://127.0.0.1", "all://localhost", "all://[::1]")
"""A proxy of the environment would look for these on its own machine."""


@dataclass(frozen=True)
class Options:
    """How calls are sent.

    timeout: seconds that one attempt may take; of a stream, the longest silence. total_timeout:
    seconds for all attempts and the pauses between them. max_retries: attempts after the first.
    """

    base_url: str
    headers: Mapping[str, str] = field(repr=False)  # the key is in them
    timeout: float | None
    total_timeout: float | None
    max_retries: int

    @classmethod
    def of(
        cls,
        base_url: str | None,
        api_key: str | None,
        timeout: float | None,
        total_timeout: float | None,
        max_retries: int,
    ) -> "Options":
        """With what is None read from `POLYHEAD_URL` and `POLYHEAD_API_KEY`."""
        url = base_url or os.environ.get("POLYHEAD_URL") or DEFAULT_URL
        key = api_key or os.environ.get("POLYHEAD_API_KEY")
        headers = {"User-Agent": f"polyhead-python/{version('polyhead')}"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        return cls(url.rstrip("/"), headers, timeout, total_timeout, max_retries)

    def request(self, http: httpx.Client | httpx.AsyncClient, attempt: "Attempt") -> httpx.Request:
        """The request of one attempt."""
        call, seconds = attempt.call, attempt.seconds
        connect = CONNECT_SECONDS if seconds is None else min(CONNECT_SECONDS, seconds)
        return http.build_request(
            call.method,
            self.base_url + call.path,
            json=call.body,
            files=call.form,
            params=call.query,
            headers={**self.headers, **call.headers},
            timeout=httpx.Timeout(seconds, connect=connect),
        )


def changed(
    options: Options, timeout: float | None, total_timeout: float | None, max_retries: int | None
) -> Options:
    """`options` with those of the values that are not None."""
    values = {"timeout": timeout, "total_timeout": total_timeout, "max_retries": max_retries}
    given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    return replace(options, **given)
