"""Sources are encoded once, held while they are answered, and kept within bounds afterwards."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
from scheduler_world import World, ask, expected, next_token

from polyhead.server.engine.batch import Batch, Row, Sampled
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.request import Request, row_lengths
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.source_cache import SourceCache

START = 1


class SourceWorld(World):
    """The loop over a model that says what follows a source and the answer so far."""

    def __init__(
        self,
        max_running: int = 8,
        max_step_tokens: int = 32,
        budget: int = 10_000,
        longest: int = 512,
        kept: int = 0,
        depth: int = 1,
    ) -> None:
        super().__init__(max_running, max_step_tokens, budget, longest, kept)
        self.space = KVSpace(budget, longest, parking=True)
        self.cache = SourceCache(
            self.space,
            kept,
            key=lambda request: request.generation,
            step_tokens=max_step_tokens,
            depth=depth,
        )
        self.scheduler = Scheduler(
            SchedulerConfig(max_running, max_step_tokens), self.space, self.cache
        )
        self.arenas = [[] for _ in self.space.capacities]
        self.encoded: list[tuple[int, ...]] = []
        self.begun: dict[object, int] = {}  # portions that have been, of sources in the making

    def _check(self, batch: Batch, decoding: set[int]) -> None:
        del decoding
        limit = self.scheduler.config.max_step_tokens
        costs = [source.cost for source in batch.sources]
        assert sum(costs) <= limit or len(costs) == 1, "only a first source may be over"
        assert batch.tokens - sum(costs) <= limit
        assert self.space.used + self.space.parked <= self.space.budget
        assert self.cache.used <= self.space.used + self.space.parked

    def _carry_out(self, batch: Batch) -> None:
        super()._carry_out(batch)
        going = {source.owner for source in batch.sources}
        self.begun = {owner: n for owner, n in self.begun.items() if owner in going}
        for source in batch.sources:
            assert source.portion == self.begun.pop(source.owner, 0), "portions in a row"
            if source.portion + 1 < source.portions:
                self.begun[source.owner] = source.portion + 1
                continue
            row = self.arenas[source.place.arena][source.place.row]
            assert not any(row), "a row is clean when it changes hands"
            row[: len(source.tokens)] = source.tokens
            self.encoded.append(source.tokens)

    def _compute(self, row: Row) -> Sampled:
        source = row.sequence.request.source
        assert row.source is not None
        assert tuple(self.arenas[row.source.arena][row.source.row][: len(source)]) == source
        found = super()._compute(row)
        if found.token is None:
            return found
        return replace(found, token=next_token([*source, *row.sequence.tokens]))


def asked(name: str, source: list[int], answer: int, *, n: int = 1, task: str = "a") -> Request:
    plain = ask(name, task, 1, answer, arrival=float(len(name)), n=n)
    return replace(plain, prompt=(START,), source=tuple(source), generation=task)


def right(request: Request) -> list[int]:
    return expected(replace(request, prompt=(*request.source, START)))


def words(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(32, 127), k=length)


def test_choices_of_one_prompt_share_its_source() -> None:
    world, request = SourceWorld(), asked("a", words(0, 20), 5, n=4)
    world.submit(request)
    world.run()
    assert world.encoded == [request.source]
    assert [world.tokens["a", i] for i in range(4)] == [right(request)] * 4
    assert world.cached["a"] == 0
    assert world.cache.used == world.space.parked == len(world.cache) == 0


def test_a_kept_source_is_found_by_the_same_tokens_of_the_same_task_only() -> None:
    world, said = SourceWorld(kept=1000), words(0, 20)
    for name, task in [("a", "one"), ("b", "one"), ("c", "two"), ("d", "one")]:
        request = asked(name, said if name != "d" else said[:-1], 5, task=task)
        world.submit(request)
        world.run()
        assert world.tokens[name, 0] == right(request)
    assert world.cached == {"a": 0, "b": 20, "c": 0, "d": 0}
    assert len(world.encoded) == len(world.cache) == 3


def test_a_kept_source_holds_neither_its_request_nor_an_adapter() -> None:
    """A private adapter's memory would be held with them, and counted nowhere."""
    world, request = SourceWorld(kept=1000), asked("a", words(0, 20), 3)
    gone = weakref.ref(request)
    world.submit(request)
    del request
    world.run()
    gc.collect()
    assert len(world.cache) == 1
    assert gone() is None


def test_the_least_recently_used_goes_first_and_no_more_is_kept_than_allowed() -> None:
    world = SourceWorld(kept=256)  # two rows of 128
    for name, seed in [("a", 1), ("b", 2), ("c", 1), ("d", 3), ("e", 1), ("f", 2)]:
        world.submit(asked(name, words(seed, 20), 3))
        world.run()
        assert world.space.parked <= 256
    assert [name for name, tokens in world.cached.items() if tokens] == ["c", "e"]


def test_a_source_longer_than_a_step_comes_in_portions_while_others_decode() -> None:
    world = SourceWorld(max_step_tokens=16, depth=12)
    world.submit(asked("a", words(1, 4), 30), asked("bb", words(2, 60), 5))
    world.submit(asked("ccc", words(3, 3), 5))
    batches = [world.step() for _ in range(9)]
    portions = [[s.portion for s in b.sources if s.portions == 8] for b in batches if b]
    assert portions == [[0], [1], [2], [3], [4], [5], [6], [7], []]
    assert [len(b.rows) for b in batches if b] == [1, 2, 2, 2, 2, 2, 1, 2, 2]
    assert all(b is not None and b.tokens <= 16 for b in batches)
    assert world.tokens["ccc", 0] == right(asked("ccc", words(3, 3), 5))
    world.abort("bb")
    world.submit(asked("dddd", words(4, 60), 5))
    for _ in range(3):
        world.step()
    world.abort("dddd")
    world.run()
    assert world.cache.used == len(world.cache) == 0


def test_nothing_but_a_portion_is_a_step_too() -> None:
    world, request = SourceWorld(max_step_tokens=16, depth=3), asked("a", words(1, 100), 2)
    world.submit(request)
    batches = [world.step() for _ in range(3)]
    assert [len(b.rows) for b in batches if b] == [0, 0, 1]
    assert [b.tokens for b in batches if b] == [34, 34, 35]  # as many portions as layers
    world.run()
    assert world.tokens["a", 0] == right(request)


def test_what_cannot_be_cut_is_encoded_whole() -> None:
    world = SourceWorld(max_step_tokens=16)
    world.submit(asked("a", words(1, 4), 30), asked("bb", words(2, 100), 5))
    world.submit(asked("ccc", words(3, 100), 5))
    batch = world.step()
    assert batch is not None
    assert [len(s.tokens) for s in batch.sources] == [4]  # the long one waits for its own step
    batch = world.step()
    assert batch is not None
    assert ([len(s.tokens) for s in batch.sources], len(batch.rows)) == ([100], 2)
    world.run()
    assert world.tokens["ccc", 0] == right(asked("ccc", words(3, 100), 5))


def test_what_fits_only_without_its_source_does_not_fit() -> None:
    space = KVSpace(512, 512, parking=True)
    assert space.fits(*row_lengths(asked("a", words(0, 256), 255)))
    assert not space.fits(*row_lengths(asked("a", words(0, 256), 256)))  # 257 take a row of 512
    assert not space.fits(*row_lengths(asked("a", words(0, 513), 1)))


@pytest.mark.parametrize("seed", range(8))
def test_random_work_in_little_room(seed: int) -> None:
    """Arrivals, preemptions and aborts; every answer is right and nothing is left behind."""
    draw = random.Random(seed)
    kept = draw.choice([0, 300, 2000])
    world = SourceWorld(
        max_running=draw.choice([2, 5]),
        max_step_tokens=24,
        budget=1200,
        longest=512,
        kept=kept,
        depth=draw.choice([1, 4, 40]),
    )
    requests, aborted = [], set()
    for number in range(30):
        source = words(draw.randrange(8), draw.choice([3, 20, 60, 200]))
        task = draw.choice("ab")
        answer = draw.choice([1, 4, 30, 150])
        request = asked(f"r{number:02}", source, answer, n=draw.choice([1, 1, 3]), task=task)
        request = replace(request, arrival=float(number))
        requests.append(request)
        world.submit(request)
        for _ in range(draw.randrange(6)):
            if world.answers.open_requests:
                world.step()
        if draw.random() < 0.15 and world.answers.open_requests:
            name = draw.choice(sorted(world.answers.open_requests))
            aborted.add(name)
            world.abort(name)
    world.run()
    for request in requests:
        for index in range(request.params.n):
            found = world.tokens.get((request.id, index), [])
            whole = right(request)
            assert found == (whole[: len(found)] if request.id in aborted else whole)
    assert world.scheduler.preemptions > 0
    assert world.cache.used == 0
    assert world.space.parked <= kept
