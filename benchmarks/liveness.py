"""How fast `/health/live` answers while requests decode.

    python -m benchmarks.liveness --backbone data/SmolLM2-135M-Instruct --inventory data/inventory

Starts a server of its own in another process, keeps `--requests` streams decoding on it, and asks
`/health/live` every `--every` seconds from a process that does nothing else.
"""

import argparse
import contextlib
import http.client
import json
import multiprocessing
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--inventory", required=True)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--every", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1, help="Compute threads of the server")
    options = parser.parse_args()
    with server(options.backbone, options.inventory, options.threads) as port:
        idle = measured(port, options.seconds / 4, options.every)
        with decoding(port, options.requests):
            busy = measured(port, options.seconds, options.every)
            tokens = running(port)
    print(f"idle:                  {summary(idle)}")
    print(f"{tokens:3.0f} requests decoding: {summary(busy)}")


@contextlib.contextmanager
def server(backbone: str, inventory: str, threads: int) -> Iterator[int]:
    """A server in a process of its own; yields its port once it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as data_dir:
        command = [sys.executable, "-c", "from polyhead.server.cli import app; app()", "serve"]
        command += ["--backbone", backbone, "--inventory", inventory, "--data-dir", data_dir]
        command += ["--port", str(port), "--threads", str(threads)]
        with subprocess.Popen(command) as process:
            try:
                while not ready(port):
                    if process.poll() is not None:
                        sys.exit("the server did not start")
                    time.sleep(0.2)
                yield port
            finally:
                process.kill()


def ready(port: int) -> bool:
    with contextlib.suppress(OSError):
        return get(port, "/health/ready")[0] == 200
    return False


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


@contextlib.contextmanager
def decoding(port: int, requests: int) -> Iterator[None]:
    """Keep `requests` long streams open; they end with the block."""
    body = {"task": "base", "prompt": "Once upon a time", "max_tokens": 1500}
    data = json.dumps({**body, "stream": True, "ignore_eos": True, "temperature": 1.0}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(requests):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
            threading.Thread(target=swallow, args=(connection,), daemon=True).start()
        while running(port) < requests:
            time.sleep(0.2)
        yield


def swallow(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def running(port: int) -> float:
    lines = get(port, "/metrics")[1].decode().splitlines()
    name = "polyhead_num_requests_running "
    return next(float(line.split()[1]) for line in lines if line.startswith(name))


def measured(port: int, seconds: float, every: float) -> list[float]:
    """Seconds of each answer, asked for in a process that nothing else disturbs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ask_again_and_again, (port, seconds, every))


def ask_again_and_again(port: int, seconds: float, every: float) -> list[float]:
    found, end = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < end:
        status, _ = get(port, "/health/live")
        assert status == 200
        found.append(time.perf_counter() - began)
        time.sleep(max(0.0, every - found[-1]))
    return found


def summary(seconds: list[float]) -> str:
    ordered = sorted(seconds)
    shares = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999}
    found = [
        f"{k} {1000 * ordered[int(s * (len(ordered) - 1))]:6.1f} ms" for k, s in shares.items()
    ]
    return f"{', '.join(found)}, longest {1000 * ordered[-1]:6.1f} ms of {len(ordered)} answers"


if __name__ == "__main__":
    main()
