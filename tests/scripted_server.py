"""A small real HTTP server on loopback that answers what a test has written down for it."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Act = Callable[[BaseHTTPRequestHandler], None]


@dataclass
class Scripted:
    """The server's address, what it still has to do, and what it was asked."""

    url: str
    script: list[Act]
    asked: list[tuple[str, str]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)

    @property
    def pauses(self) -> list[float]:
        """Seconds between the requests."""
        return [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]


@contextlib.contextmanager
def scripted(*script: Act) -> Iterator[Scripted]:
    """Serve one act of `script` for each request; further requests are answered with 500."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            found.asked.append((self.command, self.path))
            found.headers.append({name.lower(): value for name, value in self.headers.items()})
            found.moments.append(time.monotonic())
            act = found.script.pop(0) if found.script else answer(500, {})
            act(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found = Scripted(f"http://127.0.0.1:{server.server_port}", list(script))
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()


def answer(status: int, body: Any, **headers: str) -> Act:
    """A whole answer; a body that is no text is sent as JSON."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    return act


def problem(status: int, code: str, **headers: str) -> Act:
    """A refusal in the server's form."""
    body = {"status": status, "code": code, "title": "No", "detail": "not now"}
    return answer(status, body, X_Request_Id="abc", **headers)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Close the connection without an answer."""
    handler.close_connection = True


def drip(seconds: float, pieces: int) -> Act:
    """An answer whose bytes come one by one, `seconds` apart; ends early when the client leaves."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(pieces))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(pieces):
                handler.wfile.write(b" ")
                time.sleep(seconds)
        handler.close_connection = True

    return act


def events(*lines: str) -> Act:
    """A stream of server-sent events, which ends with the connection."""

    def act(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.wfile.write("".join(line + "\n\n" for line in lines).encode())
        handler.close_connection = True

    return act
