"""Messages over the socket pair: whole, in order, and never waited for longer than told."""

import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from polyhead.server.wire import Wire, WireClosed


@pytest.fixture
def ends() -> Iterator[tuple[Wire, Wire]]:
    left, right = (Wire(end) for end in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_whole_and_in_order(ends: tuple[Wire, Wire]) -> None:
    here, there = ends
    data = os.urandom(3 << 20)
    sending = threading.Thread(
        target=lambda: [here.send({"n": n, "ü": "🎻"}, data[n:]) for n in (0, 5)]
    )
    sending.start()
    assert there.receive(30) == ({"n": 0, "ü": "🎻"}, data)
    assert there.receive(30) == ({"n": 5, "ü": "🎻"}, data[5:])
    sending.join()
    there.send({"back": True})
    assert here.receive(30) == ({"back": True}, b"")


def test_nothing_comes_within_the_time(ends: tuple[Wire, Wire]) -> None:
    began = time.monotonic()
    assert ends[0].receive(0.05) is None
    assert 0.04 < time.monotonic() - began < 5


def test_the_end_of_the_other_side_is_told(ends: tuple[Wire, Wire]) -> None:
    here, there = ends
    there.send({"last": 1})
    there.close()
    assert here.receive(5) == ({"last": 1}, b"")
    with pytest.raises(WireClosed):
        here.receive(5)
    with pytest.raises(WireClosed):
        here.send({"n": 1}, bytes(1 << 20))


def test_many_senders_do_not_mix_their_messages(ends: tuple[Wire, Wire]) -> None:
    here, there = ends
    payload = {sender: bytes([sender]) * 70_000 for sender in range(4)}

    def send(sender: int) -> None:
        for _ in range(20):
            here.send({"sender": sender}, payload[sender])

    threads = [threading.Thread(target=send, args=(sender,)) for sender in payload]
    for thread in threads:
        thread.start()
    for _ in range(80):
        found = there.receive(30)
        assert found is not None
        assert found[1] == payload[found[0]["sender"]]
    for thread in threads:
        thread.join()


def test_numbers_that_json_lacks_are_refused(ends: tuple[Wire, Wire]) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        ends[0].send({"loss": float("nan")})
