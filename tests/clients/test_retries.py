"""What is tried again, when, and for how long; against a real server that answers by script."""

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from scripted_server import answer, drip, events, hang_up, problem, scripted

from polyhead.clients import (
    APIConnectionError,
    APITimeoutError,
    RateLimitError,
    UnavailableError,
    flows,
)

TASK = {
    "id": "a",
    "generation": "g",
    "kind": "routing",
    "granularity": "model",
    "routing_kind": "weights",
    "template": None,
    "defaults": {},
    "metadata": {},
    "provenance": {},
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
}
DONE = answer(200, TASK)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "FIRST_PAUSE", 0.02)


def test_a_full_server_is_asked_again_when_it_says(connect: Any) -> None:
    full = problem(503, "engine_full", Retry_After="1")
    with scripted(full, problem(429, "over_limit"), DONE) as server:
        # Not idempotent, but 503 and 429 mean that nothing was done.
        assert connect(server.url).tasks.copy("a", "b").id == "a"
    assert server.asked == [("POST", "/tasks")] * 3
    assert 1 <= server.pauses[0] < 1.6
    assert server.pauses[1] < 0.5


def test_retry_after_may_be_a_date(connect: Any) -> None:
    # A date has no fractions of a second: two ahead is at least one from now.
    moment = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
    with scripted(problem(503, "engine_full", Retry_After=moment), DONE) as server:
        assert connect(server.url).tasks.get("a").id == "a"
    assert 0.8 <= server.pauses[0] < 2.5


def test_pauses_grow_and_end(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "FIRST_PAUSE", 0.1)
    with scripted(*[problem(503, "engine_full")] * 4) as server:
        with pytest.raises(UnavailableError) as caught:
            connect(server.url, max_retries=2).tasks.get("a")
        assert (caught.value.code, caught.value.status) == ("engine_full", 503)
    assert len(server.asked) == 3
    assert 0.05 <= server.pauses[0] < 0.1 + 0.1
    assert server.pauses[1] >= 0.1


def test_other_refusals_are_final(connect: Any) -> None:
    with scripted(problem(500, "internal_error"), DONE) as server:
        with pytest.raises(Exception, match="internal_error"):
            connect(server.url).tasks.get("a")
        assert len(server.asked) == 1


def test_no_retries_is_no_retries(connect: Any) -> None:
    with scripted(problem(429, "over_limit", Retry_After="7"), DONE) as server:
        with pytest.raises(RateLimitError) as caught:
            connect(server.url).with_options(max_retries=0).tasks.get("a")
        assert caught.value.retry_after == 7
        assert len(server.asked) == 1


def test_a_wait_that_is_too_long_is_left_to_the_caller(connect: Any) -> None:
    with scripted(problem(503, "engine_full", Retry_After="3600"), DONE) as server:
        began = time.monotonic()
        with pytest.raises(UnavailableError) as caught:
            connect(server.url).tasks.get("a")
        assert caught.value.retry_after == 3600
        assert time.monotonic() - began < 2
        assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("method", "arguments", "again"),
    [
        ("get", {}, True),
        ("replace", {}, True),
        ("replace", {"if_match": "g"}, False),
        ("update", {"metadata": {}}, True),
        ("delete", {}, False),
        ("fit", {"examples": []}, False),
    ],
)
def test_a_lost_connection_is_only_tried_again_where_that_is_safe(
    connect: Any, method: str, arguments: dict[str, Any], again: bool
) -> None:
    with scripted(hang_up, DONE) as server:
        call = getattr(connect(server.url).tasks, method)
        if again:
            assert call("a", **arguments).id == "a"
        else:
            with pytest.raises(APIConnectionError, match="the connection failed"):
                call("a", **arguments)
        assert len(server.asked) == 1 + again


def test_a_connection_that_was_never_made_is_always_tried_again(connect: Any) -> None:
    with scripted() as gone:
        pass  # its port is closed from here on
    began = time.monotonic()
    with pytest.raises(APIConnectionError, match="the connection failed"):
        connect(gone.url, max_retries=3).tasks.delete("a")
    assert time.monotonic() - began >= 0.01 + 0.02 + 0.04


def test_one_attempt_has_its_time(connect: Any) -> None:
    with scripted(drip(0.05, 100), DONE) as server:
        began = time.monotonic()
        with pytest.raises(APITimeoutError):
            connect(server.url, timeout=0.3).tasks.get("a")
        # Each byte comes in time; all of them do not. A slow server is not asked again.
        assert 0.25 < time.monotonic() - began < 1.5
        assert len(server.asked) == 1


def test_all_attempts_have_their_time_together(connect: Any) -> None:
    with scripted(*[problem(503, "engine_full", Retry_After="1")] * 9) as server:
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            connect(server.url, total_timeout=1.9, max_retries=8).tasks.get("a")
        assert time.monotonic() - began < 1.9
        assert len(server.asked) == 2


def test_a_stream_is_opened_again_but_never_resumed(connect: Any) -> None:
    piece = 'data: {"index": 0, "text": "one\u2028two"}'
    with scripted(problem(503, "engine_full"), events(piece)) as server:
        stream = connect(server.url).stream("a", prompt="x")
        assert next(stream).text == "one\u2028two"
        with pytest.raises(APIConnectionError, match="cut off"):
            next(stream)
        assert len(server.asked) == 2


def test_a_problem_within_a_stream_has_the_type_of_its_status(connect: Any) -> None:
    body = '{"status": 503, "code": "engine_draining", "title": "t", "detail": "d"}'
    sent = events('data: {"index": 0, "text": "a"}', f"event: error\ndata: {body}")
    with scripted(sent) as server:
        stream = connect(server.url).stream("a", prompt="x")
        assert next(stream).text == "a"
        with pytest.raises(UnavailableError, match="engine_draining"):
            next(stream)


def test_the_key_goes_with_every_call_and_is_not_shown(connect: Any) -> None:
    with scripted(DONE, DONE) as server:
        connect(server.url + "/", api_key="secret").tasks.get("a")
        connect(server.url).tasks.get("a")
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert "authorization" not in server.headers[1]
    assert server.asked == [("GET", "/tasks/a")] * 2


def test_address_and_key_may_stand_in_the_environment(
    connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with scripted(DONE) as server:
        monkeypatch.setenv("POLYHEAD_URL", server.url)
        monkeypatch.setenv("POLYHEAD_API_KEY", "outside")
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")  # nobody: loopback needs none
        connect().tasks.get("a")
    assert server.headers[0]["authorization"] == "Bearer outside"
