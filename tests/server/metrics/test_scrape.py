"""One source that cannot be read costs its own metrics, and no other's."""

from collections.abc import Iterator

import pytest

from polyhead.server.metrics import Metrics, Reading


def test_a_source_is_read_at_every_scrape() -> None:
    metrics, values = Metrics(), iter((1.0, 2.0))
    metrics.watch(lambda: [Reading("level", "A level", next(values), {"side": "left"})])
    assert b'polyhead_level{side="left"} 1.0' in metrics.exposition()
    assert b'polyhead_level{side="left"} 2.0' in metrics.exposition()


def test_a_source_that_raises_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> Iterator[Reading]:
        yield Reading("half", "Never seen", 1)
        raise OSError("no disk")

    metrics = Metrics()
    metrics.watch(broken)
    metrics.watch(lambda: [Reading("whole", "Seen", 3, kind="counter")])
    text = metrics.exposition()
    assert b"polyhead_whole_total 3.0" in text
    assert b"polyhead_half" not in text
    assert "some metrics cannot be read" in caplog.text
