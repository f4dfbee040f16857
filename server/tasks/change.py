"""One change of one task, while its transaction is open."""

from dataclasses import dataclass, field

from sqlalchemy import Connection

from polyhead.server.tasks import audit, history, store
from polyhead.server.tasks.audit import Action
from polyhead.server.tasks.store import Record
from polyhead.server.tasks.task import Task


@dataclass(frozen=True)
class Change:
    """by: whoever makes it. numbers: of the entries that it adds to the log."""

    connection: Connection
    task_id: str
    by: str | None
    numbers: list[int] = field(default_factory=list)

    def note(self, action: Action, before: Task | None, after: Task | None) -> None:
        """Add the change to the log."""
        old, new = (task.generation if task else None for task in (before, after))
        self.numbers.append(audit.note(self.connection, action, self.task_id, old, new, self.by))

    def supersede(self, old: Record, new: Record, action: Action, kept: int) -> None:
        """`new` takes the place of `old`, which becomes a part of the history where its output was
        another; of that the `kept` newest stay."""
        store.update(self.connection, new)
        if old.task.generation != new.task.generation:
            history.keep(self.connection, old, "replaced", kept)
        self.note(action, old.task, new.task)
        store.drop_unused(self.connection, old.content)
