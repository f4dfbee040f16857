"""From a body that fits its schema to a request that cannot fail in the engine, or a refusal."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from polyhead.server.config import Settings
from polyhead.server.engine.constraint import BadSchema, Grammar, Grammars
from polyhead.server.engine.request import Request, SamplingParams
from polyhead.server.engine.tokenizer import NoChatTemplate, Tokenizer
from polyhead.server.http.answerers import Answerer, Answerers
from polyhead.server.http.checks import check_ids, check_most, check_sampling
from polyhead.server.http.errors import InvalidValue, shown
from polyhead.server.http.schemas import (
    Asking,
    GenerateBody,
    Sampling,
    ScoreBody,
    exactly_one,
)
from polyhead.server.http.templates import filled, filled_length

DEFAULT_MAX_TOKENS = 128
CHARACTERS_PER_TOKEN = 64
"""A text with more characters than this times the context is refused without tokenising it."""


@dataclass(frozen=True)
class Admission:
    """Turns bodies into requests. Its methods may be slow: call them in a thread."""

    settings: Settings
    tokenizer: Tokenizer
    answerers: Answerers
    grammars: Grammars
    max_context: int
    vocabulary: int

    def generate(self, body: GenerateBody, request_id: str) -> Request:
        """Raises `InvalidValue`, `RoutingError` or the registry's errors."""
        return self.answered(self.answerers.find(body), body, request_id)

    def answered(
        self,
        answerer: Answerer,
        body: GenerateBody,
        request_id: str,
        fallbacks: Mapping[str, Any] = MappingProxyType({}),
    ) -> Request:
        """The same for one who was found already; `fallbacks` hold where the task has no default.

        Raises `InvalidValue`.
        """
        prompt = self._prompt(body, answerer.template)
        params = self._params(body, {**fallbacks, **answerer.defaults}, len(prompt))
        return self._request(body, answerer, request_id, prompt, params=params)

    def score(self, body: ScoreBody, request_id: str) -> Request:
        """Raises `InvalidValue`, `RoutingError` or the registry's errors."""
        check_most("choices", len(body.choices), self.settings.max_choices)
        answerer = self.answerers.find(body)
        prompt = self._prompt(body, answerer.template)
        room = self.tokenizer.room(self.max_context, len(prompt))
        choices = [
            self._tokens(f"choices[{i}]", choice, room) for i, choice in enumerate(body.choices)
        ]
        return self._request(
            body,
            answerer,
            request_id,
            prompt,
            params=SamplingParams(max_tokens=1),
            continuations=tuple(choices),
        )

    def _request(
        self,
        body: Asking,
        answerer: Answerer,
        request_id: str,
        prompt: tuple[int, ...],
        **rest: Any,
    ) -> Request:
        if body.deadline is not None:
            check_most("deadline", body.deadline, self.settings.max_deadline)
        now = time.monotonic()
        return Request(
            id=request_id,
            task=answerer.name,
            generation=answerer.generation,
            adapter=answerer.adapter,
            priority=body.priority,
            deadline=None if body.deadline is None else now + body.deadline,
            arrival=now,
            **self.tokenizer.placed(prompt),
            **rest,
        )

    def _prompt(self, body: Asking, template: str) -> tuple[int, ...]:
        name = exactly_one(body, "prompt", "input", "messages")
        if body.messages is not None:
            text = sum(len(message.content) for message in body.messages)
            self._check_length(name, text)
            return self._fitting(name, self._rendered(body), self.max_context - 1)
        if body.input is None:
            return self._tokens(name, body.prompt or "", self.max_context - 1)
        self._check_length(name, filled_length(template, body.input))
        return self._tokens(name, filled(template, body.input), self.max_context - 1)

    def _rendered(self, body: Asking) -> Sequence[int]:
        turns = [message.model_dump() for message in body.messages or ()]
        try:
            return self.tokenizer.render_chat(turns)
        except NoChatTemplate as exc:
            raise InvalidValue.of(
                "messages",
                f"the backbone's chat template refused them: {exc}",
                found=" ".join(turn["role"] for turn in turns[:8]),
                expected="messages that the chat template takes",
            ) from exc

    def _tokens(self, field: str, content: str | Sequence[int], most: int) -> tuple[int, ...]:
        if not isinstance(content, str):
            self._fitting(field, content, most)
            return check_ids(field, content, self.vocabulary)
        self._check_length(field, len(content))
        return self._fitting(field, self.tokenizer.encode(content), most)

    def _check_length(self, field: str, characters: int) -> None:
        check_most(field, characters, self.max_context * CHARACTERS_PER_TOKEN, "characters")

    def _fitting(self, field: str, ids: Sequence[int], most: int) -> tuple[int, ...]:
        if not ids:
            raise InvalidValue.of(field, "empty", found="0 tokens", expected="at least 1 token")
        check_most(field, len(ids), most, "tokens")
        return tuple(ids)

    def _params(
        self, body: GenerateBody, defaults: Mapping[str, Any], prompt: int
    ) -> SamplingParams:
        given = body.model_dump(include=set(Sampling.model_fields), exclude_unset=True)
        merged = Sampling.model_validate({**defaults, **given})
        check_sampling(merged, self.settings)
        room = self.tokenizer.room(self.max_context, prompt)
        if given.get("max_tokens") is not None:
            check_most("max_tokens", given["max_tokens"], room, f"with {prompt} prompt tokens")
        stop = (merged.stop,) if isinstance(merged.stop, str) else tuple(merged.stop or ())
        return SamplingParams(
            max_tokens=min(merged.max_tokens or DEFAULT_MAX_TOKENS, room),
            temperature=merged.temperature,
            top_p=merged.top_p,
            top_k=min(merged.top_k, self.vocabulary),
            min_p=merged.min_p,
            repetition_penalty=merged.repetition_penalty,
            presence_penalty=merged.presence_penalty,
            frequency_penalty=merged.frequency_penalty,
            seed=merged.seed,
            stop=stop,
            logprobs=merged.logprobs,
            ignore_eos=body.ignore_eos,
            n=merged.n,
            grammar=self._grammar(body),
        )

    def _grammar(self, body: GenerateBody) -> Grammar | None:
        asked = body.response_format
        if asked is None or asked.type == "text":
            return None
        if asked.json_schema is None:
            return self.grammars.json_object()
        schema = asked.json_schema.body
        try:
            return self.grammars.of_schema(schema)
        except BadSchema as exc:
            raise InvalidValue.of(
                "response_format.json_schema.schema",
                str(exc),
                found=shown(schema),
                expected="a JSON schema that answers can be held to",
            ) from exc
