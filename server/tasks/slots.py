"""Private adapters that are resident: as many as a budget of memory holds, pinned while in use."""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from polyhead.adapters.plan import Adapter, PreparedAdapter
from polyhead.adapters.private import PrivateAdapter
from polyhead.server.tasks.errors import AdapterTooLarge, SlotsBusy
from polyhead.server.tasks.staging import Staged, Staging
from polyhead.server.tasks.task import Task

MAX_SIZES = 65536
"""Sizes that are remembered of adapters that are not resident."""
STAGED_SHARE = 4
"""The staged ones may take one part in so many of the resident ones' memory, beside it."""


@dataclass(eq=False)
class Slot:
    """One generation of a task with its factors, where the layers read them."""

    task: Task
    prepared: PreparedAdapter
    pins: int = 0
    kept: bool = True  # False: its task has changed, so it goes with its last pin


class Hold:
    """A pin. It is given back when the last of those who entered it leaves, or else with this
    object: a traceback can keep a request, and so its adapter, alive long after its answer."""

    def __init__(self, slot: Slot, let_go: Callable[[Slot], None]) -> None:
        self._slot = slot
        self._let_go = let_go
        self._users = 0
        self._pins = True

    def __enter__(self) -> None:
        self._users += 1

    def __exit__(self, *error: object) -> None:
        self._users -= 1
        if not self._users:
            self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        if self._pins:
            self._pins = False
            self._let_go(self._slot)


def in_use(adapter: Adapter) -> AbstractContextManager[None]:
    """A block in which a request runs with `adapter`: after the last such block its slot is free.

    All blocks of one hold are entered on one thread, the first before any is left.
    """
    hold = adapter.hold if isinstance(adapter, PreparedAdapter) else None
    return hold if isinstance(hold, Hold) else nullcontext()


class Slots:
    """Holds prepared adapters within `max_bytes`; the least recently used one that nobody runs
    with makes room. Safe to call from any thread.

    prepare: lays an adapter out for the layers. It runs on the caller's thread, a pool's, so that
    neither loading nor evicting is ever waited for by a step.

    For a request that waits, `stage` reads its adapter ahead: a slot once free is soon used.
    """

    def __init__(
        self, prepare: Callable[[PrivateAdapter], PreparedAdapter], max_bytes: int = 256 << 20
    ) -> None:
        self._prepare = prepare
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._slots: OrderedDict[str, Slot] = OrderedDict()  # by task, least recently used first
        self._released: deque[Slot] = deque()
        self._staging = Staging(max_bytes // STAGED_SHARE)
        self._sizes: dict[str, int] = {}
        self._bytes = 0
        self._orphans = 0
        self.loads = 0
        self.evictions = 0
        self.on_release: Callable[[], None] = lambda: None
        """Called on any thread after a request let go of its adapter; it must not block."""

    @property
    def nbytes(self) -> int:
        """Memory of everything resident, in bytes; at most the budget."""
        return self._bytes

    def __len__(self) -> int:
        """How many adapters are resident, those of former generations included."""
        return len(self._slots) + self._orphans

    @property
    def staged_bytes(self) -> int:
        """Memory of what waits for a slot, in bytes: at most a quarter of the budget, or one."""
        with self._lock:
            return self._staging.nbytes

    @property
    def pinned(self) -> int:
        """How many of them requests run with."""
        with self._lock:
            self._settle()
            return sum(1 for slot in self._slots.values() if slot.pins) + self._orphans

    def check(self, adapter: PrivateAdapter) -> None:
        """Raises `AdapterTooLarge` for an adapter that could never be resident."""
        self._check_size(self._prepare(adapter))

    def find(self, task_id: str) -> tuple[Task, PreparedAdapter] | None:
        """The task's adapter, pinned, or None. Raises `SlotsBusy` where reading it is known to be
        in vain."""
        with self._lock:
            self._settle()
            slot = self._slots.get(task_id)
            if slot is not None:
                self._slots.move_to_end(task_id)
                return self._pin(slot)
            staged = self._staging.find(task_id)
            if staged is not None:
                return self._pin(self._place(Slot(staged.task, staged.prepared)))
            size = self._sizes.get(task_id, 0)
            idle = sum(s.prepared.nbytes for s in self._slots.values() if not s.pins)
            if self._bytes - idle + size > self._max_bytes:
                raise SlotsBusy(task_id)
            return None

    def put(
        self, task: Task, adapter: PrivateAdapter, still_current: Callable[[], bool]
    ) -> tuple[Task, PreparedAdapter]:
        """Make an adapter resident, and pin it.

        still_current: asked under the lock; False where the task has changed since it was read, so
        that it must not be found again. Raises `AdapterTooLarge` or `SlotsBusy`.
        """
        slot = Slot(task, self._prepare(adapter))
        nbytes = self._check_size(slot.prepared)
        with self._lock:
            self._settle()
            known = self._slots.get(task.id)
            if known is not None and known.task == task:
                return self._pin(known)
            self._remember(task.id, nbytes)
            return self._pin(self._place(slot, still_current))

    def may_stage(self, task_id: str) -> bool:
        """Whether reading an adapter ahead is not known to be in vain."""
        with self._lock:
            return self._staging.has_room(self._sizes.get(task_id, 0))

    def stage(
        self, task: Task, adapter: PrivateAdapter, still_current: Callable[[], bool]
    ) -> Staged | None:
        """Lay an adapter out for a request that waits for a slot; `find` puts it into one as soon
        as there is room, while somebody keeps what this returns. None where it has changed, or too
        many are staged. Raises `AdapterTooLarge`."""
        prepared = self._prepare(adapter)
        self._check_size(prepared)
        with self._lock:
            if not still_current():
                return None
            return self._staging.find(task.id) or self._staging.put(task, prepared)

    def forget(self, task_id: str) -> None:
        """The task has changed: nobody finds its adapter any more; who runs with it keeps it."""
        with self._lock:
            self._settle()
            self._sizes.pop(task_id, None)
            self._staging.forget(task_id)
            self._drop(task_id)

    def _place(self, slot: Slot, still_current: Callable[[], bool] = lambda: True) -> Slot:
        nbytes = slot.prepared.nbytes
        self._make_room(slot.task.id, nbytes)
        self.loads += 1
        self._bytes += nbytes
        self._staging.forget(slot.task.id)
        slot.kept = still_current()
        if slot.kept:
            self._drop(slot.task.id)
            self._slots[slot.task.id] = slot
        else:
            self._orphans += 1
        return slot

    def _pin(self, slot: Slot) -> tuple[Task, PreparedAdapter]:
        slot.pins += 1
        return slot.task, replace(slot.prepared, hold=Hold(slot, self._let_go))

    def _let_go(self, slot: Slot) -> None:
        # Called wherever the last reference happens to go, perhaps inside our own lock.
        self._released.append(slot)
        self.on_release()

    def _settle(self) -> None:
        while self._released:
            slot = self._released.popleft()
            slot.pins -= 1
            if not slot.kept and not slot.pins:
                self._orphans -= 1
                self._bytes -= slot.prepared.nbytes

    def _check_size(self, prepared: PreparedAdapter) -> int:
        if prepared.nbytes > self._max_bytes:
            raise AdapterTooLarge(prepared.nbytes, self._max_bytes)
        return prepared.nbytes

    def _drop(self, task_id: str) -> None:
        slot = self._slots.pop(task_id, None)
        if slot is None:
            return
        slot.kept = False
        if slot.pins:
            self._orphans += 1
        else:
            self._bytes -= slot.prepared.nbytes

    def _make_room(self, task_id: str, nbytes: int) -> None:
        idle = [name for name, slot in self._slots.items() if not slot.pins]
        free = self._max_bytes - self._bytes
        if free + sum(self._slots[name].prepared.nbytes for name in idle) < nbytes:
            raise SlotsBusy(task_id)
        for name in idle:
            if self._max_bytes - self._bytes >= nbytes:
                return
            self._bytes -= self._slots.pop(name).prepared.nbytes
            self.evictions += 1

    def _remember(self, task_id: str, nbytes: int) -> None:
        if len(self._sizes) >= MAX_SIZES:
            self._sizes.clear()
        self._sizes[task_id] = nbytes
