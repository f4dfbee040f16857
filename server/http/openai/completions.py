"""`POST /v1/completions`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from polyhead.server.engine import request as engine
from polyhead.server.engine.request import Output
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.checks import check_most
from polyhead.server.http.errors import InvalidValue
from polyhead.server.http.openai.answering import answered
from polyhead.server.http.openai.asking import admit
from polyhead.server.http.openai.schemas import COMPLETION_TOKENS, CompletionBody
from polyhead.server.http.openai.tokens import TokenForms
from polyhead.server.http.openai.writing import Writer
from polyhead.server.http.parameters import TheService
from polyhead.server.http.service import Service, request_id

router = APIRouter()


@router.post("/completions", response_class=Response, openapi_extra=takes(CompletionBody))
async def complete(
    request: Request,
    body: Annotated[CompletionBody, Depends(json_body(CompletionBody))],
    service: TheService,
) -> Response:
    """Continue one or several prompts, seen exactly so, with the task named as `model`."""
    service.engine.check(body.model, 0, body.n * (body.max_tokens or 1))
    admitted = await service.room.run(_admit, service, body, request_id(request))
    writer = CompletionWriter(admitted, body, service)
    asked = [_asked(request, body) for request in admitted]
    return await answered(request, service, asked, writer, streamed=body.stream)


def _admit(service: Service, body: CompletionBody, name: str) -> list[engine.Request]:
    if body.echo and service.tokenizer.decoder_start is not None:
        raise InvalidValue.of(
            "echo",
            "an encoder-decoder's answer does not continue its prompt",
            found="true",
            expected="false",
        )
    check_most("prompt", len(body.prompts), service.settings.max_choices, "prompts")
    return admit(service.admission, body.asked(), name, COMPLETION_TOKENS, {})


def _asked(request: engine.Request, body: CompletionBody) -> engine.Request:
    """What the engine is to do for an echo: tell the prompt's log-probabilities too, or only."""
    if body.max_tokens == 0:
        tail = request.prompt[1:]
        return replace(request, prompt=request.prompt[:1], continuations=(tail,) * request.params.n)
    return replace(request, echo=body.echo and body.logprobs is not None)


class CompletionWriter(Writer):
    """Choices as text, with the prompt in front where it is to be echoed."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self, requests: Sequence[engine.Request], body: CompletionBody, service: Service
    ) -> None:
        super().__init__(requests, body, TokenForms(service.tokenizer))
        self._only_echo = body.max_tokens == 0
        self._offsets: dict[tuple[str, int], int] = {}
        self._firsts: dict[str, int] = {}
        self._echoes: dict[str, str] = {}
        if body.echo:
            for request, prompt in zip(requests, body.prompts, strict=True):
                text = prompt if isinstance(prompt, str) else service.tokenizer.whole_text(prompt)
                self._echoes[request.id] = text
                self._firsts[request.id] = request.prompt[0]

    def _written(self, output: Output, streamed: bool) -> dict[str, Any]:
        if self._only_echo and output.finish_reason == "stop":
            output = replace(
                output,
                token_ids=(),
                logprobs=(),
                prompt_logprobs=output.logprobs,
                finish_reason="length",
            )
        return super()._written(output, streamed)

    def _choice(self, output: Output, first: bool, streamed: bool) -> dict[str, Any]:  # noqa: ARG002
        echo = self._echoes.get(output.request_id, "") if first else ""
        return {
            "text": echo + output.text,
            "logprobs": None if self._body.logprobs is None else self._logprobs(output, first),
        }

    def _logprobs(self, output: Output, first: bool) -> dict[str, Any]:
        key = (output.request_id, output.index)
        echoed = self._firsts.get(output.request_id) if first else None
        form, self._offsets[key] = self._forms.completion(
            output.prompt_logprobs + output.logprobs, self._offsets.get(key, 0), echoed
        )
        return form
