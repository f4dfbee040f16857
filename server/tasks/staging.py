"""Private adapters that have been read, and laid out, for requests that wait for a slot."""

from dataclasses import dataclass
from weakref import WeakValueDictionary

from polyhead.adapters.plan import PreparedAdapter
from polyhead.server.tasks.task import Task


@dataclass(frozen=True, eq=False)
class Staged:
    """One generation of a task that only needs a slot. It lasts as long as somebody keeps it."""

    task: Task
    prepared: PreparedAdapter


class Staging:
    """What is staged, within `max_bytes` or one adapter. It keeps nothing alive: whoever waits for
    an adapter does, so that none outlasts the wait. Called under the lock of the slots."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._staged = WeakValueDictionary[str, Staged]()

    @property
    def nbytes(self) -> int:
        return sum(staged.prepared.nbytes for staged in list(self._staged.values()))

    def find(self, task_id: str) -> Staged | None:
        return self._staged.get(task_id)

    def has_room(self, nbytes: int) -> bool:
        taken = self.nbytes
        return not taken or taken + nbytes <= self._max_bytes

    def put(self, task: Task, prepared: PreparedAdapter) -> Staged | None:
        """None where others have taken what memory there is."""
        if not self.has_room(prepared.nbytes):
            return None
        staged = self._staged[task.id] = Staged(task, prepared)
        return staged

    def forget(self, task_id: str) -> None:
        self._staged.pop(task_id, None)
