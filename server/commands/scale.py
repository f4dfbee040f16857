"""`polyhead scale`: replicas on every machine of a Ray cluster, behind one address."""

import os
import signal
import threading
from typing import Annotated, Any

import typer

from polyhead.server.commands.common import fail, one_line_errors
from polyhead.server.commands.flags import read, with_flags_of
from polyhead.server.config import Settings
from polyhead.server.scale.size import Scale


@with_flags_of(Settings, Scale)
def scale_command(
    *,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster to join, or auto; without one, one is made of this machine"),
    ] = None,
    **flags: Any,
) -> None:
    """Serve from many replicas on a Ray cluster.

    Takes the flags of `serve`: paths must be there on every machine, and --database-url names the
    registry that all replicas share. Runs until a signal, and drains then.
    """
    settings, scale = read(Settings, flags), read(Scale, flags)
    try:
        scale.check(settings)
    except ValueError as exc:
        fail(str(exc), 2)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import serve

        from polyhead.server.scale.deployment import APPLICATION, deploy
    except ImportError as exc:
        fail(f"{exc}: pip install 'polyhead[server,scale]'", 1)
    with one_line_errors():
        ray.init(address=ray_address, include_dashboard=False)
        try:
            told = _told_to_end()
            deploy(settings, scale)
            told.wait()
            serve.delete(APPLICATION)
        finally:
            if ray_address is None:
                serve.shutdown()  # type: ignore[no-untyped-call]
            ray.shutdown()


def _told_to_end() -> threading.Event:
    """Set by a signal. After Ray has begun, since it handles signals itself, by force."""
    told = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told.set())
    return told
