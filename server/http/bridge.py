"""The one place where the engine's thread meets the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Protocol, TypeVar

from starlette.types import Receive

from polyhead.server.engine.errors import EngineDead
from polyhead.server.engine.request import Event, Failure, Output, Request
from polyhead.server.http.callers import Caller, the_caller
from polyhead.server.http.errors import ClientGone, GenerationFailed, InvalidValue, ReaderTooSlow
from polyhead.server.logs import current_call
from polyhead.server.metrics import Metrics, Stopwatch, Witness
from polyhead.server.tasks.slots import in_use

T = TypeVar("T")

STEP_FAILED = "the step that the request was part of failed; try again"
OVERFLOW = "the task's adapter overflows: its output is not finite"
ENGINE_STOPPED = "the engine has stopped"


class Answering(Protocol):
    """The part of the engine that the bridge calls, on the event loop."""

    @property
    def alive(self) -> bool:
        """Whether the engine's thread can still answer."""

    def submit(self, request: Request) -> None:
        """Take a request in, or raise an `EngineError`."""

    def abort(self, request_id: str) -> None:
        """Let go of a request at once; an unknown id is no error."""


class Answer:
    """The outputs of one request, on the event loop, in the order the engine made them.

    It holds at most `most` outputs that nobody has read; with one more, the request ends.
    """

    def __init__(
        self, request: Request, engine: Answering, stopwatch: Stopwatch, caller: Caller, most: int
    ) -> None:
        self.request = request
        self._caller = caller
        self._most = most
        self._engine = engine
        self._stopwatch = stopwatch
        self._open = len(request.continuations) or request.params.n
        self._arrived: list[Output] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()

    @property
    def complete(self) -> bool:
        """Whether the engine is through with the request."""
        return self._open == 0 or self._error is not None

    @property
    def exhausted(self) -> bool:
        """Whether the batch that was read last holds the request's last output."""
        return self._open == 0 and not self._arrived

    def take(self, event: Event) -> None:
        """Keep one event of the engine's."""
        if isinstance(event, Failure):
            self.fail(self._error_of(event))
            return
        self._stopwatch.saw(event)
        if not self.request.continuations:  # those were charged with the prompt
            self._caller.charge(len(event.token_ids))
        if len(self._arrived) >= self._most:
            self._give_up()
            return
        self._arrived.append(event)
        if event.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self._stopwatch.ended()
        self._news.set()

    def _error_of(self, failure: Failure) -> Exception:
        # The engine has logged the reason; its own words may hold what no client should read.
        if not self._engine.alive:
            return EngineDead(ENGINE_STOPPED)
        if failure.stray:
            return InvalidValue.of(
                "response_format",
                "too hard to hold an answer to",
                found="a schema whose next tokens take too long to find",
                expected="simpler patterns, or fewer alternatives",
            )
        return GenerationFailed(OVERFLOW if failure.overflow else STEP_FAILED)

    def fail(self, error: Exception) -> None:
        """Whatever was already made stays readable, then `error` is raised."""
        if not self.complete:
            self._error = error
            self._stopwatch.ended("error", type(error).__name__)
            self._news.set()

    def _give_up(self) -> None:
        """Free the request's seats now: whoever should read is asleep and cannot."""
        if not self.complete:
            self._engine.abort(self.request.id)
            self._arrived.clear()
            self.fail(ReaderTooSlow(self._most))

    async def batches(self) -> AsyncIterator[list[Output]]:
        """Everything that arrived since the last batch, until the request is complete.

        Raises `GenerationFailed` or `EngineDead` where the answer breaks off.
        """
        while True:
            await self._news.wait()
            self._news.clear()
            batch, self._arrived = self._arrived, []
            if batch:
                yield batch
            if self._arrived:
                continue
            if self._error is not None:
                raise self._error
            if not self._open:
                return


class Bridge:
    """Hands requests to the engine and its events back to whoever waits for them.

    `publish` and `died` are called on the engine's thread, everything else on the event loop.
    witnesses: told of every request that the engine took in, when it is over.
    most_unread: outputs kept of one request for whoever reads them late.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        metrics: Metrics,
        witnesses: Sequence[Witness] = (),
        most_unread: int = 4096,
    ) -> None:
        self._loop = loop
        self._metrics = metrics
        self._witnesses = witnesses
        self._most_unread = most_unread
        self._answers: dict[str, Answer] = {}
        self.death: BaseException | None = None

    @property
    def waiting(self) -> int:
        """How many calls wait for the rest of their answer."""
        return len(self._answers)

    def publish(self, events: list[Event]) -> None:
        """All events of one step: one wake-up of the loop, however many requests it serves."""
        self._loop.call_soon_threadsafe(self._deliver, events)

    def died(self, error: BaseException) -> None:
        """The engine's thread has ended with `error`."""
        self._loop.call_soon_threadsafe(self._bury, error)

    @contextlib.asynccontextmanager
    async def ask(self, engine: Answering, request: Request) -> AsyncIterator[Answer]:
        """Submit `request`; leaving the block early aborts it. Raises what `submit` raises.

        The running call's caller is charged for the tokens.
        """
        caller = the_caller()
        stopwatch = Stopwatch(self._metrics, request, self._witnesses)
        answer = Answer(request, engine, stopwatch, caller, self._most_unread)
        self._answers[request.id] = answer
        _note_call(request)
        try:
            with in_use(request.adapter):
                engine.submit(request)
                caller.charge(len(request.asked) + sum(map(len, request.continuations)))
                try:
                    yield answer
                finally:
                    if not answer.complete:
                        engine.abort(request.id)
                        stopwatch.ended("abort")
        finally:
            del self._answers[request.id]

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            answer = self._answers.get(event.request_id)
            if answer is not None:
                answer.take(event)

    def _bury(self, error: BaseException) -> None:
        self.death = error
        for answer in self._answers.values():
            answer.fail(EngineDead(ENGINE_STOPPED))


def _note_call(request: Request) -> None:
    """The running call's answer and log name the generation that it was answered by."""
    call = current_call.get()
    if call is not None:
        call.asked += 1
        if not request.embeds:  # which is no answer of a task's
            call.generation = request.generation


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises `ClientGone` as soon as the client disconnects.

    The body must have been read: the next message from `receive` is then the disconnect.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone("the client left before its answer")
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
