"""Outputs of the engine as OpenAI's answers: whole, or in chunks."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from polyhead.server.engine.errors import EngineDraining
from polyhead.server.engine.request import Output, Request
from polyhead.server.http.generate import Tally
from polyhead.server.http.openai.schemas import AskedBody
from polyhead.server.http.openai.tokens import TokenForms

Key = tuple[str, int]
"""A request's id and the number of its choice."""


class Writer(ABC):
    """Writes the answer of one call, which may have asked several requests.

    Choices are numbered through: those of the first prompt, then those of the second.
    """

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, requests: Sequence[Request], body: AskedBody, forms: TokenForms) -> None:
        first = requests[0]
        self._body = body
        self._forms = forms
        self._n = first.params.n
        self._places = {request.id: place for place, request in enumerate(requests)}
        self._tallies = {request.id: Tally(request) for request in requests}
        self._begun: set[Key] = set()
        self._head = {
            "id": f"{self.id_prefix}-{first.id.partition('-')[0]}",
            "created": int(time.time()),
            "model": body.model,
            "system_fingerprint": first.generation,
        }

    def whole(self, outputs: Iterable[Output]) -> dict[str, Any]:
        """All outputs as one answer. Raises `EngineDraining` where the server broke it off."""
        own: dict[Key, list[Output]] = {}
        for output in outputs:
            own.setdefault((output.request_id, output.index), []).append(output)
        choices = [self._written(joined(parts), streamed=False) for parts in own.values()]
        choices.sort(key=lambda choice: choice["index"])
        return {
            **self._head,
            "object": self.whole_object,
            "choices": choices,
            "usage": self._usage(),
        }

    def __call__(self, output: Output, last: bool) -> list[dict[str, Any]]:
        """One output as chunks: none while there is nothing to tell, a second for the usage."""
        chunks = []
        begun = (output.request_id, output.index) in self._begun
        choice = self._written(output, streamed=True)
        if not begun or output.text or output.logprobs or output.finish_reason:
            chunks.append(self._chunk([choice], with_usage=self._body.usage_everywhere))
        if last and self._body.usage_at_end:
            chunks.append(self._chunk([], with_usage=True))
        return chunks

    def _chunk(self, choices: list[dict[str, Any]], with_usage: bool) -> dict[str, Any]:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if with_usage:
            chunk["usage"] = self._usage()
        elif self._body.usage_at_end:
            chunk["usage"] = None
        return chunk

    def _written(self, output: Output, streamed: bool) -> dict[str, Any]:
        if output.finish_reason == "abort":
            raise EngineDraining("the server shut down before the answer was complete")
        self._tallies[output.request_id].add(output)
        key = (output.request_id, output.index)
        choice = self._choice(output, first=key not in self._begun, streamed=streamed)
        self._begun.add(key)
        return {
            "index": self._places[output.request_id] * self._n + output.index,
            "finish_reason": output.finish_reason,
            **choice,
        }

    @abstractmethod
    def _choice(self, output: Output, first: bool, streamed: bool) -> dict[str, Any]:
        """What the call calls an output's text and log-probabilities."""

    def _usage(self) -> dict[str, Any]:
        counts = [tally.usage() for tally in self._tallies.values()]
        prompt = sum(usage.prompt_tokens for usage in counts)
        completion = sum(usage.completion_tokens for usage in counts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in counts)},
        }


def joined(outputs: Sequence[Output]) -> Output:
    """The outputs of one choice as one."""
    return Output(
        outputs[0].request_id,
        outputs[0].index,
        "".join(output.text for output in outputs),
        tuple(token for output in outputs for token in output.token_ids),
        tuple(entry for output in outputs for entry in output.logprobs),
        outputs[-1].finish_reason,
        cached_tokens=max(output.cached_tokens for output in outputs),
        prompt_logprobs=tuple(p for output in outputs for p in output.prompt_logprobs),
    )
