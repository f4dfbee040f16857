"""Server-sent events, however the network cuts them."""

import pytest

from polyhead.clients.errors import APIConnectionError, UnprocessableError
from polyhead.clients.events import EventReader

SENT = (
    b'event: job\ndata: {"a": 1}\n\n: the job has no news\n\n'
    b'data: {"b": "\xe2\x80\xa8\xc3\xa9"}\n\ndata: [DONE]\n\n'
)
MEANT = [("job", b'{"a": 1}'), ("", '{"b": "\u2028é"}'.encode())]


def read(*chunks: bytes) -> list[tuple[str, bytes]]:
    reader = EventReader(lambda name, data: (name, data))
    found = [event for chunk in chunks for event in reader.feed(chunk)]
    reader.close()
    return found


def test_events_are_the_same_wherever_the_bytes_are_cut() -> None:
    for place in range(len(SENT)):
        assert read(SENT[:place], SENT[place:]) == MEANT
    assert read(*(bytes([byte]) for byte in SENT)) == MEANT


def test_an_end_before_the_last_event_is_noticed() -> None:
    with pytest.raises(APIConnectionError):
        read(SENT.removesuffix(b"data: [DONE]\n\n"))


def test_an_error_event_is_raised() -> None:
    body = b'{"status": 422, "code": "invalid_value", "errors": [{"field": "n", "message": "no"}]}'
    with pytest.raises(UnprocessableError) as caught:
        read(b"event: error\ndata: " + body + b"\n\n")
    assert caught.value.errors[0].field == "n"
