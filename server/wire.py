"""Messages between the server and a process that it has started: JSON, and bytes beside it.

Nothing else crosses: neither side unpickles what the other sent.
"""

import json
import select
import socket
import struct
import threading
import time
from collections.abc import Mapping
from typing import Any

HEAD = struct.Struct(">II")
CHUNK = 1 << 20


class WireClosed(Exception):
    """The other side is gone."""


class Wire:
    """One end of a socket pair. Any thread may send; one thread at a time may receive."""

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def send(self, message: Mapping[str, Any], data: bytes = b"") -> None:
        """Raises `WireClosed`."""
        text = json.dumps(message, allow_nan=False).encode()
        try:
            with self._sending:
                self._socket.sendall(HEAD.pack(len(text), len(data)) + text)
                self._socket.sendall(data)
        except OSError as exc:
            raise WireClosed from exc

    def receive(self, timeout: float | None = None) -> tuple[dict[str, Any], bytes] | None:
        """The next message with its bytes; None when none is whole after `timeout` seconds.

        Raises `WireClosed`.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (found := self._whole()) is None:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._socket], [], [], left)[0]:
                return None
            self._read()
        return found

    def close(self) -> None:
        self._socket.close()

    def _read(self) -> None:
        try:
            chunk = self._socket.recv(CHUNK)
        except OSError as exc:
            raise WireClosed from exc
        if not chunk:
            raise WireClosed
        self._buffer += chunk

    def _whole(self) -> tuple[dict[str, Any], bytes] | None:
        if len(self._buffer) < HEAD.size:
            return None
        text, data = HEAD.unpack_from(self._buffer)
        end = HEAD.size + text + data
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[HEAD.size : end])
        del self._buffer[:end]
        message: dict[str, Any] = json.loads(body[:text])
        return message, body[text:]
