"""An outage is told at its beginning, now and then, and at its end."""

import logging

import pytest

from polyhead.server.tasks.outages import EVERY_SECONDS, Outage


def test_an_outage_is_logged_at_first_then_seldom_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    now = 0.0
    outage = Outage(logging.getLogger("test"), "nothing is heard", clock=lambda: now)
    outage.over()
    assert caplog.records == []
    for _ in range(int(2.5 * EVERY_SECONDS / 0.5)):  # twice a second
        outage.failed(OSError("gone"))
        now += 0.5
    assert [record.getMessage() for record in caplog.records] == ["nothing is heard: gone"] * 3
    outage.over()
    outage.over()
    (last,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert last.getMessage() == "nothing is heard for 75 s, 150 times: that is over"
    caplog.clear()
    outage.failed(OSError("again"))
    assert [record.getMessage() for record in caplog.records] == ["nothing is heard: again"]
