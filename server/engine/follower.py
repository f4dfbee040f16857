"""The process that holds a part of the backbone, started by the leading one:

    python -m polyhead.server.engine.follower FD RANK SIZE

It is told over the socket FD what to load and then every step, and ends when that closes. It
answers nothing: what it computes goes into the sums of the layers' parts.
"""

import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from polyhead.adapters.inject import inject
from polyhead.adapters.sharding import Ranks
from polyhead.server.engine.parts import PartOptions, join, load_part
from polyhead.server.engine.shared_runners import FollowingRunner
from polyhead.server.wire import Wire, WireClosed

Messages = queue.SimpleQueue[tuple[dict[str, Any], bytes]]


def main(descriptor: int, ranks: Ranks) -> None:
    """Follow until the leading process is gone."""
    # The terminal and the service manager signal every process; only the leading one decides here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    messages: Messages = queue.SimpleQueue()
    wire = Wire(socket.socket(fileno=descriptor))
    threading.Thread(target=listen, args=(wire, messages), daemon=True).start()
    load, _ = messages.get()
    rendezvous = load.pop("rendezvous")
    part = load_part(PartOptions(**load), ranks)
    join(ranks, rendezvous, part.device)
    runner = FollowingRunner(part.model, inject(part.model, part.inventory))
    while True:
        runner.obey(*messages.get())


def listen(wire: Wire, messages: Messages) -> None:
    """Until the leading process is gone: a sum that waits for it then ends by nothing else."""
    try:
        while (found := wire.receive()) is not None:
            messages.put(found)
    except WireClosed:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), Ranks(int(sys.argv[2]), int(sys.argv[3])))
