"""A server in a process of its own, which a test may kill."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from live_server import settings_for
from ports import free_port

SCRIPT = """
import sys
from polyhead.server.config import Settings
from polyhead.server.http.serve import run
sys.exit(run(Settings.model_validate_json(sys.argv[1])))
"""


@dataclass(frozen=True)
class ServerProcess:
    """A running server: its process and a client for it."""

    process: subprocess.Popen[bytes]
    client: httpx.Client

    def children(self) -> list[int]:
        """Process ids of what the server has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for listed in tasks for pid in listed.read_text().split()]


@contextlib.contextmanager
def server_process(
    folder: Path,
    data_dir: Path,
    environment: Mapping[str, str] | None = None,
    port: int | None = None,
    **changes: Any,
) -> Iterator[ServerProcess]:
    """A ready server over the model in `folder`; ended by force when the block ends."""
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})}
    port = port or free_port()
    settings = settings_for(folder, data_dir, port=port, **changes)
    command = [sys.executable, "-c", SCRIPT, settings.model_dump_json()]
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
        subprocess.Popen(command, env=variables) as process,
    ):
        try:
            wait_until_ready(client, process)
            yield ServerProcess(process, client)
        finally:
            process.kill()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    """Until it takes requests. Whatever listens on the port may answer before it does."""
    end = time.monotonic() + 90
    while True:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/health/ready").status_code == 200:
                return
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
