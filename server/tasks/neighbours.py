"""Which routings are close to a given one."""

from sqlalchemy import Connection

from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks import store
from polyhead.server.tasks.sketch import Sketcher, Vector, closest, direction
from polyhead.server.tasks.store import Record


def neighbours(
    connection: Connection,
    record: Record,
    layout: Layout,
    sketcher: Sketcher,
    limit: int,
    prefix: str | None = None,
) -> list[tuple[str, float]]:
    """Ids of the nearest other routings with their exact cosines, nearest first.

    All routings, or those of tasks whose ids begin with `prefix`, are compared by their sketches,
    the best of them again by their weights.
    """
    own = _direction(connection, record.content, layout)
    if not own.any():
        return []
    fingerprints, sketches = store.all_sketches(connection, prefix)
    near = closest(sketcher.sketch(own), sketches, count=32 + 2 * limit)
    cosines = {
        fingerprint: min(1.0, float(own @ _direction(connection, fingerprint, layout)))
        for fingerprint in (fingerprints[index] for index in near)
    }
    found = [
        (holder, cosines[content])
        for holder, content in store.holders(connection, list(cosines), prefix)
        if holder != record.task.id
    ]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))[:limit]


def _direction(connection: Connection, fingerprint: str, layout: Layout) -> Vector:
    data = store.content_data(connection, fingerprint)
    return direction(Routing.from_safetensors(data, layout), layout)
