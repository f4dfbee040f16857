"""Driving flows with blocking calls; `awaiting` is its counterpart."""

import time
from collections.abc import Callable, Generator, Iterator
from types import TracebackType
from typing import Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from polyhead.clients import flows
from polyhead.clients.binding import documented
from polyhead.clients.call import Call, Page, Reply, StreamCall
from polyhead.clients.events import EventReader
from polyhead.clients.flows import Attempt, Flow, Pause
from polyhead.clients.settings import Options

P = ParamSpec("P")
T = TypeVar("T")


class Driver:
    """Does what flows want done, over one httpx client."""

    def __init__(self, http: httpx.Client, options: Options) -> None:
        self.http = http
        self.options = options

    def run(self, flow: Flow[T]) -> T:
        """What the flow returns, or what it raises."""
        try:
            step = next(flow)
            while True:
                try:
                    done = self._do(step)
                except httpx.RequestError as exc:
                    step = flow.throw(exc)
                else:
                    step = flow.send(done)
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _do(self, step: Attempt | Pause) -> Reply | httpx.Response | None:
        if isinstance(step, Pause):
            time.sleep(step.seconds)
            return None
        response = self.http.send(self.options.request(self.http, step), stream=True)
        if step.stream and response.is_success:
            return response
        return _whole(response, step.seconds)


class Stream(Generic[T]):
    """The pieces of an answer as they come; an iterator, best used in a `with` block.

    The request is sent when the first piece is asked for. Leaving the block, or `close`, gives the
    connection up: the server then stops computing at once.
    """

    def __init__(self, driver: Driver, call: StreamCall[T]) -> None:
        self._pieces = _pieces(driver, call)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        return next(self._pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the stream, read to its end or not."""
        self._pieces.close()


class Calls:
    """Base of what has methods that call."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver


def runs(
    make: Callable[Concatenate[Options, P], Flow[T]],
) -> Callable[Concatenate[Calls, P], T]:
    """A method that runs the flow that `make` makes."""

    def method(self: Calls, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._driver.run(make(self._driver.options, *args, **kwargs))

    return documented(method, make, skip=1)


def sends(make: Callable[P, Call[T]]) -> Callable[Concatenate[Calls, P], T]:
    """A method that sends the call that `make` makes and gives its answer."""

    def method(self: Calls, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._driver.run(flows.exchange(self._driver.options, make(*args, **kwargs)))

    return documented(method, make)


def streams(make: Callable[P, StreamCall[T]]) -> Callable[Concatenate[Calls, P], Stream[T]]:
    """A method that gives the events of the call that `make` makes."""

    def method(self: Calls, /, *args: P.args, **kwargs: P.kwargs) -> Stream[T]:
        return Stream(self._driver, make(*args, **kwargs))

    return documented(method, make)


def lists(make: Callable[P, Call[Page[T]]]) -> Callable[Concatenate[Calls, P], Iterator[T]]:
    """A method that gives the items of all pages, of which `make` makes the first's call."""

    def method(self: Calls, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return _items(self._driver, make(*args, **kwargs))

    return documented(method, make)


def _items(driver: Driver, call: Call[Page[T]] | None) -> Iterator[T]:
    while call is not None:
        page = driver.run(flows.exchange(driver.options, call))
        yield from page.items
        call = page.following


def _pieces(driver: Driver, call: StreamCall[T]) -> Generator[T, None, None]:
    response = driver.run(flows.opening(driver.options, call.call))
    reader = EventReader.of(response, call.event)
    try:
        for data in response.iter_bytes():
            yield from reader.feed(data)
    except httpx.RequestError as exc:
        raise flows.connection_error(exc) from exc
    finally:
        response.close()
    reader.close()


def _whole(response: httpx.Response, seconds: float | None) -> Reply:
    """Read to the end. httpx times each read; here all of them together are timed."""
    end = time.monotonic() + (float("inf") if seconds is None else seconds)
    content = bytearray()
    try:
        for data in response.iter_bytes():
            content += data
            if time.monotonic() > end:
                raise httpx.ReadTimeout("the answer came too slowly", request=response.request)
    finally:
        response.close()
    return Reply(response.status_code, response.headers, bytes(content))
