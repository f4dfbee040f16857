"""`POST /score`: rank classification."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from polyhead.server.engine.errors import EngineDraining
from polyhead.server.engine.request import Output
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.bridge import unless_client_leaves
from polyhead.server.http.errors import DeadlinePassed
from polyhead.server.http.generate import finite
from polyhead.server.http.schemas import Score, ScoreAnswer, ScoreBody
from polyhead.server.http.service import Service, request_id, the_service

router = APIRouter()


@router.post("/score", response_model=ScoreAnswer, openapi_extra=takes(ScoreBody))
async def score(
    request: Request,
    body: Annotated[ScoreBody, Depends(json_body(ScoreBody))],
    service: Annotated[Service, Depends(the_service)],
) -> Response:
    """Log-likelihood of each choice after the prompt, and the best by the mean per token."""
    service.engine.check(body.task or "", body.priority, len(body.choices))
    admitted = await service.room.run(service.admission.score, body, request_id(request))

    async def outputs() -> list[Output]:
        async with service.bridge.ask(service.engine, admitted) as answer:
            return [output async for batch in answer.batches() for output in batch]

    found = await unless_client_leaves(request.receive, outputs())
    scores = [
        _score(choice, tokens, [o for o in found if o.index == index])
        for index, (choice, tokens) in enumerate(
            zip(body.choices, map(len, admitted.continuations), strict=True)
        )
    ]
    best = max(range(len(scores)), key=lambda index: scores[index].normalised)
    answer = ScoreAnswer(scores=scores, best=best)
    return Response(answer.model_dump_json(), media_type="application/json")


def _score(choice: str | list[int], tokens: int, outputs: list[Output]) -> Score:
    ended = {output.finish_reason for output in outputs}
    if "deadline" in ended:
        raise DeadlinePassed("the deadline came before every choice was scored")
    if "abort" in ended:
        raise EngineDraining("the server shut down before every choice was scored")
    total = sum(finite(token.logprob) for output in outputs for token in output.logprobs)
    return Score(choice=choice, logprob=total, tokens=tokens, normalised=total / tokens)
