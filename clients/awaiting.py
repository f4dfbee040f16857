"""Driving flows in an event loop, asyncio's or trio's; `blocking` is its counterpart."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import anyio
import httpx

from polyhead.clients import flows
from polyhead.clients.binding import documented
from polyhead.clients.call import Call, Page, Reply, StreamCall
from polyhead.clients.events import EventReader
from polyhead.clients.flows import Attempt, Flow, Pause
from polyhead.clients.settings import Options

P = ParamSpec("P")
T = TypeVar("T")


class AsyncDriver:
    """Does what flows want done, over one httpx client."""

    def __init__(self, http: httpx.AsyncClient, options: Options) -> None:
        self.http = http
        self.options = options

    async def run(self, flow: Flow[T]) -> T:
        """What the flow returns, or what it raises."""
        try:
            step = next(flow)
            while True:
                try:
                    done = await self._do(step)
                except httpx.RequestError as exc:
                    step = flow.throw(exc)
                else:
                    step = flow.send(done)
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _do(self, step: Attempt | Pause) -> Reply | httpx.Response | None:
        if isinstance(step, Pause):
            await anyio.sleep(step.seconds)
            return None
        request = self.options.request(self.http, step)
        try:
            with anyio.fail_after(step.seconds):
                response = await self.http.send(request, stream=True)
                if step.stream and response.is_success:
                    return response
                return await _whole(response)
        except TimeoutError as exc:
            raise httpx.ReadTimeout("the answer came too slowly", request=request) from exc


class AsyncStream(Generic[T]):
    """The pieces of an answer as they come; an iterator, best used in an `async with` block.

    The request is sent when the first piece is asked for. Leaving the block, or `close`, gives the
    connection up: the server then stops computing at once.
    """

    def __init__(self, driver: AsyncDriver, call: StreamCall[T]) -> None:
        self._pieces = _pieces(driver, call)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        return await anext(self._pieces)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream, read to its end or not."""
        await self._pieces.aclose()


class AsyncCalls:
    """Base of what has methods that call."""

    def __init__(self, driver: AsyncDriver) -> None:
        self._driver = driver


def runs(
    make: Callable[Concatenate[Options, P], Flow[T]],
) -> Callable[Concatenate[AsyncCalls, P], Coroutine[Any, Any, T]]:
    """A method that runs the flow that `make` makes."""

    async def method(self: AsyncCalls, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._driver.run(make(self._driver.options, *args, **kwargs))

    return documented(method, make, skip=1)


def sends(
    make: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncCalls, P], Coroutine[Any, Any, T]]:
    """A method that sends the call that `make` makes and gives its answer."""

    async def method(self: AsyncCalls, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = make(*args, **kwargs)
        return await self._driver.run(flows.exchange(self._driver.options, call))

    return documented(method, make)


def streams(
    make: Callable[P, StreamCall[T]],
) -> Callable[Concatenate[AsyncCalls, P], AsyncStream[T]]:
    """A method that gives the events of the call that `make` makes; it is not awaited."""

    def method(self: AsyncCalls, /, *args: P.args, **kwargs: P.kwargs) -> AsyncStream[T]:
        return AsyncStream(self._driver, make(*args, **kwargs))

    return documented(method, make)


def lists(
    make: Callable[P, Call[Page[T]]],
) -> Callable[Concatenate[AsyncCalls, P], AsyncIterator[T]]:
    """A method that gives the items of all pages, of which `make` makes the first's call."""

    def method(self: AsyncCalls, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return _items(self._driver, make(*args, **kwargs))

    return documented(method, make)


async def _items(driver: AsyncDriver, call: Call[Page[T]] | None) -> AsyncIterator[T]:
    while call is not None:
        page = await driver.run(flows.exchange(driver.options, call))
        for item in page.items:
            yield item
        call = page.following


async def _pieces(driver: AsyncDriver, call: StreamCall[T]) -> AsyncGenerator[T, None]:
    response = await driver.run(flows.opening(driver.options, call.call))
    reader = EventReader.of(response, call.event)
    try:
        async for data in response.aiter_bytes():
            for piece in reader.feed(data):
                yield piece
    except httpx.RequestError as exc:
        raise flows.connection_error(exc) from exc
    finally:
        await response.aclose()
    reader.close()


async def _whole(response: httpx.Response) -> Reply:
    try:
        content = await response.aread()
    finally:
        await response.aclose()
    return Reply(response.status_code, response.headers, content)
