"""The worker as the server sees it: a process at the other end of a wire."""

import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from polyhead.server.wire import Wire, WireClosed

# -P: a folder that the server happens to be started in must not be imported from.
COMMAND = (sys.executable, "-P", "-m", "polyhead.server.fitting.worker")
END_SECONDS = 5.0


class WorkerDied(Exception):
    """The worker has ended without being told to; the message says how."""


@dataclass(frozen=True)
class WorkerOptions:
    """What a worker loads and how much it may take. Paths are the server's own."""

    backbone: str  # a folder
    inventory: str  # a folder
    device: str
    dtype: str  # the server's setting; see `pick_fit_dtype`
    share: float  # of the time while the server is busy, above 0
    threads: int | None  # while it is not; None leaves torch's choice
    max_tokens: int  # of an example


class Worker:
    """A running worker. One thread uses it, `pid` and `kill` aside.

    `ready` says whether it has loaded what `options` name; work may be sent before that.
    """

    def __init__(self, options: WorkerOptions) -> None:
        own, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(
                [*COMMAND, str(other.fileno())],
                pass_fds=[other.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._wire = Wire(own)
        self._busy = False
        self.ready = False
        self.send({"do": "load", **vars(options)})

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Mapping[str, Any]) -> None:
        """Raises `WorkerDied`."""
        try:
            self._wire.send(message)
        except WireClosed as exc:
            raise self._obituary() from exc

    def receive(self, timeout: float) -> tuple[dict[str, Any], bytes] | None:
        """The next message, None after `timeout` seconds without one. Raises `WorkerDied`."""
        try:
            found = self._wire.receive(timeout)
        except WireClosed as exc:
            raise self._obituary() from exc
        if found is not None and found[0]["event"] == "ready":
            self.ready = True
            return None
        return found

    def set_busy(self, busy: bool) -> None:
        """Tell the worker when that has changed. Raises `WorkerDied`."""
        if busy != self._busy:
            self._busy = busy
            self.send({"do": "busy", "busy": busy})

    def end(self) -> None:
        """Let go of it; it ends by itself when its wire closes, or is ended."""
        self._wire.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """Make it end at once; whoever waits for it learns that it has died."""
        self._process.kill()

    def _obituary(self) -> WorkerDied:
        self.end()
        status = self._process.returncode
        if status < 0:
            name = signal.Signals(-status).name
            why = ", most likely because memory ran out" if status == -signal.SIGKILL else ""
            return WorkerDied(f"the fitting process was ended by {name}{why}")
        return WorkerDied(f"the fitting process ended with status {status}; the log says why")
