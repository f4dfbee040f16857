"""A connection that is cut off when its other end stops reading."""

import asyncio
import logging
import socket

from uvicorn.protocols.http.auto import AutoHTTPProtocol

logger = logging.getLogger(__name__)


def cutting_off(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, for connections whose peer may stop reading for `seconds` at most.

    asyncio holds at most its high-water mark (64 KiB) of what was not read and then makes senders
    wait. The clock runs while they wait, whatever is sent: events, archives, tensors. To the call
    the cut is a client that left. What is below the mark makes nobody wait, so the kernel watches
    over it, where it can.
    """

    class Connection(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            found = transport.get_extra_info("socket")
            if found is not None and hasattr(socket, "TCP_USER_TIMEOUT"):
                milliseconds = max(1, round(seconds * 1000))
                found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = asyncio.get_running_loop().call_later(seconds, self._cut)

        def resume_writing(self) -> None:
            self._forget()
            super().resume_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget()
            super().connection_lost(exc)

        def _cut(self) -> None:
            logger.warning("a client has read nothing for %g s and is cut off", seconds)
            self.transport.abort()

        def _forget(self) -> None:
            if self._stalled is not None:
                self._stalled.cancel()
                self._stalled = None

    return Connection
