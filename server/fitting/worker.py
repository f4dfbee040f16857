"""The process that fits: `python -m polyhead.server.fitting.worker FD`, started by the server.

It speaks over the socket FD only, and ends when that closes. The server tells it:

    load    what to load; once, first
    fit     jobs to fit together, and where their state may be saved
    cancel  one job, to be left out from now on
    busy    whether the server has requests to answer
    stop    save the state and leave off

and it answers with events: `ready` once it has loaded; `progress` and `result` for a job; `done`,
`failed` and `stopped` for all of them.
"""

import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

from polyhead.server.fitting.gate import Gate, yield_everything
from polyhead.server.wire import Wire, WireClosed

Command = dict[str, Any]


class Control:
    """What the server wants right now; a thread of its own listens for it."""

    def __init__(self, wire: Wire, gate: Gate) -> None:
        self._wire = wire
        self._gate = gate
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.cancelled: set[str] = set()
        self.stopping = False

    def listen(self) -> None:
        """Until the server is gone; then nobody wants what is being computed."""
        try:
            while (found := self._wire.receive()) is not None:
                self._obey(found[0])
        except WireClosed:
            os._exit(0)

    def _obey(self, command: Command) -> None:
        if command["do"] == "busy":
            self._gate.set_busy(command["busy"])
        elif command["do"] == "cancel":
            self.cancelled.add(command["job"])
            self._gate.hurry()
        elif command["do"] == "stop":
            self.stopping = True
            self._gate.hurry()
        else:
            self.commands.put(command)


def main(descriptor: int) -> None:
    """Serve the server at the other end until it closes."""
    # The terminal and the service manager signal every process; only the server decides here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield_everything()
    wire = Wire(socket.socket(fileno=descriptor))
    found = wire.receive()
    assert found is not None
    load = found[0]

    import torch

    from polyhead.server.fitting.computing import Computer

    gate = Gate(load["share"], load["threads"] or torch.get_num_threads(), torch.set_num_threads)
    control = Control(wire, gate)
    threading.Thread(target=control.listen, daemon=True).start()
    torch.set_num_threads(1)
    computer = Computer(load, wire, control, gate)
    wire.send({"event": "ready"})
    while True:
        computer.fit(control.commands.get())


if __name__ == "__main__":
    main(int(sys.argv[1]))
