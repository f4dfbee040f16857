"""Streams that decode on a server while something else is measured."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence

from benchmarks.serving import Served


@contextlib.contextmanager
def decoding(
    served: Served, streams: int, tasks: Sequence[str] = ()
) -> Iterator[list[list[float]]]:
    """Open streams over these tasks in turn, over the demo's where there are none; yields, for
    each, when something of it arrived. They end with the block."""
    tasks = tasks or [task["id"] for task in served.get("/tasks?limit=5")["tasks"]]
    arrivals: list[list[float]] = [[] for _ in range(streams)]
    with contextlib.ExitStack() as stack:
        for number, times in enumerate(arrivals):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", served.port)))
            connection.sendall(_request(tasks[number % len(tasks)]))
            threading.Thread(target=_note_arrivals, args=(connection, times), daemon=True).start()
        while served.running() < streams or not all(len(times) > 4 for times in arrivals):
            time.sleep(0.1)
        yield arrivals
    while served.running():
        time.sleep(0.1)


def _request(task: str) -> bytes:
    body = {"task": task, "prompt": "Once upon a time", "max_tokens": 1500, "temperature": 1.0}
    data = json.dumps({**body, "stream": True, "ignore_eos": True}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


def _note_arrivals(connection: socket.socket, times: list[float]) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            times.append(time.perf_counter())
