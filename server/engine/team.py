"""The processes that hold the backbone's other parts, as the leading one sees them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from polyhead.adapters.sharding import Ranks
from polyhead.server.engine.errors import WorkerLost
from polyhead.server.wire import Wire, WireClosed

logger = logging.getLogger(__name__)

# -P: a folder that the server happens to be started in must not be imported from.
COMMAND = (sys.executable, "-P", "-m", "polyhead.server.engine.follower")
END_SECONDS = 5.0
GRACE_SECONDS = 30.0
"""From a worker's end to this process's own, should that hang in a sum that will never come."""


class Team:
    """This process and `size - 1` others on the same machine, which follow its every step.

    They hear of a step over sockets of their own; only sums of the layers' parts go through
    torch's process group. All of them end when this process does, in whatever way.
    """

    def __init__(self, size: int) -> None:
        self.ranks = Ranks(0, size)
        self.on_loss: Callable[[BaseException], None] = lambda _: None
        """Called on a thread of its own when a worker has ended without being told to."""
        self._folder = tempfile.TemporaryDirectory(prefix="polyhead-")
        self._closing = threading.Event()
        self._wires: list[Wire] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank in range(1, size):
            self._start(rank)

    @property
    def rendezvous(self) -> str:
        """Where all processes find each other."""
        return f"file://{Path(self._folder.name) / 'rendezvous'}"

    def tell(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        """Say the same to every worker. Raises `WorkerLost`."""
        for rank, wire in enumerate(self._wires, 1):
            try:
                wire.send(message, data)
            except WireClosed as exc:
                raise WorkerLost(f"worker {rank} has ended; the log says why") from exc

    def close(self) -> None:
        """Let the workers end, or end them."""
        self._closing.set()
        for wire in self._wires:
            wire.close()
        for process in self._processes:
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _start(self, rank: int) -> None:
        own, other = socket.socketpair()
        with other:
            process = subprocess.Popen(
                [*COMMAND, str(other.fileno()), str(rank), str(self.ranks.size)],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._wires.append(Wire(own))
        self._processes.append(process)
        threading.Thread(target=self._watch, args=(rank, process), daemon=True).start()

    def _watch(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        status = process.wait()
        if self._closing.is_set():
            return
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        logger.critical("worker %d of the backbone's has ended %s", rank, how)
        self.on_loss(WorkerLost(f"worker {rank} has ended {how}"))
        if not self._closing.wait(GRACE_SECONDS):
            os._exit(1)  # a sum that waits for the lost one ends by nothing else
