"""What the task registry refuses.

RegistryError             base; carries the task id where there is one
├── UnknownTask           no task has this id
├── TaskExists            the id is taken
├── UnknownGeneration     the task was never at this generation, as far as is remembered
├── StaleGeneration       the task is no longer at the generation the caller names
├── InvalidId             an id that could not stand in a URL
│   └── ReservedId        a valid id that Polyhead keeps for itself
├── InvalidCursor         a page was asked for with a cursor that `list` never gave
├── NotARouting           a private adapter was asked for its routing
├── AdapterTooLarge       a private adapter alone exceeds the memory for all of them
├── SlotsBusy             requests run with as many private adapters as memory holds
├── ArchiveError          a file that is not a registry's archive, or not this inventory's
├── InventoryMismatch     the stored tasks were made for another inventory
├── UnknownJob            no job has this id
├── TaskBeingFitted       another job of the same task has not ended
├── JobEnded              the job has ended, so it cannot be changed any more
│   └── JobTakenOver      another server runs the job now
├── TooManyJobs           as many jobs are open as the server takes
├── UnsupportedDatabase   the URL is not of a database that Polyhead can use
├── UnsupportedStore      the URL is not of a blob store that Polyhead can use
├── SchemaTooNew          a later version of Polyhead wrote the database
├── NotStorable           a text that the database cannot hold
└── RegistryUnavailable   the database is locked, unreadable, away: try again later
    └── StorageFull       there is no room for what was to be stored
"""


class RegistryError(Exception):
    """Base of everything the registry raises on purpose."""

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.task_id = task_id


class UnknownTask(RegistryError):
    """No task has this id."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task {task_id!r} is registered", task_id=task_id)


class TaskExists(RegistryError):
    """The id is taken."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"a task {task_id!r} is registered already", task_id=task_id)


class UnknownGeneration(RegistryError):
    """The task was never at this generation, or that is too long ago to be remembered."""

    def __init__(self, task_id: str, generation: str) -> None:
        super().__init__(
            f"the history of task {task_id!r} has no generation {generation}", task_id=task_id
        )


class StaleGeneration(RegistryError):
    """The task is at generation `found` and no longer at `expected`, which the caller names."""

    def __init__(self, task_id: str, *, found: str, expected: str) -> None:
        super().__init__(
            f"task {task_id!r} has changed: expected generation {expected}, found {found}",
            task_id=task_id,
        )
        self.found = found
        self.expected = expected


class InvalidId(RegistryError):
    """An id that could not stand in a URL or on a command line."""

    def __init__(self, task_id: str, *, expected: str) -> None:
        super().__init__(f"task id: expected {expected}; found {task_id!r}", task_id=task_id)
        self.expected = expected


class ReservedId(InvalidId):
    """A valid id that Polyhead keeps for itself."""

    def __init__(self, task_id: str) -> None:
        super().__init__(task_id, expected="an id other than the bare backbone's")


class InvalidCursor(RegistryError):
    """A page was asked for with a cursor that `list` never gave."""

    def __init__(self, cursor: str) -> None:
        super().__init__(f"cursor: expected the 'next' of an earlier page; found {cursor!r}")
        self.cursor = cursor


class NotARouting(RegistryError):
    """A private adapter was asked for something that only a routing has."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"task {task_id!r} is a private adapter, not a routing", task_id=task_id)


class AdapterTooLarge(RegistryError):
    """A private adapter alone exceeds the memory that is meant for all of them."""

    def __init__(self, nbytes: int, budget: int) -> None:
        super().__init__(
            f"the private adapter takes {nbytes} bytes; all that are resident may take {budget}"
        )


class SlotsBusy(RegistryError):
    """Requests run with as many private adapters as memory holds, for longer than was waited."""

    task_id: str

    def __init__(self, task_id: str) -> None:
        super().__init__(
            f"no room for the private adapter of task {task_id!r}: requests run with as many "
            "others as memory holds",
            task_id=task_id,
        )
        self.retry_after = 1.0


class ArchiveError(RegistryError):
    """A file that is not a registry's archive, or not one of this inventory."""


class InventoryMismatch(RegistryError):
    """The stored tasks were made for the inventory `found`; the one being served is `expected`."""

    def __init__(self, place: str, *, tasks: int, found: str, expected: str) -> None:
        super().__init__(
            f"{place}: its {tasks} tasks were made for the inventory {found}, the inventory being "
            f"served is {expected}; serve the former or give another data folder"
        )
        self.found = found
        self.expected = expected


class UnknownJob(RegistryError):
    """No job has this id."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"there is no job {job_id!r}")


class TaskBeingFitted(RegistryError):
    """Another job of the same task has not ended; the second would overwrite the first."""

    def __init__(self, task_id: str, job_id: str) -> None:
        super().__init__(
            f"task {task_id!r} is being fitted by job {job_id}; wait for it or cancel it",
            task_id=task_id,
        )


class JobEnded(RegistryError):
    """The job has ended, so it cannot be changed any more."""

    def __init__(self, job_id: str, state: str) -> None:
        super().__init__(f"job {job_id} has ended already: it has {state}")
        self.state = state


class JobTakenOver(JobEnded):
    """Another server runs the job now, because this one was not heard of for too long."""

    def __init__(self, job_id: str) -> None:
        RegistryError.__init__(self, f"job {job_id} is run by another server now")
        self.state = "running"


class TooManyJobs(RegistryError):
    """As many jobs are open as the server takes."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"{limit} jobs are queued or running, and no more are taken")
        self.retry_after = 30.0


class SchemaTooNew(RegistryError):
    """A later version of Polyhead wrote the database."""


class UnsupportedDatabase(RegistryError):
    """The URL is not of a database that Polyhead can use."""


class UnsupportedStore(RegistryError):
    """The URL is not of a blob store that Polyhead can use."""


class NotStorable(RegistryError):
    """A text that the database cannot hold: PostgreSQL knows no NUL character."""


class RegistryUnavailable(RegistryError):
    """The database is locked, unreadable or not there; what was asked for is not stored."""


class StorageFull(RegistryUnavailable):
    """There is no room for what was to be stored; what was stored before is served on."""
