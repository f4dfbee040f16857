"""The states of jobs: what each change needs, what it leaves, and that it is on disk."""

from collections.abc import Callable

import pytest

from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.tasks.errors import (
    InvalidCursor,
    InvalidId,
    JobEnded,
    ReservedId,
    StaleGeneration,
    TaskBeingFitted,
    TaskExists,
    TooManyJobs,
    UnknownJob,
    UnknownTask,
)
from polyhead.server.tasks.job import FitExample, Order
from polyhead.server.tasks.jobs import KEPT, MAX_ATTEMPTS, Jobs
from polyhead.server.tasks.registry import Registry

Make = Callable[..., Routing]
ORDER = Order(
    (FitExample("one", "1"), FitExample("zwölf 🎻", "12")),
    "{input}!",
    {"steps": 3},
    {"max_tokens": 4},
    {"team": "a"},
)
RESULT = {"method": "z", "score": 0.5, "seconds": 1.0}


@pytest.fixture
def jobs(registry: Registry) -> Jobs:
    return Jobs(registry, max_open=20)


def started(jobs: Jobs, *task_ids: str) -> list[str]:
    """Jobs that register these tasks, running together."""
    ids = [jobs.submit_new(task_id, ORDER).id for task_id in task_ids]
    assert [job.id for job, _ in jobs.take(10)] == ids
    return ids


def test_a_job_and_its_order_come_back_as_they_were_given(
    jobs: Jobs, open_registry: Callable[[], Registry]
) -> None:
    job = jobs.submit_new("a", ORDER)
    again = Jobs(open_registry())
    assert (again.get(job.id), again.order(job.id)) == (job, ORDER)
    assert (job.state, job.attempts, job.base) == ("queued", 0, None)


def test_success_makes_the_task_and_ends_the_job(
    jobs: Jobs, registry: Registry, routing: Make
) -> None:
    (job_id,) = started(jobs, "a")
    ended = jobs.succeed(job_id, routing(1), RESULT)
    task = registry.get("a")
    assert ended.state == "succeeded"
    assert ended.result == {**RESULT, "generation": task.generation}
    assert ended.ended_at is not None
    assert (task.template, task.defaults, task.metadata) == (
        "{input}!",
        {"max_tokens": 4},
        {"team": "a"},
    )
    assert task.provenance == {"how": "fitted", "job": job_id, "method": "z"}


def test_a_refit_keeps_what_is_not_fitted(
    jobs: Jobs, registry: Registry, routing: Make, private: PrivateAdapter
) -> None:
    old = registry.create("a", routing(1), defaults={"top_k": 3}, metadata={"x": 1})
    job = jobs.submit("a", ORDER)
    jobs.take(1)
    registry.edit("a", metadata={"x": 2})  # leaves the generation as it is
    jobs.succeed(job.id, private, RESULT)
    task = registry.get("a")
    assert (task.kind, task.template, task.defaults) == ("private", "{input}!", {"top_k": 3})
    assert (task.metadata, task.created_at) == ({"x": 2}, old.created_at)
    assert task.generation != old.generation == job.base


@pytest.mark.parametrize("change", ["replace", "delete"])
def test_a_task_that_changed_meanwhile_stays(
    jobs: Jobs, registry: Registry, routing: Make, change: str
) -> None:
    registry.create("a", routing(1))
    job = jobs.submit("a", ORDER)
    jobs.take(1)
    if change == "replace":
        kept = registry.replace("a", routing(2))
    else:
        registry.delete("a")
    ended = jobs.succeed(job.id, routing(3), RESULT)
    assert (ended.state, ended.result) == ("failed", None)
    assert ("changed" if change == "replace" else "deleted") in str(ended.error)
    if change == "replace":
        assert registry.get("a") == kept
    else:
        assert registry.count() == 0


def test_an_id_taken_meanwhile_is_not_overwritten(
    jobs: Jobs, registry: Registry, routing: Make
) -> None:
    (job_id,) = started(jobs, "a")
    kept = registry.create("a", routing(1))
    ended = jobs.succeed(job_id, routing(2), RESULT)
    assert ended.state == "failed"
    assert "while the job was running" in str(ended.error)
    assert registry.get("a") == kept


def test_a_content_that_does_not_fit_fails_the_job(
    jobs: Jobs, registry: Registry, routing: Make
) -> None:
    (job_id,) = started(jobs, "a")
    broken = routing(1)
    broken.values[0, 0, 0] = float("nan")
    ended = jobs.succeed(job_id, broken, RESULT)
    assert ended.state == "failed"
    assert "finite" in str(ended.error)
    assert registry.count() == 0


def test_a_cancelled_job_changes_no_task(jobs: Jobs, registry: Registry, routing: Make) -> None:
    (job_id,) = started(jobs, "a")
    assert jobs.cancel(job_id).state == "cancelled"
    assert jobs.cancel(job_id).state == "cancelled"
    with pytest.raises(JobEnded, match="cancelled"):
        jobs.succeed(job_id, routing(1), RESULT)
    assert registry.count() == 0
    assert jobs.get(job_id).state == "cancelled"


def test_what_has_ended_stays_so(jobs: Jobs, routing: Make) -> None:
    (job_id,) = started(jobs, "a")
    jobs.succeed(job_id, routing(1), RESULT)
    for change in (lambda: jobs.cancel(job_id), lambda: jobs.fail(job_id, "no")):
        with pytest.raises(JobEnded, match="succeeded"):
            change()
    jobs.note({job_id: {"step": 7}})
    jobs.put_back([job_id], attempted=False)
    jobs.fail_running([job_id], "no")
    found = jobs.get(job_id)
    assert (found.state, found.progress) == ("succeeded", {})


def test_what_cannot_be_fitted_is_refused_and_not_stored(
    jobs: Jobs, registry: Registry, routing: Make
) -> None:
    registry.create("a", routing(1))
    refusals = [
        (TaskExists, lambda: jobs.submit_new("a", ORDER)),
        (InvalidId, lambda: jobs.submit_new("a/b", ORDER)),
        (ReservedId, lambda: jobs.submit_new("base", ORDER)),
        (UnknownTask, lambda: jobs.submit("b", ORDER)),
        (StaleGeneration, lambda: jobs.submit("a", ORDER, if_match="0" * 64)),
    ]
    for error, call in refusals:
        with pytest.raises(error):
            call()
    assert jobs.list() == ([], None)


def test_one_open_job_for_a_task(jobs: Jobs, registry: Registry, routing: Make) -> None:
    registry.create("a", routing(1))
    first = jobs.submit("a", ORDER)
    with pytest.raises(TaskBeingFitted, match=first.id):
        jobs.submit("a", ORDER)
    new = jobs.submit_new("b", ORDER)
    with pytest.raises(TaskBeingFitted, match=new.id):
        jobs.submit_new("b", ORDER)
    jobs.cancel(first.id)
    assert jobs.submit("a", ORDER).state == "queued"


def test_the_line_is_bounded(registry: Registry) -> None:
    jobs = Jobs(registry, max_open=2)
    ids = [jobs.submit_new(name, ORDER).id for name in "ab"]
    with pytest.raises(TooManyJobs, match="2 jobs"):
        jobs.submit_new("c", ORDER)
    jobs.fail(ids[0], "no")
    assert jobs.submit_new("c", ORDER).state == "queued"


def test_everyone_who_waits_is_taken_up_to_the_limit(jobs: Jobs) -> None:
    ids = [jobs.submit_new(f"t{number}", ORDER).id for number in range(5)]
    taken = jobs.take(3)
    assert [job.id for job, _ in taken] == ids[:3]
    assert all(order == ORDER for _, order in taken)
    assert len({job.batch for job, _ in taken}) == 1
    assert {(job.state, job.attempts) for job, _ in taken} == {("running", 1)}
    assert [job.id for job, _ in jobs.take(3)] == ids[3:]
    assert jobs.take(3) == []


def test_a_batch_that_was_put_back_comes_back_whole(jobs: Jobs) -> None:
    ids = started(jobs, "a", "b")
    batch = jobs.get(ids[0]).batch
    jobs.put_back(ids, attempted=False)
    later = jobs.submit_new("c", ORDER)
    assert {jobs.get(job_id).attempts for job_id in ids} == {0}
    taken = jobs.take(10)
    assert [(job.id, job.batch) for job, _ in taken] == [(job_id, batch) for job_id in ids]
    assert [job.id for job, _ in jobs.take(10)] == [later.id]


def test_jobs_that_lost_their_worker_are_tried_alone_and_then_fail(jobs: Jobs) -> None:
    ids = started(jobs, "a", "b")
    jobs.fail_running(ids, "died", starts=2)
    jobs.submit_new("c", ORDER)
    alone = [job.id for job, _ in jobs.take(10)]
    assert alone == ids[:1]
    jobs.fail_running(alone, "died", starts=2)
    assert (jobs.get(ids[0]).state, jobs.get(ids[0]).error) == ("failed", "died")
    assert [job.id for job, _ in jobs.take(10)] == ids[1:]
    assert [job.task for job, _ in jobs.take(10)] == ["c"]


def test_recovery_queues_what_ran_and_gives_up_in_the_end(
    open_registry: Callable[[], Registry],
) -> None:
    (job_id,) = started(Jobs(open_registry()), "a")
    for attempt in range(1, MAX_ATTEMPTS):
        jobs = Jobs(open_registry())
        jobs.recover()
        ((job, order),) = jobs.take(10)
        assert (job.id, job.attempts, order) == (job_id, attempt + 1, ORDER)
    jobs.recover()
    found = jobs.get(job_id)
    assert found.state == "failed"
    assert f"{MAX_ATTEMPTS} times" in str(found.error)
    assert jobs.order(job_id) == ORDER


def test_pages_are_newest_first_and_filtered(jobs: Jobs) -> None:
    ids = sorted((jobs.submit_new(f"t{number}", ORDER).id for number in range(7)), reverse=True)
    jobs.cancel(ids[2])
    seen: list[str] = []
    cursor: str | None = None
    while True:
        page, cursor = jobs.list(3, cursor)
        seen += [job.id for job in page]
        if cursor is None:
            break
    assert seen == ids
    assert [job.id for job in jobs.list(state="cancelled")[0]] == [ids[2]]
    task = jobs.get(ids[4]).task
    assert [job.id for job in jobs.list(task=task)[0]] == [ids[4]]
    assert jobs.counts() == {"queued": 6, "cancelled": 1}
    with pytest.raises(InvalidCursor):
        jobs.list(cursor="nonsense")


def test_an_unknown_job(jobs: Jobs) -> None:
    for call in (jobs.get, jobs.order, jobs.cancel, lambda name: jobs.fail(name, "no")):
        with pytest.raises(UnknownJob, match="job-0"):
            call("job-0")


def test_old_ended_jobs_are_forgotten_and_open_ones_are_not(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert KEPT > 2
    monkeypatch.setattr("polyhead.server.tasks.jobs.KEPT", 2)
    jobs = Jobs(registry)
    waiting = jobs.submit_new("waiting", ORDER)
    ended = sorted(jobs.cancel(jobs.submit_new(f"t{n}", ORDER).id).id for n in range(4))
    jobs.submit_new("last", ORDER)
    assert jobs.get(waiting.id).state == "queued"
    assert [job.id for job in jobs.list(state="cancelled")[0]] == ended[:1:-1]
    with pytest.raises(UnknownJob):
        jobs.order(ended[0])
