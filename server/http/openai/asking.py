"""From bodies to admitted requests, and several of those as one answer."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from polyhead.server.engine.request import Output, Request
from polyhead.server.http.admission import Admission
from polyhead.server.http.bridge import Answer, Answering, Bridge
from polyhead.server.http.errors import InvalidValue
from polyhead.server.http.schemas import GenerateBody

TEMPERATURE = 1.0
"""OpenAI's default. A task's own default goes before it."""


def admit(
    admission: Admission,
    bodies: Sequence[GenerateBody],
    request_id: str,
    max_tokens: int,
    renamed: Mapping[str, str],
) -> list[Request]:
    """One request for each of `bodies`, all answered by the same generation of the same task.

    max_tokens: where neither the body nor the task says. renamed: what the call's own body calls
    the fields of `/generate`. May be slow: call it in a thread. Raises `InvalidValue`.
    """
    fallbacks = {"temperature": TEMPERATURE, "max_tokens": max_tokens}
    with naming({"task": "model", **renamed}):
        answerer = admission.answerers.find(bodies[0])
    admitted = []
    for place, body in enumerate(bodies):
        own = {"prompt": f"prompt[{place}]"} if len(bodies) > 1 else {}
        with naming({**renamed, **own}):
            name = request_id if len(bodies) == 1 else f"{request_id}-{place}"
            admitted.append(admission.answered(answerer, body, name, fallbacks))
    return admitted


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Give the fields in refusals the names that the client wrote."""
    try:
        yield
    except InvalidValue as exc:
        renamed = [replace(error, field=_renamed(error.field, names)) for error in exc.errors]
        raise type(exc)(renamed) from exc


def _renamed(path: str, names: Mapping[str, str]) -> str:
    return re.sub(r"^\w+", lambda found: names.get(found[0], found[0]), path)


class Together:
    """The answers of several requests, read as one."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self._answers = answers
        self._open = sum(len(a.request.continuations) or a.request.params.n for a in answers)

    @property
    def exhausted(self) -> bool:
        """Whether the batch that was read last holds the last output of all."""
        return self._open == 0

    async def batches(self) -> AsyncIterator[list[Output]]:
        """What arrived since the last batch, of whichever request. Raises what one of them does."""
        waiting: dict[asyncio.Future[Any], AsyncIterator[list[Output]]] = {}

        def wait_for(batches: AsyncIterator[list[Output]]) -> None:
            waiting[asyncio.ensure_future(anext(batches, None))] = batches

        for answer in self._answers:
            wait_for(answer.batches())
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                batch: list[Output] = []
                for future in done:
                    batches, found = waiting.pop(future), future.result()
                    if found is not None:
                        batch += found
                        wait_for(batches)
                self._open -= sum(1 for output in batch if output.finish_reason is not None)
                if batch:
                    yield batch
        finally:
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


@contextlib.asynccontextmanager
async def ask_all(
    bridge: Bridge, engine: Answering, requests: Sequence[Request]
) -> AsyncIterator[Together]:
    """Submit all of `requests`, or none: what was taken in is aborted when the next is refused."""
    async with contextlib.AsyncExitStack() as stack:
        yield Together(
            [await stack.enter_async_context(bridge.ask(engine, request)) for request in requests]
        )
