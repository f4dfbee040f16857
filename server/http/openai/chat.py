"""`POST /v1/chat/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from polyhead.server.engine.request import Output
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.openai.answering import answered
from polyhead.server.http.openai.asking import admit
from polyhead.server.http.openai.schemas import ChatBody
from polyhead.server.http.openai.tokens import TokenForms
from polyhead.server.http.openai.writing import Writer
from polyhead.server.http.parameters import TheService
from polyhead.server.http.service import request_id

router = APIRouter()


@router.post("/chat/completions", response_class=Response, openapi_extra=takes(ChatBody))
async def chat(
    request: Request, body: Annotated[ChatBody, Depends(json_body(ChatBody))], service: TheService
) -> Response:
    """Answer a conversation, in the backbone's chat template, with the task named as `model`."""
    service.engine.check(body.model, 0, body.n * (body.max_tokens or 1))
    admitted = await service.room.run(
        admit,
        service.admission,
        [body.asked()],
        request_id(request),
        service.admission.max_context,
        body.renamed(),
    )
    writer = ChatWriter(admitted, body, TokenForms(service.tokenizer))
    return await answered(request, service, admitted, writer, streamed=body.stream)


class ChatWriter(Writer):
    """Choices as messages, or as what is added to them."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _choice(self, output: Output, first: bool, streamed: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        whole = {} if streamed else {"refusal": None}
        content = {"content": output.text} if output.text or first else {}
        wanted = self._body.logprobs
        return {
            "delta" if streamed else "message": {**role, **content, **whole},
            "logprobs": self._forms.chat(output.logprobs) if wanted else None,
        }
