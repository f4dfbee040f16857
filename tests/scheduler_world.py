"""The engine's loop without a model: real scheduling and answers over a cache of plain lists."""

from math import inf

from factories import byte_tokenizer

from polyhead.server.engine.answers import Answers
from polyhead.server.engine.batch import Batch, Row, Sampled
from polyhead.server.engine.kv_space import Clear, KVSpace, Resize
from polyhead.server.engine.prefix_cache import PrefixCache
from polyhead.server.engine.request import Event, Output, Request, SamplingParams, TokenLogprob
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.tokenizer import Tokenizer


def next_token(tokens: list[int]) -> int:
    """What the stand-in for a model says after these tokens: it depends on every one of them."""
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 65_521
    return state % 95 + 32


def ask(
    name: str, task: str, prompt: int, answer: int, *, arrival: float, n: int = 1, priority: int = 0
) -> Request:
    """A request whose prompt has `prompt` tokens and whose answer has `answer`."""
    seed = sum(map(ord, name))
    ids = tuple((seed * 7 + i * 13) % 95 + 32 for i in range(prompt))
    params = SamplingParams(max_tokens=answer, ignore_eos=True, n=n)
    return Request(name, task, "g", ids, params=params, arrival=arrival, priority=priority)


def expected(request: Request) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(request.params.max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(request.prompt) :]


class World:
    """One step at a time, each checked: budgets, places, and that the cache holds the past."""

    def __init__(
        self,
        max_running: int = 8,
        max_step_tokens: int = 32,
        budget: int = 10_000,
        longest: int = 512,
        kept: int = 0,
    ) -> None:
        self.space = KVSpace(budget, longest, parking=kept > 0)
        config = SchedulerConfig(max_running, max_step_tokens)
        self.prefixes = PrefixCache(self.space, kept, key=lambda request: request.generation)
        self.kept = kept
        self.scheduler = Scheduler(config, self.space, self.prefixes)
        self.answers = Answers(Tokenizer(byte_tokenizer()))
        self.arenas: list[list[list[int | None]]] = [[] for _ in self.space.capacities]
        self.steps = 0
        self.computed: dict[str, int] = {}  # tokens, by request
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.scores: dict[tuple[str, int], tuple[TokenLogprob, ...]] = {}
        self.first: dict[str, int] = {}  # step of a request's first token
        self.ended: dict[tuple[str, int], str] = {}
        self.cached: dict[str, int] = {}  # tokens of the prompt, by request

    def submit(self, *requests: Request, patience: float = inf) -> None:
        for request in requests:
            for sequence in self.answers.open(request, patience):
                self.scheduler.add(sequence)

    def abort(self, name: str) -> None:
        self._note(self.answers.abort([name]))

    def run(self, limit: int = 5000) -> int:
        """Steps until nothing is open any more."""
        before = self.steps
        while self.answers.open_requests:
            assert self.steps - before < limit, f"no end after {limit} steps"
            assert self.step() is not None, "there is work, but no step"
        return self.steps - before

    def step(self) -> Batch | None:
        seated = [s for s in self.scheduler.running if not s.prefilling]
        batch = self.scheduler.schedule()
        if batch is None:
            return None
        self.steps += 1
        still = {id(s) for s in seated if s in self.scheduler.running and not s.prefilling}
        self._check(batch, still)
        self._carry_out(batch)
        sampled = [self._compute(row) for row in batch.rows]
        self.scheduler.advance(batch)
        self._note(self.answers.take(batch, sampled))
        return batch

    def _check(self, batch: Batch, decoding: set[int]) -> None:
        config = self.scheduler.config
        assert 0 < batch.tokens <= config.max_step_tokens
        assert len(self.scheduler.running) <= config.max_running
        assert self.space.parked <= self.kept
        assert self.space.used + self.space.parked <= self.space.budget
        assert len({id(row.sequence) for row in batch.rows}) == len(batch.rows)
        assert len({row.place for row in batch.rows}) == len(batch.rows)
        first = {id(row.sequence) for row in batch.rows[: len(decoding)]}
        assert decoding == first, "every running sequence decodes, before any prompt"
        for row in batch.rows:
            assert row.start == row.sequence.computed
            assert row.count >= 1
            assert row.stop <= len(row.sequence.tokens)

    def _carry_out(self, batch: Batch) -> None:
        for move in batch.operations:
            if isinstance(move, Resize):
                capacity = self.space.capacities[move.arena]
                rows = self.arenas[move.arena][: move.rows]
                while len(rows) < move.rows:
                    rows.append([None] * capacity)
                self.arenas[move.arena] = rows
            elif isinstance(move, Clear):
                row = self.arenas[move.place.arena][move.place.row]
                row[move.start :] = [None] * len(row[move.start :])
            else:
                source = self.arenas[move.source.arena][move.source.row][: move.length]
                self.arenas[move.target.arena][move.target.row][: move.length] = source

    def _compute(self, row: Row) -> Sampled:
        cache = self.arenas[row.place.arena][row.place.row]
        tokens = row.sequence.tokens
        assert cache[: row.start] == tokens[: row.start], "the cache has lost the past"
        cache[row.start : row.stop] = tokens[row.start : row.stop]
        name = row.sequence.request.id
        self.computed[name] = self.computed.get(name, 0) + row.count
        scored = tuple(TokenLogprob(tokens[p + 1], -float(p)) for p in row.scored)
        return Sampled(next_token(tokens) if row.samples else None, None, scored)

    def _note(self, events: list[Event]) -> None:
        for event in events:
            assert isinstance(event, Output)
            key = (event.request_id, event.index)
            assert key not in self.ended, "an event after the last one"
            self.tokens.setdefault(key, []).extend(event.token_ids)
            self.first.setdefault(event.request_id, self.steps)
            self.cached[event.request_id] = event.cached_tokens
            if event.logprobs:
                self.scores[key] = event.logprobs
            if event.finish_reason is not None:
                self.ended[key] = event.finish_reason
        for sequence in self.answers.finished():
            self.scheduler.finish(sequence)
