"""The tasks that an inventory brings with it."""

from collections.abc import Callable, Sequence

from sqlalchemy import Connection

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.routing import Routing
from polyhead.server.tasks import store
from polyhead.server.tasks.change import Change
from polyhead.server.tasks.contents import StoredContent
from polyhead.server.tasks.generations import first_generation
from polyhead.server.tasks.task import check_id


def seed(
    connection: Connection,
    inventory: Inventory,
    fingerprint: str,
    pack: Callable[[Routing], StoredContent],
) -> Sequence[str]:
    """Register those of the inventory's tasks that are free and never were; returns their ids.

    Raises `InvalidId`, `ReservedId`, `RoutingError`; the transaction is void then.
    """
    for task_id in inventory.tasks:
        check_id(task_id)
    provenance = {"how": "seeded", "from": inventory.fingerprint}
    new = store.unseeded(connection, sorted(inventory.tasks))
    for task_id in new:
        packed = pack(inventory.tasks[task_id])
        record = first_generation(
            fingerprint,
            task_id,
            packed,
            template=inventory.templates.get(task_id),
            provenance=provenance,
        )
        store.put_content(connection, packed)
        store.add(connection, record)
        store.mark_seeded(connection, task_id)
        Change(connection, task_id, None).note("seeded", None, record.task)
    return new
