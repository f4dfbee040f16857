"""Which sequences compute which tokens in the next step. Pure policy: no torch, no clock."""

from collections import Counter
from dataclasses import dataclass

from polyhead.server.engine.batch import Batch, Row
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.prefix_cache import PrefixCache
from polyhead.server.engine.reuse import Reuse
from polyhead.server.engine.sequence import STEM, Sequence
from polyhead.server.engine.waiting import WaitingLine

FORGET_EVERY = 1024
"""Steps between two clean-ups of the fairness counters."""


@dataclass(frozen=True)
class SchedulerConfig:
    """max_running sequences in a batch, max_step_tokens computed in a step."""

    max_running: int = 64
    max_step_tokens: int = 128

    def __post_init__(self) -> None:
        if not 1 <= self.max_running <= self.max_step_tokens:
            raise ValueError(
                f"max_running {self.max_running}: expected 1 to max_step_tokens "
                f"{self.max_step_tokens}, so that every running sequence can decode in every step"
            )


class Scheduler:
    """Continuous batching with chunked prefill, fairness between tasks, preemption by recompute.

    Decoding sequences always go first, one token each; what is left of the step's token budget
    goes to prompts, in chunks, least served task first. A source, which an encoder sees as a whole,
    comes in portions of its layers; where one costs more than what is left, it waits for a step in
    which it is the first.
    """

    def __init__(self, config: SchedulerConfig, space: KVSpace, reuse: Reuse | None = None) -> None:
        self.config = config
        self.space = space
        self.reuse = PrefixCache(space, 0) if reuse is None else reuse
        self.running: list[Sequence] = []
        self.stems: list[Sequence] = []  # computed prompts whose choices are not all seated yet
        self.line = WaitingLine()
        self.preemptions = 0
        self._steps = 0
        self._blocked = False  # the head of the line did not get a seat

    @property
    def free_seats(self) -> int:
        """Seats for those in line and after: none while the cache has no room for the first."""
        return 0 if self._blocked else self.config.max_running - len(self.running)

    def add(self, sequence: Sequence) -> None:
        self.line.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its cache row."""
        for place in (self.running, self.stems):
            if sequence in place:
                place.remove(sequence)
        if sequence in self.line:
            self.line.remove(sequence)
        self._free(sequence)
        self._leave_stem(sequence)

    def advance(self, batch: Batch) -> None:
        """Note that a batch has been computed. A finished stem lets its choices into the line."""
        for row in batch.rows:
            sequence = row.sequence
            sequence.computed = row.stop
            if sequence.index == STEM and sequence.remaining == 0:
                self.running.remove(sequence)
                self.stems.append(sequence)
                for branch in sequence.branches:
                    self.add(branch)

    def schedule(self) -> Batch | None:
        """The next step's work, or None when there is nothing to do."""
        self._steps += 1
        if self._steps % FORGET_EVERY == 0:
            self.line.forget_idle(self._running_tasks())
        encoded = 0
        for request, tokens in self.reuse.go_on():
            encoded += tokens
            self.line.charge(request.task, tokens)
        rows = self._decode_rows()
        self._prefill_rows(rows, encoded)
        placed = [
            Row(seq, seq.computed, n, self.space.place(seq), self.reuse.beside(seq))
            for seq, n in rows.items()
        ]
        sources = self.reuse.drain()
        return Batch(placed, self.space.drain(), sources) if rows or sources else None

    def preempt_all(self) -> None:
        """Forget every computed token; the sequences wait again and lose nothing else."""
        self._drop_stems()
        for sequence in list(self.running):
            self._preempt(sequence)
        self.reuse.clear()

    def _decode_rows(self) -> dict[Sequence, int]:
        rows: dict[Sequence, int] = {}
        for sequence in sorted(self.running, key=lambda s: s.order):
            # A preemption for an earlier one may have taken this one's seat.
            if sequence.prefilling or sequence not in self.running:
                continue
            if not self.reuse.ready(sequence):
                continue
            if self._make_room(sequence, rows):
                rows[sequence] = 1
                self.line.charge(sequence.request.task, 1)
        return rows

    def _make_room(self, sequence: Sequence, rows: dict[Sequence, int]) -> bool:
        """Hold a row for one more token, preempting the least urgent others where needed."""
        while not self.space.reserve(sequence, len(sequence.tokens)):
            if self.reuse.give_up() or self._drop_stems():
                continue
            victim = max(self.running, key=lambda s: s.order)
            self._preempt(victim)
            rows.pop(victim, None)
            if victim is sequence:
                return False
        return True

    def _prefill_rows(self, rows: dict[Sequence, int], encoded: int) -> None:
        budget = self.config.max_step_tokens - len(rows) - encoded
        pending = [s for s in self.running if s.prefilling and self.reuse.ready(s)]
        may_swap, self._blocked = True, False
        while budget > 0:
            head = None if self._blocked else self.line.peek()
            candidates = pending if head is None else [*pending, head]
            if not candidates:
                return
            sequence = min(candidates, key=self.line.urgency)
            ahead = self.reuse.ahead(sequence) if sequence is head else 0
            if encoded and ahead >= budget:
                return
            if sequence is head and not self._seat(head):
                victim = self._unfair_seat(head) if may_swap else None
                may_swap, self._blocked = False, victim is None
                if victim is not None:
                    self._free(victim)  # its seat is wanted, not its memory
                    self._preempt(victim)
                    budget += rows.pop(victim, 0)
                    pending = [s for s in pending if s is not victim]
                continue
            pending = [s for s in pending if s is not sequence]
            encoded += ahead
            budget -= ahead
            count = 0
            if self.reuse.ready(sequence):
                count = min(max(budget, 1), sequence.remaining)
                rows[sequence] = count
            budget -= count
            self.line.charge(sequence.request.task, ahead + count)

    def _seat(self, sequence: Sequence) -> bool:
        """Move the head of the line to a seat with a cache row, if there is one."""
        if len(self.running) >= self.config.max_running:
            return False
        if not self._hold_row(sequence):
            return False
        self.line.remove(sequence)
        self.running.append(sequence)
        self._leave_stem(sequence)
        return True

    def _hold_row(self, sequence: Sequence) -> bool:
        stem, length = sequence.stem, len(sequence.tokens)
        if stem is not None and self.space.fork(stem, sequence, length):
            sequence.computed, sequence.cached = stem.computed, stem.cached
            return True
        while not self.reuse.take(sequence):
            if not (self.reuse.give_up() or self._drop_stems()):
                return False
        return True

    def _free(self, sequence: Sequence) -> None:
        """Let go of a row that is no longer needed; its beginning may be of use to others."""
        if self.space.holds(sequence):
            self.reuse.keep(sequence)

    def _leave_stem(self, sequence: Sequence) -> None:
        """Free a stem once none of its choices needs it any more."""
        stem, sequence.stem = sequence.stem, None
        if stem is None:
            return
        stem.branches.remove(sequence)
        if not stem.branches and stem in self.stems:
            self.stems.remove(stem)
            self._free(stem)

    def _drop_stems(self) -> bool:
        """Give up the shared prompts; their choices will compute them on their own."""
        for stem in self.stems:
            self.space.release(stem)
            for branch in stem.branches:
                branch.stem = None
        dropped = bool(self.stems)
        self.stems.clear()
        return dropped

    def _unfair_seat(self, sequence: Sequence) -> Sequence | None:
        """Whom a waiting sequence may replace: one of a later priority, or, when its own task has
        no seat at all, the newest of the task with the most seats, two or more.

        Only those come into question who then wait behind it, so that nobody is preempted for
        nothing and seated again in the next step.
        """
        behind = [s for s in self.running if self.line.urgency(sequence) < self.line.turn(s)]
        later = [s for s in behind if s.request.priority > sequence.request.priority]
        if later:
            return max(later, key=lambda s: s.order)
        seats = Counter(s.request.task for s in self.running)
        if seats[sequence.request.task]:
            return None
        crowd = [s for s in behind if seats[s.request.task] >= 2]
        return max(crowd, key=lambda s: (seats[s.request.task], s.order), default=None)

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.reuse.drop(sequence)
        sequence.computed = 0
        self.preemptions += 1
        self.line.add(sequence)

    def _running_tasks(self) -> set[str]:
        return {sequence.request.task for sequence in self.running}
