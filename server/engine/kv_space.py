"""Who holds which part of the key-value cache. Plain bookkeeping, no tensors.

Sequences live in rows of power-of-two capacity, one arena of equal rows per capacity, so that the
rows of an arena can be attended to in one product without gathering. A sequence that outgrows its
row moves to the next arena; a hole is filled by the arena's last row. The rows in use take at most
about twice what the sequences hold, whatever the longest one is; an arena's spare rows come on top,
and go as soon as another arena needs their memory.
"""

from dataclasses import dataclass

SMALLEST_ROW = 128
FIRST_GROWTH = 512
"""Tokens that an empty arena of small rows starts with."""


@dataclass(frozen=True)
class Resize:
    """Make an arena hold this many rows; rows beyond that are free."""

    arena: int
    rows: int


@dataclass(frozen=True)
class Copy:
    """Copy the first `length` tokens of one row over another row."""

    source: "Place"
    target: "Place"
    length: int


@dataclass(frozen=True)
class Clear:
    """Zero a row's tokens from `start` on. Attention masks what lies behind a sequence's end, but
    a NaN or an infinity that a former owner left there would come through any mask."""

    place: "Place"
    start: int


@dataclass(frozen=True)
class Place:
    """A row: the arena and the row's index in it."""

    arena: int
    row: int


KVOperation = Resize | Copy | Clear


def row_capacities(longest: int) -> list[int]:
    """Tokens a row of each arena holds; the last one holds `longest`."""
    capacities = []
    size = min(SMALLEST_ROW, longest)
    while size < longest:
        capacities.append(size)
        size *= 2
    return [*capacities, longest]


class KVSpace:
    """Rows for owners, within a budget of tokens. Owners are any hashable objects.

    Every change is recorded as an operation; `drain` hands the operations over, in order, to
    whoever holds the tensors.

    parking: whether there are arenas, of the same capacities again, for rows that are kept and not
    computed with. Among the others they would be attended to.
    """

    def __init__(self, budget: int, longest: int, *, parking: bool = False) -> None:
        self.budget = budget
        self.longest = min(longest, budget)
        active = row_capacities(self.longest)
        self._active = len(active)
        self.capacities = active * (2 if parking else 1)
        self._owners: list[list[object]] = [[] for _ in self.capacities]
        self._rows = [0] * len(self.capacities)  # rows that have memory, used or not
        self._places: dict[object, Place] = {}
        self._lengths: dict[object, int] = {}
        self._operations: list[KVOperation] = []

    @property
    def used(self) -> int:
        """Tokens of capacity in rows that somebody computes with."""
        return self._held(slice(None, self._active))

    @property
    def parked(self) -> int:
        """Tokens of capacity in rows that are kept beside them."""
        return self._held(slice(self._active, None))

    def row_capacity(self, length: int) -> int:
        """Tokens that a row for `length` tokens takes."""
        return self.capacities[self._arena_for(length)]

    def fits(self, *lengths: int) -> bool:
        """Whether rows for so many tokens each could be held together, with nothing else."""
        if max(lengths) > self.longest:
            return False
        return sum(self.row_capacity(length) for length in lengths) <= self.budget

    def holds(self, owner: object) -> bool:
        """Whether an owner has a row."""
        return owner in self._places

    def place(self, owner: object) -> Place:
        """Where an owner's tokens are. Raises `KeyError` when it holds no row."""
        return self._places[owner]

    def owned(self, arena: int) -> int:
        """Rows of an arena that are held; they are its first ones."""
        return len(self._owners[arena])

    def reserve(self, owner: object, length: int) -> bool:
        """Give `owner` a row for `length` tokens, keeping what it holds. False when full."""
        arena = self._arena_for(length)
        old = self._places.get(owner)
        if old is None or old.arena < arena:
            if not self._take(owner, arena):
                return False
            if old is not None:
                self._record_copy(old, self._places[owner], self._lengths[owner])
                self._close_hole(old)
        self._lengths[owner] = max(length, self._lengths.get(owner, 0))
        return True

    def fork(self, source: object, target: object, length: int, shared: int | None = None) -> bool:
        """A row for `target` that starts with the first tokens of `source`'s: `shared` ones, or as
        many as there are. False when full."""
        if not self.reserve(target, length):
            return False
        shared = min(length, self._lengths[source]) if shared is None else shared
        self._record_copy(self._places[source], self._places[target], shared)
        return True

    def release(self, owner: object) -> None:
        """Free an owner's row; no effect when it holds none."""
        place = self._places.pop(owner, None)
        if place is not None:
            del self._lengths[owner]
            self._close_hole(place)

    def park(self, owner: object, keeper: object, length: int) -> bool:
        """Move the first tokens of an owner's row out of the way, for `keeper` to hold, and free
        the row. False when full; nothing has changed then."""
        if not self._take(keeper, self._active + self._arena_for(length)):
            return False
        self._lengths[keeper] = length
        self._record_copy(self._places[owner], self._places[keeper], length)
        self.release(owner)
        return True

    def reserve_aside(self, owner: object, length: int) -> bool:
        """A row out of the way for an owner that has none. False when full."""
        if not self._take(owner, self._active + self._arena_for(length)):
            return False
        self._lengths[owner] = length
        return True

    def clear(self) -> None:
        """Forget all owners, rows and pending operations, together with the tensors' holder."""
        self._owners = [[] for _ in self.capacities]
        self._rows = [0] * len(self.capacities)
        self._places.clear()
        self._lengths.clear()
        self._operations.clear()

    def drain(self) -> list[KVOperation]:
        """The operations since the last call, in the order they must be carried out."""
        operations, self._operations = self._operations, []
        return operations

    def _arena_for(self, length: int) -> int:
        return next(i for i, capacity in enumerate(self.capacities) if capacity >= length)

    def _held(self, arenas: slice) -> int:
        pairs = zip(self._owners[arenas], self.capacities[arenas], strict=True)
        return sum(len(owners) * capacity for owners, capacity in pairs)

    def _take(self, owner: object, arena: int) -> bool:
        if len(self._owners[arena]) == self._rows[arena] and not self._grow(arena):
            return False
        self._owners[arena].append(owner)
        self._places[owner] = Place(arena, len(self._owners[arena]) - 1)
        self._operations.append(Clear(self._places[owner], 0))
        return True

    def _grow(self, arena: int) -> bool:
        capacity = self.capacities[arena]
        if self._free() < capacity:
            self._trim_others(arena)
        affordable = self._free() // capacity
        if affordable < 1:
            return False
        wanted = max(1, self._rows[arena], FIRST_GROWTH // capacity)  # doubling: few resizes
        self._resize(arena, self._rows[arena] + min(affordable, wanted))
        return True

    def _free(self) -> int:
        pairs = zip(self._rows, self.capacities, strict=True)
        return self.budget - sum(rows * capacity for rows, capacity in pairs)

    def _trim_others(self, arena: int) -> None:
        for other, owners in enumerate(self._owners):
            if other != arena and len(owners) < self._rows[other]:
                self._resize(other, len(owners))

    def _resize(self, arena: int, rows: int) -> None:
        self._rows[arena] = rows
        self._operations.append(Resize(arena, rows))

    def _close_hole(self, hole: Place) -> None:
        owners = self._owners[hole.arena]
        last = owners.pop()
        if hole.row < len(owners):
            source = Place(hole.arena, len(owners))
            owners[hole.row] = last
            self._places[last] = hole
            self._record_copy(source, hole, self._lengths[last])
            self._operations.append(Clear(hole, self._lengths[last]))
        if len(owners) * 4 <= self._rows[hole.arena]:
            self._resize(hole.arena, len(owners) * 2)

    def _record_copy(self, source: Place, target: Place, length: int) -> None:
        self._operations.append(Copy(source, target, min(length, self.capacities[source.arena])))
