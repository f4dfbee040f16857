"""Two registries on one database: each hears of the other's changes."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import plain_prepare
from postgres_server import PostgresServer

from polyhead.adapters.routing import Layout, Routing
from polyhead.server.tasks.catalogue import Catalogue
from polyhead.server.tasks.errors import RegistryUnavailable
from polyhead.server.tasks.options import Options
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots

Make = Callable[..., Routing]
Open = Callable[..., Registry]


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> float:
    """How long it took to come to hold."""
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < seconds, f"it did not come to hold in {seconds} s"
        time.sleep(0.002)
    return time.monotonic() - began


def test_a_change_at_one_is_served_by_the_other(
    open_registry: Open, routing: Make, layout: Layout
) -> None:
    one, other = open_registry(), open_registry()
    catalogue = Catalogue(other, layout, Slots(plain_prepare))
    one.create("t", routing(1))
    stale = catalogue.resolve("t").task.generation
    new = one.replace("t", routing(2)).generation
    assert catalogue.resolve("t").task.generation == stale  # nobody follows: a control
    other.follow()
    one.replace("t", routing(3))
    other.close()
    third = open_registry()
    catalogue = Catalogue(third, layout, Slots(plain_prepare))
    third.follow()
    assert catalogue.resolve("t").task.generation not in (stale, new)
    for seed in range(4, 14):
        fresh = one.replace("t", routing(seed)).generation
        took = eventually(lambda fresh=fresh: catalogue.resolve("t").task.generation == fresh)
        assert took < 1.0


def test_a_lost_notification_is_healed_by_polling(
    open_registry: Open, routing: Make, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = open_registry(), open_registry(poll_seconds=0.3)
    catalogue = Catalogue(other, layout, Slots(plain_prepare))
    one.create("t", routing(1))
    catalogue.resolve("t")
    # What is listened to is not what is said: as if every notification were lost.
    monkeypatch.setattr("polyhead.server.tasks.audit.CHANNEL", "nobody_says_this")
    other.follow()
    time.sleep(0.2)
    monkeypatch.undo()
    fresh = one.replace("t", routing(2)).generation
    eventually(lambda: catalogue.resolve("t").task.generation == fresh, seconds=1.0)


def test_own_changes_are_told_once(open_registry: Open, routing: Make) -> None:
    one, other = open_registry(poll_seconds=0.02), open_registry()
    told: list[str] = []
    one.subscribe(told.append)
    one.follow()
    one.create("own", routing(1))
    other.create("other", routing(2))
    eventually(lambda: "other" in told)
    assert told == ["own", "other"]


def test_many_changes_at_once_are_all_told(open_registry: Open, routing: Make) -> None:
    one, other = open_registry(), open_registry(poll_seconds=0.05)
    told: set[str] = set()
    other.subscribe(told.add)
    other.follow()
    one.create("t", routing(1))
    writers = [
        threading.Thread(target=lambda n=n: [one.copy("t", f"t{n}.{i}") for i in range(20)])
        for n in range(3)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    eventually(lambda: len(told) == 61)
    assert other.convergence_lag < 1.0


def test_a_database_that_was_away_is_followed_on(
    postgresql: PostgresServer, tmp_path: Path, layout: Layout, routing: Make
) -> None:
    url = postgresql.new_database()
    one, other = (
        Registry(tmp_path / name, "1" * 64, layout, Options(database_url=url, poll_seconds=0.1))
        for name in ("one", "other")
    )
    told: list[str] = []
    other.subscribe(told.append)
    other.follow()
    one.create("before", routing(1))
    eventually(lambda: told == ["before"])
    postgresql.stop()
    with pytest.raises(RegistryUnavailable):
        one.create("meanwhile", routing(2))
    postgresql.start()
    one.create("after", routing(3))
    eventually(lambda: told == ["before", "after"])
    one.close()
    other.close()
