"""Bodies of the `/v1` calls, and how each is asked of `/generate`'s path."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from polyhead.server.http.errors import InvalidValue
from polyhead.server.http.schemas import (
    Body,
    GenerateBody,
    Message,
    ResponseFormat,
    Sampling,
    TaskId,
    TextOrIds,
    TokenIds,
)

COMPLETION_TOKENS = 16
"""OpenAI's default for completions; a chat's answer may take all the room that is left."""

OTHER_NAME = {"logprobs", "max_tokens"}
SAME_NAME = {*Sampling.model_fields, "ignore_eos", "response_format"} - OTHER_NAME


class StreamOptions(Body):
    """What a stream tells besides its choices."""

    include_usage: bool = False
    continuous_usage_stats: bool = Field(False, description="Usage in every chunk")


class AskedBody(Sampling):
    """What both calls take. A field that is null counts as left out.

    `user`, `metadata` and the two after them are taken and not looked at: they tell an operator of
    OpenAI's own service whom a request comes from.
    """

    model: TaskId
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: bool = False
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> "AskedBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidValue.of(
                "stream_options",
                "only for a stream",
                found="stream: false",
                expected="stream: true, or no stream_options",
            )
        return self

    def sampling(self) -> dict[str, Any]:
        """The fields that mean the same, under the same name, in `/generate`."""
        given = self.model_fields_set & SAME_NAME
        return {name: getattr(self, name) for name in given}

    @property
    def usage_at_end(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def usage_everywhere(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats


def _prompts_form(value: object) -> str:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return "<text>"
    first = value[0] if value else 0
    return "<token ids>" if isinstance(first, int) else "<prompts>"


Prompts = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TextOrIds], Field(fail_fast=True), Tag("<prompts>")],
    Discriminator(_prompts_form),
]


class CompletionBody(AskedBody):
    """`POST /v1/completions`."""

    prompt: Prompts
    echo: bool = False
    max_tokens: int | None = Field(None, ge=0, description="Default: 16; 0 with echo only")

    @model_validator(mode="after")
    def _something_to_say(self) -> "CompletionBody":
        if self.max_tokens == 0 and not self.echo:
            raise InvalidValue.of(
                "max_tokens",
                "nothing would be answered",
                found="0 without echo",
                expected="at least 1, or echo: true",
            )
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(part, int) for part in self.prompt):
            return [[part for part in self.prompt if isinstance(part, int)]]
        return [part for part in self.prompt if not isinstance(part, int)]

    def asked(self) -> list[GenerateBody]:
        """One body of `/generate` for each prompt."""
        fields = self.sampling()
        if self.max_tokens is not None:
            fields["max_tokens"] = max(1, self.max_tokens)
        if self.logprobs is not None:
            fields["logprobs"] = self.logprobs
        return [
            GenerateBody.model_validate({"task": self.model, "prompt": prompt, **fields})
            for prompt in self.prompts
        ]


class TextPart(Body):
    """A part of a message's content. Only text is understood."""

    type: Literal["text"]
    text: str


def _content_form(value: object) -> str:
    return "<text>" if isinstance(value, str) else "<parts>"


Content = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[TextPart], Field(min_length=1, fail_fast=True), Tag("<parts>")],
    Discriminator(_content_form),
]


class ChatMessage(Body):
    """One turn; a developer's message is the system's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def plain(self) -> Message:
        text = self.content
        if not isinstance(text, str):
            text = "".join(part.text for part in text)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatBody(AskedBody):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1, description="Default: the room left")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, description="Alternatives per token")

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidValue.of(
                "top_logprobs",
                "only with logprobs",
                found=f"{self.top_logprobs} without logprobs",
                expected="logprobs: true, or no top_logprobs",
            )
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise InvalidValue.of(
                "max_tokens",
                "differs from max_completion_tokens",
                found=f"{self.max_tokens} and {self.max_completion_tokens}",
                expected="one of them, or the same number",
            )
        return self

    def asked(self) -> GenerateBody:
        """The body of `/generate` that asks the same."""
        fields = self.sampling()
        most = self.max_completion_tokens or self.max_tokens
        if most is not None:
            fields["max_tokens"] = most
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        messages = [message.plain() for message in self.messages]
        return GenerateBody.model_validate({"task": self.model, "messages": messages, **fields})

    def renamed(self) -> dict[str, str]:
        """What this body calls the fields of `/generate` that have another name here."""
        most = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {"max_tokens": most, "logprobs": "top_logprobs"}
