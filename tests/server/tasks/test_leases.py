"""Jobs of several servers: none runs another's, and a dead one's are taken over."""

import itertools
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from polyhead.adapters.routing import Routing
from polyhead.server.tasks import job_rows
from polyhead.server.tasks.errors import JobTakenOver
from polyhead.server.tasks.job import FitExample, Order
from polyhead.server.tasks.jobs import LEASE_SECONDS, Jobs
from polyhead.server.tasks.leases import Leases, own_name
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]
ORDER = Order((FitExample("one", "1"),), "{input}")


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def servers(open_registry: Callable[..., Registry], clock: Clock) -> tuple[Jobs, Jobs]:
    """Two servers on one database."""
    one, other = Jobs(open_registry()), Jobs(open_registry(), clock=clock)
    one.run_as("one")
    other.run_as("other")
    return one, other


def look_on(jobs: Jobs, clock: Clock, seconds: float = LEASE_SECONDS) -> None:
    """Look for silent servers every few seconds, `seconds` long."""
    end = clock.now + seconds
    jobs.recover_expired()
    while clock.now < end:
        clock.now = min(end, clock.now + LEASE_SECONDS / 3)
        jobs.recover_expired()


def test_a_live_servers_job_is_left_alone(servers: tuple[Jobs, Jobs]) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    assert [taken.id for taken, _ in one.take(4)] == [job.id]
    assert other.take(4) == []
    assert other.recover() == set()
    other.recover_expired()
    other.put_back([job.id], attempted=True)
    other.fail_running([job.id], "not mine")
    other.note({job.id: {"step": 5}})
    found = one.get(job.id)
    assert (found.state, found.owner, found.progress) == ("running", "one", {})
    with pytest.raises(JobTakenOver):
        other.fail(job.id, "not mine")


def test_a_dead_servers_job_is_taken_over_and_its_late_result_refused(
    servers: tuple[Jobs, Jobs], clock: Clock, routing: Make
) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    one.take(4)
    assert one.renew() == {job.id}
    look_on(other, clock, LEASE_SECONDS - 1)
    assert one.get(job.id).state == "running"  # its lease holds: a control
    look_on(other, clock, 1)
    assert other.get(job.id).state == "queued"
    assert [taken.id for taken, _ in other.take(4)] == [job.id]
    assert one.renew() == set()
    with pytest.raises(JobTakenOver, match="run by another server"):
        one.succeed(job.id, routing(1), {"method": "z"})
    assert other.succeed(job.id, routing(2), {"method": "z"}).state == "succeeded"


@pytest.mark.parametrize("hours", [-30, 0, 30])
def test_renewing_keeps_a_lease_whatever_the_time_of_day(
    servers: tuple[Jobs, Jobs], clock: Clock, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    one.take(4)
    right, ticks = job_rows.now, itertools.count()

    def jumped(connection: Connection) -> datetime:
        return right(connection) + timedelta(hours=hours, seconds=next(ticks))

    monkeypatch.setattr(job_rows, "now", jumped)
    for _ in range(10):
        one.renew()
        look_on(other, clock, LEASE_SECONDS / 3)
    assert (one.get(job.id).owner, one.get(job.id).attempts) == ("one", 1)
    look_on(other, clock)  # and silence is noticed, too
    assert one.get(job.id).state == "queued"


def test_an_outage_of_the_database_is_no_ones_silence(
    servers: tuple[Jobs, Jobs], clock: Clock
) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    one.take(4)
    other.recover_expired()
    clock.now += 2 * LEASE_SECONDS  # without a look
    other.recover_expired()
    assert one.get(job.id).state == "running"
    look_on(other, clock)
    assert one.get(job.id).state == "queued"


def test_a_server_that_starts_again_goes_on_with_its_own_jobs_at_once(
    servers: tuple[Jobs, Jobs],
) -> None:
    one, other = servers
    mine, theirs = one.submit_new("t", ORDER), None
    one.take(4)
    theirs = other.submit_new("u", ORDER)
    other.take(4)
    assert len(one.recover()) == 1
    assert one.get(mine.id).state == "queued"
    assert one.get(theirs.id).state == "running"


def test_ticks_tell_what_was_lost_and_what_waits(servers: tuple[Jobs, Jobs]) -> None:
    one, other = servers
    lost: list[str] = []
    found: list[None] = []
    leases = Leases(one, lost.append, lambda: found.append(None))
    job = other.submit_new("t", ORDER)
    leases.tick()
    assert (lost, len(found)) == ([], 1)
    one.take(4)
    leases.tick()
    other.cancel(job.id)
    leases.tick()
    assert (lost, len(found)) == ([job.id], 1)


def test_a_folder_names_its_one_living_server(tmp_path: Path) -> None:
    file, name = own_name(tmp_path)
    second, other = own_name(tmp_path)
    assert file is not None
    assert second is None
    assert other != name
    file.close()
    again, same = own_name(tmp_path)
    assert again is not None
    again.close()
    assert same == name
