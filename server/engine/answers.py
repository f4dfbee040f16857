"""Open requests and what they have been told: tokens to text, finish reasons, events."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import inf

from polyhead.server.engine.batch import Batch, Row, Sampled
from polyhead.server.engine.request import Event, Failure, FinishReason, Output, Request
from polyhead.server.engine.sequence import STEM, Sequence, sequences_of
from polyhead.server.engine.text_stream import TextStream
from polyhead.server.engine.tokenizer import Tokenizer

STRAY = "what the grammar allows next could not be found out in time"
OVERFLOW = "the task's adapter overflows: its output is not finite"


@dataclass
class _Open:
    """A request that has not been answered in full."""

    request: Request
    streams: dict[Sequence, TextStream]  # of the choices that are still open
    stem: Sequence | None


class Answers:
    """Turns a step's tokens into events, and knows which requests are open."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._open: dict[str, _Open] = {}
        self._done: list[Sequence] = []

    @property
    def open_requests(self) -> set[str]:
        return set(self._open)

    def open(self, request: Request, patience: float = inf) -> list[Sequence]:
        """Begin a request; answers the sequences to put in line.

        patience: tokens that may be computed before one that waits is overtaken no more.
        """
        heads = sequences_of(request)
        for sequence in heads + heads[0].branches:
            sequence.patience = patience
        stem = heads[0] if heads[0].index == STEM else None
        choices = heads if stem is None else stem.branches
        streams = {c: TextStream(self._tokenizer.fast, request.params.stop) for c in choices}
        self._open[request.id] = _Open(request, streams, stem)
        return heads

    def finished(self) -> list[Sequence]:
        """Sequences that ended since the last call."""
        done, self._done = self._done, []
        return done

    def take(self, batch: Batch, sampled: list[Sampled]) -> list[Event]:
        """The events of one computed step."""
        events: list[Event] = []
        for row, found in zip(batch.rows, sampled, strict=True):
            if row.sequence.request.id not in self._open:
                continue  # another choice of the same request has just ended it
            if found.overflow:
                events += self.fail([row.sequence.request.id], OVERFLOW, overflow=True)
            elif found.stray:
                events += self.fail([row.sequence.request.id], STRAY, stray=True)
            elif row.sequence.sample:
                row.sequence.logprobs += found.scored
                if found.token is not None:
                    events.append(self._extend(row.sequence, found.token, found))
            elif row.sequence.request.embeds:
                events += self._embed(row, found)
            elif row.sequence.index != STEM:
                events += self._score(row, found)
        return events

    def abort(self, request_ids: Iterable[str]) -> list[Event]:
        return [event for name in request_ids for event in self._end(name, "abort")]

    def abort_all(self) -> list[Event]:
        return self.abort(list(self._open))

    def expire(self, now: float) -> list[Event]:
        """End the requests whose deadline has passed."""
        late = [
            name
            for name, entry in self._open.items()
            if entry.request.deadline is not None and entry.request.deadline <= now
        ]
        return [event for name in late for event in self._end(name, "deadline")]

    def fail(
        self,
        request_ids: Iterable[str],
        message: str,
        *,
        overflow: bool = False,
        stray: bool = False,
    ) -> list[Event]:
        """End requests that cannot be answered."""
        known = [name for name in request_ids if name in self._open]
        for name in known:
            for _ in self._close_all(name):
                pass
        return [Failure(name, message, overflow, stray) for name in known]

    def _extend(self, sequence: Sequence, token: int, found: Sampled) -> Output:
        request = sequence.request
        stream = self._open[request.id].streams[sequence]
        sequence.tokens.append(token)
        ended = token in self._tokenizer.stop_ids and not request.params.ignore_eos
        text = "" if ended else stream.push(token)
        reason: FinishReason | None = None
        if ended or stream.stopped:
            reason = "stop"
        elif len(sequence.generated) >= request.params.max_tokens:
            reason = "length"
        if reason is not None:
            text += stream.flush()
            self._close(sequence)
        return Output(
            request.id,
            sequence.index,
            text,
            (token,),
            () if found.logprob is None else (found.logprob,),
            reason,
            cached_tokens=sequence.cached,
            prompt_logprobs=tuple(sequence.logprobs) if len(sequence.generated) == 1 else (),
        )

    def _score(self, row: Row, found: Sampled) -> list[Event]:
        sequence = row.sequence
        sequence.logprobs += found.scored
        if row.stop < len(sequence.tokens):
            return []
        self._close(sequence)
        scores = tuple(sequence.logprobs)
        tokens = tuple(sequence.generated)
        cached = sequence.cached
        return [Output(sequence.request.id, sequence.index, "", tokens, scores, "stop", cached)]

    def _embed(self, row: Row, found: Sampled) -> list[Event]:
        sequence = row.sequence
        sums = sequence.hidden or [0.0] * len(found.hidden)
        if found.hidden:
            sequence.hidden = [a + b for a, b in zip(sums, found.hidden, strict=True)]
            sequence.embedded = row.stop
        if row.stop < len(sequence.tokens):
            return []
        self._close(sequence)
        mean = tuple(value / len(sequence.tokens) for value in sequence.hidden)
        name, index = sequence.request.id, sequence.index
        return [Output(name, index, finish_reason="stop", embedding=mean)]

    def _end(self, request_id: str, reason: FinishReason) -> Iterator[Event]:
        if request_id not in self._open:
            return
        for sequence, stream in self._close_all(request_id):
            yield Output(request_id, sequence.index, stream.flush(), finish_reason=reason)

    def _close_all(self, request_id: str) -> Iterator[tuple[Sequence, TextStream]]:
        for sequence, stream in list(self._open[request_id].streams.items()):
            self._close(sequence)
            yield sequence, stream

    def _close(self, sequence: Sequence) -> None:
        entry = self._open[sequence.request.id]
        del entry.streams[sequence]
        self._done.append(sequence)
        if not entry.streams:
            del self._open[sequence.request.id]
            if entry.stem is not None:
                self._done.append(entry.stem)
