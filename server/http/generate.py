"""`POST /generate`."""

import math
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from polyhead.server.engine import request as engine
from polyhead.server.engine.request import Output, TokenLogprob
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.bridge import OVERFLOW, Answer, unless_client_leaves
from polyhead.server.http.described import EVENTS
from polyhead.server.http.errors import GenerationFailed
from polyhead.server.http.schemas import (
    Candidate,
    Choice,
    GenerateAnswer,
    GenerateBody,
    TokenAnswer,
    Usage,
)
from polyhead.server.http.service import Service, request_id, the_service
from polyhead.server.http.stream import EventStream

router = APIRouter()


@router.post(
    "/generate",
    response_model=GenerateAnswer,
    responses=EVENTS,
    openapi_extra=takes(GenerateBody),
)
async def generate(
    request: Request,
    body: Annotated[GenerateBody, Depends(json_body(GenerateBody))],
    service: Annotated[Service, Depends(the_service)],
) -> Response:
    """Continue a prompt with one task's adapter, as one answer or as server-sent events."""
    admission = service.admission
    service.engine.check(body.task or "", body.priority, body.n * (body.max_tokens or 1))
    admitted = await service.room.run(admission.generate, body, request_id(request))
    ask = service.bridge.ask(service.engine, admitted)
    if body.stream:
        return EventStream(ask, StreamEncoder(admitted, body.return_token_ids, service.tokenizer))

    async def collected() -> GenerateAnswer:
        async with ask as answer:
            return await collect(answer, body.return_token_ids, service.tokenizer)

    whole = await unless_client_leaves(request.receive, collected())
    return Response(whole.model_dump_json(exclude_none=True), media_type="application/json")


async def collect(answer: Answer, with_ids: bool, tokenizer: Tokenizer) -> GenerateAnswer:
    """Wait for the whole answer."""
    request, outputs = answer.request, []
    async for batch in answer.batches():
        outputs.extend(batch)
    tally = Tally(request)
    for output in outputs:
        tally.add(output)
    choices = [
        _choice(index, [o for o in outputs if o.index == index], request, with_ids, tokenizer)
        for index in range(request.params.n)
    ]
    return GenerateAnswer(
        id=request.id,
        task=request.task,
        generation=request.generation,
        choices=choices,
        usage=tally.usage(),
    )


def _choice(
    index: int, outputs: list[Output], request: engine.Request, with_ids: bool, tokenizer: Tokenizer
) -> Choice:
    wanted = request.params.logprobs is not None
    return Choice(
        index=index,
        text="".join(output.text for output in outputs),
        token_ids=[token for o in outputs for token in o.token_ids] if with_ids else None,
        finish_reason=outputs[-1].finish_reason or "abort",
        logprobs=[token_answer(p, tokenizer) for o in outputs for p in o.logprobs]
        if wanted
        else None,
    )


class Tally:
    """Counts a request's tokens."""

    def __init__(self, request: engine.Request) -> None:
        self._prompt = len(request.asked)
        self._completion = 0
        self._cached = 0

    def add(self, output: Output) -> None:
        self._completion += len(output.token_ids)
        self._cached = max(self._cached, output.cached_tokens)

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            cached_tokens=self._cached,
        )


class StreamEncoder:
    """Turns one request's outputs into the objects of its events."""

    def __init__(self, request: engine.Request, with_ids: bool, tokenizer: Tokenizer) -> None:
        self._tally = Tally(request)
        self._with_ids = with_ids
        self._with_logprobs = request.params.logprobs is not None
        self._tokenizer = tokenizer

    def __call__(self, output: Output, last: bool) -> list[dict[str, Any]]:
        self._tally.add(output)
        data: dict[str, Any] = {"index": output.index, "text": output.text}
        if self._with_ids:
            data["token_ids"] = output.token_ids
        if self._with_logprobs:
            tokens = [token_answer(p, self._tokenizer) for p in output.logprobs]
            data["logprobs"] = [token.model_dump() for token in tokens]
        if output.finish_reason is not None:
            data["finish_reason"] = output.finish_reason
        if last:
            data["usage"] = self._tally.usage().model_dump()
        return [data]


def token_answer(found: TokenLogprob, tokenizer: Tokenizer) -> TokenAnswer:
    """A token's log-probability with its text. Raises what `finite` raises."""
    return TokenAnswer(
        token_id=found.token_id,
        token=tokenizer.token_text(found.token_id),
        logprob=finite(found.logprob),
        top=[
            Candidate(token_id=token, token=tokenizer.token_text(token), logprob=finite(logprob))
            for token, logprob in found.top
        ],
    )


def finite(logprob: float) -> float:
    """`logprob`, if JSON can hold it. Raises `GenerationFailed` where it is not finite."""
    if not math.isfinite(logprob):
        raise GenerationFailed(OVERFLOW)
    return logprob
