"""Which inventory a registry belongs to."""

from sqlalchemy import Connection

from polyhead.server.tasks import store
from polyhead.server.tasks.errors import InventoryMismatch
from polyhead.server.tasks.task import Task

INVENTORY_KEY = "inventory"


def claim_for(connection: Connection, inventory: str, place: str) -> None:
    """Tie the registry to `inventory`. Tasks made for another one would answer nonsense, so they
    are refused, except those that came with that inventory and that nobody touched: the new one
    brings its own."""
    found = store.read_info(connection, INVENTORY_KEY)
    if found == inventory:
        return
    if found is not None:
        kept = [task for task in store.all_tasks(connection) if not _is_untouched_seed(task)]
        if kept:
            raise InventoryMismatch(place, tasks=len(kept), found=found, expected=inventory)
        store.clear(connection)
    store.write_info(connection, INVENTORY_KEY, inventory)


def _is_untouched_seed(task: Task) -> bool:
    return task.provenance.get("how") == "seeded" and task.updated_at == task.created_at
