"""A server in a process of its own, and the calls that measurements make to it."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START = [sys.executable, "-c", "from polyhead.server.cli import app; app()", "serve"]
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Memory:
    """Bytes of a process that are in memory now."""

    resident: int  # VmRSS
    anonymous: int  # the part that is no file's, which the system cannot drop and read again


@dataclass(frozen=True)
class Served:
    """A running server's address and process."""

    port: int
    pid: int

    def call(self, method: str, path: str, body: bytes = b"", kind: str = "") -> tuple[int, bytes]:
        """Status and content of the answer, over a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": kind} if kind else {})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def get(self, path: str) -> Any:
        status, data = self.call("GET", path)
        assert status == 200, data
        return json.loads(data)

    def generate(self, **body: Any) -> Any:
        """`POST /generate`, which must succeed."""
        status, data = self.call("POST", "/generate", json.dumps(body).encode(), "application/json")
        assert status == 200, data
        return json.loads(data)

    def running(self) -> int:
        """Sequences in the server's batch."""
        lines = self.call("GET", "/metrics")[1].decode().splitlines()
        name = "polyhead_num_requests_running "
        return int(next(float(line.split()[1]) for line in lines if line.startswith(name)))

    def memory(self) -> Memory:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        sizes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
        kinds = {kind: 1024 * int(size) for kind, size in sizes.items()}
        return Memory(sum(kinds.values()), kinds["RssAnon"])

    def cpu_seconds(self) -> float:
        """What the process has computed so far, over all its threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(backbone: Path, inventory: Path, data_dir: Path, *flags: str) -> Iterator[Served]:
    """A server on a free loopback port; yields once it is ready, ends with the block."""
    port = free_port()
    paths = ["--backbone", backbone, "--inventory", inventory, "--data-dir", data_dir]
    command = [*START, *map(str, paths), "--port", str(port), *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        served = Served(port, process.pid)
        try:
            while not _ready(served):
                if process.poll() is not None:
                    sys.exit(f"the server did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield served
        finally:
            process.kill()


def _ready(served: Served) -> bool:
    with contextlib.suppress(OSError):
        return served.call("GET", "/health/ready")[0] == 200
    return False
