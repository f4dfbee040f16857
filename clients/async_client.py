"""`AsyncClient`: the methods of `Client`, to be awaited; streams and lists are iterated."""

import copy
from types import TracebackType
from typing import Self

import httpx

from polyhead.clients import calls, flows, task_calls
from polyhead.clients.awaiting import AsyncCalls, AsyncDriver, lists, runs, sends, streams
from polyhead.clients.settings import LOOPBACK, Options, changed


class AsyncTasks(AsyncCalls):
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


class AsyncJobs(AsyncCalls):
    """`client.jobs`: fits that were ordered."""

    get = sends(calls.get_job)
    list = lists(calls.list_jobs)
    events = streams(calls.job_events)
    cancel = sends(calls.cancel_job)
    wait = runs(flows.wait_for_job)


class AsyncClient(AsyncCalls):
    """`Client` for asyncio and trio; the arguments are the same."""

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | None = 300.0,
        total_timeout: float | None = None,
        max_retries: int = 3,
        http_client: httpx.AsyncClient | None = None,
    ) -> None:
        http = http_client or httpx.AsyncClient(mounts=dict.fromkeys(LOOPBACK))
        self._own = None if http_client else http
        options = Options.of(base_url, api_key, timeout, total_timeout, max_retries)
        self._use(AsyncDriver(http, options))

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
        other._use(AsyncDriver(self._driver.http, options))
        return other

    async def close(self) -> None:
        """Close the connections."""
        if self._own is not None:
            await self._own.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _use(self, driver: AsyncDriver) -> None:
        self._driver = driver
        self.tasks = AsyncTasks(driver)
        self.jobs = AsyncJobs(driver)
