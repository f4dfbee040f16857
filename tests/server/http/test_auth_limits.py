"""What one caller may see and use: prefixes, rates, calls at the same time."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyhead.server.http.buckets import Bucket
from polyhead.server.http.callers import Caller, Callers, the_caller
from polyhead.server.http.errors import (
    KeyInvalid,
    KeyMissing,
    MissingScope,
    OutsidePrefix,
    TokenRateExceeded,
    TooManyAtOnce,
    TooManyRequests,
)
from polyhead.server.http.keys import ApiKey, KeyRing, hash_of


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def caller(clock: Clock | None = None, **limits: Any) -> Caller:
    key = ApiKey(id="one", hash=hash_of("k"), scopes=["generate"], **limits)
    return Caller(key, clock or Clock())


def test_a_bucket_gives_a_minutes_worth_and_fills_evenly() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(60)
    assert bucket.wait_for(1) == pytest.approx(1)
    clock.now = 1.5
    assert bucket.wait_for(1) == 0
    assert bucket.wait_for(2) == pytest.approx(0.5)
    clock.now = 1e6
    bucket.take(60)
    assert bucket.wait_for(1) == pytest.approx(1), "no more than a minute's worth is kept"


def test_a_debt_is_waited_for() -> None:
    clock = Clock()
    bucket = Bucket(60, clock)
    bucket.take(180)
    assert bucket.wait_for(1) == pytest.approx(121)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 20)), max_size=50))
def test_no_window_lets_more_through_than_a_burst_and_its_share(
    calls: list[tuple[float, int]],
) -> None:
    clock, used = Clock(), 0
    bucket = Bucket(30, clock)
    for pause, amount in calls:
        clock.now += pause
        if bucket.wait_for(amount) == 0:
            bucket.take(amount)
            used += amount
        assert used <= 30 + clock.now * 30 / 60 + 1e-6


def test_requests_per_minute() -> None:
    clock = Clock()
    one = caller(clock, requests_per_minute=2)
    for _ in range(2):
        one.enter()
        one.leave()
    with pytest.raises(TooManyRequests) as caught:
        one.enter()
    assert caught.value.retry_after == pytest.approx(30)
    clock.now = 30
    one.enter()


def test_a_rate_below_one_a_minute_lets_one_through() -> None:
    clock = Clock()
    one = caller(clock, requests_per_minute=0.5)
    one.enter()
    with pytest.raises(TooManyRequests) as caught:
        one.enter()
    clock.now = caught.value.retry_after
    one.enter()


def test_tokens_per_minute_are_charged_after_the_fact() -> None:
    clock = Clock()
    one = caller(clock, tokens_per_minute=60)
    one.enter()
    one.charge(100)
    with pytest.raises(TokenRateExceeded) as caught:
        one.enter()
    assert caught.value.retry_after == pytest.approx(41)
    clock.now = 41
    one.enter()


def test_calls_at_the_same_time() -> None:
    one = caller(max_concurrent=1, requests_per_minute=2)
    one.enter()
    for _ in range(5):
        with pytest.raises(TooManyAtOnce):
            one.enter()
    one.leave()
    one.enter()  # a refused call has used nothing of the rate


def test_a_changed_entry_keeps_what_was_used() -> None:
    one = caller(requests_per_minute=2)
    one.enter()
    one.enter()
    one.renew(ApiKey(id="one", hash=hash_of("k"), scopes=["tasks"], requests_per_minute=4))
    with pytest.raises(TooManyRequests):
        one.enter()
    with pytest.raises(MissingScope):
        one.check_scope(["generate"])


def test_a_prefix_hides_all_other_tasks() -> None:
    one = caller(task_prefix="acme-")
    assert [
        t for t in ("acme-a", "acme-", "acme", "base", "other", "ACME-a") if one.may_see(t)
    ] == [
        "acme-a",
        "acme-",
        "base",
    ]
    with pytest.raises(OutsidePrefix):
        one.check_owns("other")
    assert caller().may_see("other")


@pytest.mark.parametrize(
    ("asked", "listed"),
    [(None, "acme-"), ("", "acme-"), ("ac", "acme-"), ("acme-x", "acme-x"), ("other", "~")],
)
def test_a_list_is_narrowed(asked: str | None, listed: str) -> None:
    assert caller(task_prefix="acme-").narrow(asked) == listed
    assert caller().narrow(asked) == asked


def test_without_a_file_nobody_needs_a_key() -> None:
    anyone = Callers(None).identify(None)
    anyone.check_scope(["admin"])
    assert (anyone.id, anyone.task_prefix) == (None, None)


def test_with_a_file_everybody_does(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    entry = {"id": "one", "hash": hash_of("k"), "scopes": ["tasks"]}
    path.write_text(json.dumps({"keys": [entry]}))
    callers = Callers(KeyRing(path))
    with pytest.raises(KeyMissing):
        callers.identify(None)
    with pytest.raises(KeyInvalid):
        callers.identify("x")
    assert callers.identify("k") is callers.identify("k")


def test_a_call_that_nobody_let_in_has_no_caller() -> None:
    with pytest.raises(LookupError):
        the_caller()
