"""From a body that fits its schema to a request that cannot fail in the engine, or a refusal."""

import base64
import binascii
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import Routing, RoutingKind, mix
from polyhead.server.config import Settings
from polyhead.server.engine.request import Request, SamplingParams
from polyhead.server.engine.tokenizer import NoChatTemplate, Tokenizer
from polyhead.server.http.errors import InvalidValue, UnknownTaskNamed, shown
from polyhead.server.http.schemas import (
    INPUT,
    Asking,
    GenerateBody,
    RoutingBody,
    Sampling,
    ScoreBody,
    exactly_one,
)
from polyhead.server.tasks.catalogue import Catalogue, ResolvedTask
from polyhead.server.tasks.errors import UnknownTask

DEFAULT_MAX_TOKENS = 128
CHARACTERS_PER_TOKEN = 64
"""A text with more characters than this times the context is refused without tokenising it."""


@dataclass(frozen=True)
class Answerer:
    """Who answers: a stored task, a mixture of tasks or an inline routing."""

    name: str
    generation: str
    adapter: Adapter
    template: str = INPUT
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Admission:
    """Turns bodies into requests. Its methods may be slow: call them in a thread."""

    settings: Settings
    tokenizer: Tokenizer
    catalogue: Catalogue
    inventory: Inventory
    max_context: int
    vocabulary: int

    def generate(self, body: GenerateBody, request_id: str) -> Request:
        """Raises `InvalidValue`, `RoutingError` or the catalogue's errors."""
        answerer = self._answerer(body)
        prompt = self._prompt(body, answerer.template)
        params = self._params(body, answerer.defaults, len(prompt))
        return self._request(body, answerer, request_id, prompt, params=params)

    def score(self, body: ScoreBody, request_id: str) -> Request:
        """Raises `InvalidValue`, `RoutingError` or the catalogue's errors."""
        check_most("choices", len(body.choices), self.settings.max_choices)
        answerer = self._answerer(body)
        prompt = self._prompt(body, answerer.template)
        room = self.max_context - len(prompt)
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
            prompt=prompt,
            adapter=answerer.adapter,
            priority=body.priority,
            deadline=None if body.deadline is None else now + body.deadline,
            arrival=now,
            **rest,
        )

    def _answerer(self, body: Asking) -> Answerer:
        if body.task is not None:
            found = self._resolve("task", body.task)
            task = found.task
            return Answerer(
                task.id, task.generation, found.adapter, task.template or INPUT, task.defaults
            )
        if body.mixture is not None:
            return self._mixture(body.mixture)
        assert body.routing is not None  # the schema allows exactly one of the three
        routing = read_routing(body.routing, self.inventory)
        key = f"routing:{routing.fingerprint}"
        return Answerer("(routing)", key, RoutedTask(key, routing.weights(self.inventory.layout)))

    def _resolve(self, field: str, task_id: str) -> ResolvedTask:
        try:
            return self.catalogue.resolve(task_id)
        except UnknownTask as exc:
            raise unknown_task(field, task_id) from exc

    def _mixture(self, mixture: Mapping[str, float]) -> Answerer:
        check_most("mixture", len(mixture), self.settings.max_mixture)
        parts, digest = [], hashlib.sha256()
        for task_id, share in sorted(mixture.items()):
            found = self._resolve(f"mixture.{task_id}", task_id)
            if not isinstance(found.adapter, RoutedTask):
                raise InvalidValue.of(
                    f"mixture.{task_id}",
                    "only tasks with a routing can be mixed",
                    found="the bare backbone" if found.adapter is None else "a private adapter",
                    expected="a task with a routing",
                )
            parts.append((found.adapter.weights, share))
            digest.update(f"{found.task.generation}:{share!r};".encode())
        key = f"mixture:{digest.hexdigest()}"
        return Answerer("(mixture)", key, RoutedTask(key, mix(parts)))

    def _prompt(self, body: Asking, template: str) -> tuple[int, ...]:
        name = exactly_one(body, "prompt", "input", "messages")
        if body.messages is not None:
            text = sum(len(message.content) for message in body.messages)
            self._check_length(name, text)
            return self._fitting(name, self._rendered(body), self.max_context - 1)
        content = body.prompt if body.input is None else template.replace(INPUT, body.input)
        assert content is not None
        return self._tokens(name, content, self.max_context - 1)

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
        room = self.max_context - prompt
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
            seed=merged.seed,
            stop=stop,
            logprobs=merged.logprobs,
            ignore_eos=body.ignore_eos,
            n=merged.n,
        )


def unknown_task(field: str, task_id: str) -> UnknownTaskNamed:
    """The refusal of a body whose `field` names a task that is not registered."""
    return UnknownTaskNamed.of(
        field, "no such task", found=repr(task_id), expected="the id of a registered task"
    )


def check_most(field: str, value: float, limit: float, unit: str = "") -> None:
    """Raises `InvalidValue` where `value` is over `limit`."""
    if value > limit:
        raise InvalidValue.of(
            field,
            "over the limit",
            found=f"{value} {unit}".strip(),
            expected=f"at most {limit} {unit}".strip(),
        )


def check_ids(field: str, ids: Sequence[int], vocabulary: int) -> tuple[int, ...]:
    """`ids` as a tuple. Raises `InvalidValue` that names the first one outside `vocabulary`."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise InvalidValue.of(
                f"{field}[{place}]",
                "not in the vocabulary",
                found=shown(token),
                expected=f"0 to {vocabulary - 1}",
            )
    return tuple(ids)


def check_sampling(sampling: Sampling, settings: Settings, prefix: str = "") -> None:
    """What the schema cannot know: the limits of this server. Raises `InvalidValue`."""
    check_most(f"{prefix}n", sampling.n, settings.max_n)
    check_most(f"{prefix}logprobs", sampling.logprobs or 0, settings.max_logprobs)
    strings = [sampling.stop] if isinstance(sampling.stop, str) else sampling.stop or []
    check_most(f"{prefix}stop", len(strings), settings.max_stop_strings, "strings")
    for place, text in enumerate(strings):
        path = f"{prefix}stop" if isinstance(sampling.stop, str) else f"{prefix}stop[{place}]"
        if not text:
            raise InvalidValue.of(path, "empty", found="''", expected="at least 1 character")
        check_most(path, len(text), settings.max_stop_length, "characters")


def read_routing(body: RoutingBody, inventory: Inventory) -> Routing:
    """The routing of a body, checked against `inventory`. Raises `RoutingError`, `InvalidValue`."""
    form = exactly_one(body, "logits", "weights", "safetensors", prefix="routing.")
    layout = inventory.layout
    if body.safetensors is not None:
        routing = Routing.from_safetensors(
            from_base64("routing.safetensors", body.safetensors), layout
        )
        if "granularity" in body.model_fields_set and body.granularity != routing.granularity:
            raise InvalidValue.of(
                "routing.granularity",
                "differs from the file's",
                found=repr(body.granularity),
                expected=repr(routing.granularity),
            )
        return routing
    values = body.logits if body.logits is not None else body.weights
    assert values is not None
    kind: RoutingKind = "logits" if form == "logits" else "weights"
    return Routing.from_nested(values, layout, kind, body.granularity)


def from_base64(field: str, text: str) -> bytes:
    """The bytes of `text`. Raises `InvalidValue` where it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise InvalidValue.of(
            field, "not base64", found=shown(text), expected="base64 (RFC 4648)"
        ) from exc
