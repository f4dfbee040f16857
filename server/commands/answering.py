"""Questions answered by the engine that serves, in one process and without HTTP."""

import threading
from collections.abc import Sequence
from itertools import count
from math import inf
from pathlib import Path
from typing import Any

from polyhead.adapters.plan import adapter_key
from polyhead.adapters.training.evaluate import Question
from polyhead.adapters.training.scores import ChoiceScore
from polyhead.server.config import Settings
from polyhead.server.engine.errors import EngineError
from polyhead.server.engine.loading import Loaded, load
from polyhead.server.engine.request import (
    BASE_TASK,
    Event,
    Failure,
    Output,
    Request,
    SamplingParams,
)

WINDOW = 256
"""Questions given to the engine at a time."""


class EngineAnswerer:
    """An `Answerer` over a started engine; close it in the end."""

    def __init__(self, loaded: Loaded) -> None:
        self._tokenizer = loaded.tokenizer
        self._events: dict[str, list[Event]] = {}
        self._left: dict[str, int] = {}  # choices that have not ended, by open request
        self._changed = threading.Condition()
        self._numbers = count()
        self._engine = loaded.engine(self._publish, on_death=lambda _: None)
        self._engine.start()

    @classmethod
    def load(cls, backbone: str, inventory: Path, device: str) -> "EngineAnswerer":
        """Raises what loading a server raises."""
        # No data folder is opened: the registry is not part of the engine.
        where: dict[str, Any] = {"backbone": backbone, "inventory": inventory, "device": device}
        settings = Settings(data_dir=Path(), max_waiting=WINDOW, max_wait_seconds=inf, **where)
        return cls(load(settings))

    def close(self) -> None:
        self._engine.stop()

    def answer(self, questions: Sequence[Question]) -> list[str]:
        """Raises `EngineError` when the engine could not answer."""
        found = self._ask([self._request(question) for question in questions])
        return ["".join(output.text for output in outputs) for outputs in found]

    def rank(self, questions: Sequence[Question]) -> list[list[ChoiceScore]]:
        """Raises `EngineError` when the engine could not answer."""
        found = self._ask([self._request(question) for question in questions])
        return [
            [_choice_score(outputs, index) for index in range(len(question.choices))]
            for question, outputs in zip(questions, found, strict=True)
        ]

    def _request(self, question: Question) -> Request:
        key = adapter_key(question.adapter) or BASE_TASK
        return Request(
            id=f"q{next(self._numbers)}",
            task=key,
            generation=key,
            adapter=question.adapter,
            params=SamplingParams(max_tokens=question.max_tokens, stop=question.stop),
            continuations=tuple(tuple(self._tokenizer.encode(c)) for c in question.choices),
            **self._tokenizer.placed(tuple(self._tokenizer.encode(question.prompt))),
        )

    def _ask(self, requests: Sequence[Request]) -> list[list[Output]]:
        answers: list[list[Output]] = []
        for first in range(0, len(requests), WINDOW // 2):
            window = requests[first : first + WINDOW // 2]
            with self._changed:
                self._left = {r.id: max(1, len(r.continuations)) for r in window}
                self._events = {request.id: [] for request in window}
            for request in window:
                self._engine.submit(request)
            with self._changed:
                self._changed.wait_for(lambda: not self._left)
            answers += [self._outputs(request) for request in window]
        return answers

    def _outputs(self, request: Request) -> list[Output]:
        events = self._events.pop(request.id)
        for event in events:
            if isinstance(event, Failure):
                raise EngineError(f"{request.task}: {event.message}")
        return [event for event in events if isinstance(event, Output)]

    def _publish(self, events: list[Event]) -> None:
        with self._changed:
            for event in events:
                self._events[event.request_id].append(event)
                if isinstance(event, Failure):
                    self._left.pop(event.request_id, None)
                elif event.finish_reason is not None:
                    self._count_down(event.request_id)
            self._changed.notify_all()

    def _count_down(self, request_id: str) -> None:
        """A scoring request ends once for every choice."""
        self._left[request_id] -= 1
        if self._left[request_id] == 0:
            del self._left[request_id]


def _choice_score(outputs: Sequence[Output], index: int) -> ChoiceScore:
    tokens = [t for output in outputs if output.index == index for t in output.logprobs]
    return ChoiceScore(sum(token.logprob for token in tokens), len(tokens))
