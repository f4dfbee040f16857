import itertools

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyhead.server.engine.kv_cache import KVShape, KVStore
from polyhead.server.engine.kv_space import SMALLEST_ROW, Copy, KVSpace, Resize, row_capacities

BUDGET, LONGEST = 3000, 900


class RowsUnderRandomUse(RuleBasedStateMachine):
    """Every owner's tokens carry values of their own; whatever moves, they must stay readable."""

    def __init__(self) -> None:
        super().__init__()
        self.space = KVSpace(BUDGET, LONGEST)
        shape = KVShape(layers=1, heads=1, width=1)
        self.store = KVStore(shape, self.space.capacities, torch.float32, torch.device("cpu"))
        self.lengths: dict[int, int] = {}  # what each owner has reserved
        self.written: dict[int, list[float]] = {}
        self.owners = 0
        self.stamp = 0.0

    @rule(length=st.integers(1, LONGEST))
    def arrive(self, length: int) -> None:
        self.owners += 1
        if self.space.reserve(self.owners, length):
            self.lengths[self.owners], self.written[self.owners] = length, []

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), more=st.integers(0, 300))
    def grow(self, data: st.DataObject, more: int) -> None:
        owner = data.draw(st.sampled_from(sorted(self.lengths)))
        length = min(LONGEST, self.lengths[owner] + more)
        if self.space.reserve(owner, length):
            self.lengths[owner] = length

    @precondition(lambda self: self.lengths)
    @rule(data=st.data(), change=st.integers(-200, 300))
    def fork(self, data: st.DataObject, change: int) -> None:
        source = data.draw(st.sampled_from(sorted(self.lengths)))
        length = max(1, min(LONGEST, self.lengths[source] + change))
        self.owners += 1
        if self.space.fork(source, self.owners, length):
            self.lengths[self.owners] = length
            self.written[self.owners] = self.written[source][:length]

    @precondition(lambda self: self.lengths)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.lengths)))
        self.space.release(owner)
        del self.lengths[owner], self.written[owner]

    @rule()
    def step(self) -> None:
        """Carry the operations out, check what is there, then write what is new."""
        self.store.carry_out(self.space.drain())
        for owner, values in self.written.items():
            row = self.row(owner).tolist()
            assert row == values + [0.0] * (len(row) - len(values))  # nothing of former owners
        for owner, length in self.lengths.items():
            self.write(owner, length)
        for owner, values in self.written.items():  # no two owners share memory
            assert self.row(owner)[: len(values)].tolist() == values

    @rule()
    def start_over(self) -> None:
        self.space.clear()
        self.lengths.clear()
        self.written.clear()
        empty = self.store
        self.store = KVStore(empty.shape, empty.capacities, torch.float32, torch.device("cpu"))
        assert self.space.drain() == []

    def row(self, owner: int) -> torch.Tensor:
        place = self.space.place(owner)
        assert torch.equal(self.store.keys[0][place.arena], self.store.values[0][place.arena])
        return self.store.keys[0][place.arena][place.row, 0, :, 0]

    def write(self, owner: int, length: int) -> None:
        place = self.space.place(owner)
        while len(self.written[owner]) < length:
            self.stamp += 1
            for side in (self.store.keys, self.store.values):
                side[0][place.arena][place.row, 0, len(self.written[owner])] = self.stamp
            self.written[owner].append(self.stamp)

    @invariant()
    def memory_within_the_budget(self) -> None:
        rows = sum(n * c for n, c in zip(self.space._rows, self.space.capacities, strict=True))
        assert self.space.used <= rows <= BUDGET

    @invariant()
    def capacity_in_use_is_about_what_is_held(self) -> None:
        bound = sum(max(SMALLEST_ROW, 2 * length) for length in self.lengths.values())
        assert self.space.used <= bound

    @invariant()
    def the_held_rows_are_the_first_ones(self) -> None:
        for arena in range(len(self.space.capacities)):
            places = [self.space.place(o) for o in self.lengths]
            rows = sorted(p.row for p in places if p.arena == arena)
            assert rows == list(range(self.space.owned(arena)))


RowsUnderRandomUse.TestCase.settings = settings(
    max_examples=25, stateful_step_count=40, deadline=None
)
TestRowsUnderRandomUse = RowsUnderRandomUse.TestCase


@pytest.mark.parametrize("longest", [1, 127, 128, 129, 1000, 4096, 5000])
def test_capacities_double_up_to_the_longest(longest: int) -> None:
    capacities = row_capacities(longest)
    assert capacities[-1] == longest
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(capacities))


def test_an_unused_space_gives_all_its_memory_back() -> None:
    space = KVSpace(4000, 500)
    for owner in range(6):
        assert space.reserve(owner, 80 * owner + 1)
    for owner in range(6):
        space.release(owner)
    rows: dict[int, int] = {}
    for operation in space.drain():
        if isinstance(operation, Resize):
            rows[operation.arena] = operation.rows
    assert space.used == 0
    assert set(rows.values()) == {0}


def test_a_full_space_refuses_and_loses_nothing() -> None:
    space = KVSpace(512, 512)
    assert all(space.reserve(owner, 128) for owner in "abcd")
    before = {owner: space.place(owner) for owner in "abcd"}
    space.drain()
    assert not space.reserve("e", 1)
    assert not space.reserve("a", 129)
    assert not space.fork("a", "f", 128)
    assert {owner: space.place(owner) for owner in "abcd"} == before
    assert not any(isinstance(operation, Copy) for operation in space.drain())
    with pytest.raises(KeyError):
        space.place("e")


def test_spare_rows_of_one_size_serve_another() -> None:
    space = KVSpace(1024, 1024)
    for owner in range(8):
        assert space.reserve(owner, 128)
    for owner in range(1, 8):
        space.release(owner)
    assert space.reserve("long", 512)


def test_a_released_owner_may_come_back() -> None:
    space = KVSpace(512, 512)
    space.reserve("a", 300)
    space.release("a")
    space.release("a")
    assert space.reserve("a", 10)
    assert space.place("a").arena == 0


def test_the_store_tells_what_a_resize_frees() -> None:
    store = KVStore(KVShape(2, 1, 4), [8], torch.float32, torch.device("cpu"))
    store.carry_out([Resize(0, 4)])
    assert store.trimming.untrimmed == 0
    before = store.nbytes
    store.carry_out([Resize(0, 1)])
    assert before > store.nbytes
    assert store.trimming.untrimmed == before
