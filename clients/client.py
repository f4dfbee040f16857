"""`Client`: every call, blocking. `AsyncClient` has the same methods."""

import copy
from types import TracebackType
from typing import Self

import httpx

from polyhead.clients import calls, flows, task_calls
from polyhead.clients.blocking import Calls, Driver, lists, runs, sends, streams
from polyhead.clients.settings import LOOPBACK, Options, changed


class Tasks(Calls):
    """`client.tasks`: the registry."""

    create = sends(task_calls.create)
    copy = sends(task_calls.copy)
    get = sends(task_calls.get)
    list = lists(task_calls.list_all)
    replace = sends(task_calls.replace)
    update = sends(task_calls.update)
    delete = sends(task_calls.delete)
    history = sends(task_calls.history)
    rollback = sends(task_calls.rollback)
    restore = sends(task_calls.restore)
    routing = sends(task_calls.routing)
    lora = sends(task_calls.lora)
    similar = sends(task_calls.similar)
    fit = sends(task_calls.fit)
    fit_new = sends(task_calls.fit_new)
    wait = runs(flows.wait_for_task)


class Jobs(Calls):
    """`client.jobs`: fits that were ordered."""

    get = sends(calls.get_job)
    list = lists(calls.list_jobs)
    events = streams(calls.job_events)
    cancel = sends(calls.cancel_job)
    wait = runs(flows.wait_for_job)


class Client(Calls):
    """A server as a Python object. Close it, or use it in a `with` block; threads may share it.

    base_url: by default `POLYHEAD_URL`, or this machine's port 8000. api_key: by default
    `POLYHEAD_API_KEY`. timeout: seconds of one attempt; of a stream, the longest silence.
    total_timeout: seconds of all attempts together. max_retries: of calls that were not carried
    out, or that may be carried out twice. http_client: with other certificates or proxies; it is
    the caller's to close.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = 300.0,
        total_timeout: float | None = None,
        max_retries: int = 3,
        http_client: httpx.Client | None = None,
    ) -> None:
        http = http_client or httpx.Client(mounts=dict.fromkeys(LOOPBACK))
        self._own = None if http_client else http
        options = Options.of(base_url, api_key, timeout, total_timeout, max_retries)
        self._use(Driver(http, options))

    generate = sends(calls.generate)
    stream = streams(calls.stream)
    score = sends(calls.score)
    inventory = sends(calls.inventory)
    health = sends(calls.health)

    def with_options(
        self,
        *,
        timeout: float | None = None,
        total_timeout: float | None = None,
        max_retries: int | None = None,
    ) -> Self:
        """This client with other times or tries, over the same connections."""
        other = copy.copy(self)
        options = changed(self._driver.options, timeout, total_timeout, max_retries)
        other._use(Driver(self._driver.http, options))
        return other

    def close(self) -> None:
        """Close the connections."""
        if self._own is not None:
            self._own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _use(self, driver: Driver) -> None:
        self._driver = driver
        self.tasks = Tasks(driver)
        self.jobs = Jobs(driver)
