"""What is resident: prepared adapters of the tasks in use, within a bound of memory."""

import contextlib
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from polyhead.adapters.plan import Adapter, RoutedTask
from polyhead.adapters.routing import Layout, Routing
from polyhead.server.engine.request import BASE_TASK
from polyhead.server.heap import TRIM_AFTER_BYTES, trim_heap
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots
from polyhead.server.tasks.staging import Staged
from polyhead.server.tasks.task import Task

ROW_BYTES = 4096
"""Charged for every task beside its numbers and texts: its objects, keys and bookkeeping."""


@dataclass(frozen=True)
class ResolvedTask:
    """One generation of a task, ready to serve. It stays usable after the task is gone."""

    task: Task
    adapter: Adapter  # None for the bare backbone

    @cached_property
    def nbytes(self) -> int:
        """Memory it holds, in bytes, rounded up generously."""
        task = self.task
        texts = json.dumps([task.template, task.defaults, task.metadata, task.provenance])
        if self.adapter is None:
            return ROW_BYTES
        numbers = self.adapter.weights if isinstance(self.adapter, RoutedTask) else self.adapter
        return ROW_BYTES + 4 * len(texts) + numbers.nbytes


BASE = ResolvedTask(
    Task(
        id=BASE_TASK,
        generation=BASE_TASK,
        kind="base",
        granularity=None,
        routing_kind=None,
        template=None,
        defaults={},
        metadata={},
        provenance={},
        created_at=datetime.fromtimestamp(0, UTC),
        updated_at=datetime.fromtimestamp(0, UTC),
    ),
    adapter=None,
)
"""The bare backbone, which no registry holds."""


@dataclass
class Reading:
    """Readers of one task that is not resident; a change meanwhile voids what they read."""

    readers: int = 0
    void: bool = False


class Catalogue:
    """Resolves ids to what the engine runs, keeping the most recently used within `max_bytes`.
    Private adapters lie in `slots`, which has a budget of its own.

    It follows the registry's changes: once a change has returned, the old generation is not
    resolved any more. Requests that hold a `ResolvedTask` keep its memory until they let go.
    Safe to call from any thread.
    """

    def __init__(
        self, registry: Registry, layout: Layout, slots: Slots, max_bytes: int = 512 << 20
    ) -> None:
        self._registry = registry
        self._layout = layout
        self.slots = slots
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._resident: OrderedDict[str, ResolvedTask] = OrderedDict()
        self._bytes = 0
        self._untrimmed = 0
        self._loading: dict[str, Reading] = {}
        registry.subscribe(self._forget)

    @property
    def nbytes(self) -> int:
        """Memory of everything resident but private adapters, in bytes; at most `max_bytes`."""
        return self._bytes

    def __len__(self) -> int:
        """How many tasks are resident beside those with private adapters."""
        return len(self._resident)

    def resolve(self, task_id: str) -> ResolvedTask:
        """Raises `UnknownTask`, and `RegistryUnavailable` for a task that is not resident; for a
        private adapter `SlotsBusy` and `AdapterTooLarge`."""
        if task_id == BASE_TASK:
            return BASE
        with self._lock:
            resident = self._resident.get(task_id)
            if resident is not None:
                self._resident.move_to_end(task_id)
                return resident
        private = self.slots.find(task_id)
        if private is not None:
            return ResolvedTask(*private)
        with self._reading(task_id) as reading:
            resolved = self._load(task_id, reading)
            with self._lock:
                if not reading.void:
                    self._keep(resolved)
        self._trim_after(resolved.nbytes)
        return resolved

    def stage(self, task_id: str) -> Staged | None:
        """Read a private adapter whose request waits for a slot; it is found while the result is
        kept. None where too many are. Raises what `resolve` does, but `SlotsBusy`."""
        if not self.slots.may_stage(task_id):
            return None
        with self._reading(task_id) as reading:
            task, content = self._registry.load(task_id)
            if isinstance(content, Routing):
                return None
            staged = self.slots.stage(task, content, lambda: not reading.void)
        self._trim_after(content.nbytes)
        return staged

    @contextlib.contextmanager
    def _reading(self, task_id: str) -> Iterator[Reading]:
        with self._lock:
            reading = self._loading.setdefault(task_id, Reading())
            reading.readers += 1
        try:
            yield reading
        finally:
            with self._lock:
                reading.readers -= 1
                if not reading.readers and self._loading.get(task_id) is reading:
                    del self._loading[task_id]

    def _load(self, task_id: str, reading: Reading) -> ResolvedTask:
        task, content = self._registry.load(task_id)
        if isinstance(content, Routing):
            return ResolvedTask(task, RoutedTask(task.generation, content.weights(self._layout)))
        return ResolvedTask(*self.slots.put(task, content, lambda: not reading.void))

    def _keep(self, resolved: ResolvedTask) -> None:
        private = not isinstance(resolved.adapter, RoutedTask)
        if private or resolved.task.id in self._resident or resolved.nbytes > self._max_bytes:
            return
        self._resident[resolved.task.id] = resolved
        self._bytes += resolved.nbytes
        while self._bytes > self._max_bytes:
            _, evicted = self._resident.popitem(last=False)
            self._bytes -= evicted.nbytes

    def _trim_after(self, loaded: int) -> None:
        with self._lock:
            self._untrimmed += loaded
            due = self._untrimmed >= TRIM_AFTER_BYTES
            if due:
                self._untrimmed = 0
        if due:
            trim_heap()

    def _forget(self, task_id: str) -> None:
        with self._lock:
            reading = self._loading.pop(task_id, None)
            if reading is not None:
                reading.void = True
            gone = self._resident.pop(task_id, None)
            if gone is not None:
                self._bytes -= gone.nbytes
        self.slots.forget(task_id)
