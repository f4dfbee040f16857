"""Jobs of several servers: none runs another's, and a dead one's are taken over."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from polyhead.adapters.routing import Routing
from polyhead.server.tasks import job_rows
from polyhead.server.tasks.errors import JobTakenOver
from polyhead.server.tasks.job import FitExample, Order
from polyhead.server.tasks.jobs import Jobs
from polyhead.server.tasks.leases import Leases, own_name
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]
ORDER = Order((FitExample("one", "1"),), "{input}")


@pytest.fixture
def servers(open_registry: Callable[..., Registry]) -> tuple[Jobs, Jobs]:
    """Two servers on one database."""
    one, other = Jobs(open_registry()), Jobs(open_registry())
    one.run_as("one")
    other.run_as("other")
    return one, other


def let_lease_pass(jobs: Jobs, job_id: str) -> None:
    with jobs._database.write() as connection:
        past = job_rows.now(connection) - timedelta(seconds=5)
        job_rows.update(connection, job_id, {"lease": past})


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
    servers: tuple[Jobs, Jobs], routing: Make
) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    one.take(4)
    assert one.renew() == {job.id}
    other.recover_expired()
    assert one.get(job.id).state == "running"  # its lease holds: a control
    let_lease_pass(one, job.id)
    other.recover_expired()
    assert other.get(job.id).state == "queued"
    assert [taken.id for taken, _ in other.take(4)] == [job.id]
    assert one.renew() == set()
    with pytest.raises(JobTakenOver, match="run by another server"):
        one.succeed(job.id, routing(1), {"method": "z"})
    assert other.succeed(job.id, routing(2), {"method": "z"}).state == "succeeded"


def test_renewing_keeps_a_lease(servers: tuple[Jobs, Jobs]) -> None:
    one, other = servers
    job = one.submit_new("t", ORDER)
    one.take(4)
    let_lease_pass(one, job.id)
    one.renew()
    other.recover_expired()
    assert one.get(job.id).owner == "one"


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
