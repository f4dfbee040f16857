"""Every test of the clients runs on both: on the asynchronous one through a loop in a thread."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from inspect import isawaitable
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from polyhead.clients import AsyncClient, Client


class InLoop:
    """An asynchronous client, or a part of it, with blocking methods."""

    def __init__(self, target: Any, portal: BlockingPortal) -> None:
        self._target = target
        self._portal = portal

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        return partial(self._call, value) if callable(value) else InLoop(value, self._portal)

    def _call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            made = method(*args, **kwargs)
            return await made if isawaitable(made) else made

        result = self._portal.call(call)
        if hasattr(result, "__anext__"):
            return IteratedInLoop(result, self._portal)
        return InLoop(result, self._portal) if isinstance(result, AsyncClient) else result


class IteratedInLoop:
    """An asynchronous stream or list as a blocking one."""

    def __init__(self, target: Any, portal: BlockingPortal) -> None:
        self._target = target
        self._portal = portal

    def __iter__(self) -> "IteratedInLoop":
        return self

    def __next__(self) -> Any:
        try:
            return self._portal.call(self._target.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None

    def __enter__(self) -> "IteratedInLoop":
        self._portal.call(self._target.__aenter__)
        return self

    def __exit__(self, *error: Any) -> None:
        self._portal.call(self._target.__aexit__, *error)

    def close(self) -> None:
        self._portal.call(self._target.close)


Make = Callable[..., Any]


@pytest.fixture(params=["blocking", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Make]:
    """Makes clients; typed as Any, because each stands for `Client` and `AsyncClient`."""
    with ExitStack() as stack:
        if request.param == "blocking":
            yield lambda *args, **kwargs: stack.enter_context(Client(*args, **kwargs))
            return
        portal = stack.enter_context(start_blocking_portal())

        def make(*args: Any, **kwargs: Any) -> InLoop:
            client = InLoop(AsyncClient(*args, **kwargs), portal)
            stack.callback(client.close)
            return client

        yield make
