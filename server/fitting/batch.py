"""The jobs that are being fitted together, and what the worker says about them."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.fitting.board import Board
from polyhead.server.tasks.contents import Content
from polyhead.server.tasks.errors import JobEnded
from polyhead.server.tasks.job import Job, Order
from polyhead.server.tasks.jobs import Jobs

logger = logging.getLogger(__name__)

NOTE_SECONDS = 2.0
"""Between two writes of progress to the database; each waits for the disk."""
PROGRESS_FIELDS = ("step", "steps", "loss", "score")


@dataclass(frozen=True)
class Outcome:
    """How a batch ended: all answered, broken off by an error, saved for later, worker dead."""

    kind: Literal["done", "failed", "stopped", "died"]
    reason: str = ""


class Batch:
    """Turns the worker's messages into changes of jobs and tasks. Used by the lane's thread.

    keep: runs a change of the database until the database takes it.
    """

    def __init__(
        self,
        taken: Sequence[tuple[Job, Order]],
        inventory: Inventory,
        jobs: Jobs,
        board: Board,
        keep: Callable[[Callable[[], Any]], Any],
    ) -> None:
        self.jobs = {job.id: job for job, _ in taken}
        self.id = taken[0][0].batch or ""
        self._orders = {job.id: order for job, order in taken}
        self._inventory = inventory
        self._store = jobs
        self._board = board
        self._keep = keep
        self._ended: set[str] = set()
        self._fresh: dict[str, dict[str, Any]] = {}
        self._noted = time.monotonic()

    def order(self) -> dict[str, Any]:
        """What the worker is told to do."""
        return {
            "jobs": [
                {
                    "job": job_id,
                    "template": order.template,
                    "options": dict(order.options),
                    "examples": [[example.input, example.output] for example in order.examples],
                }
                for job_id, order in self._orders.items()
            ]
        }

    def open_jobs(self) -> list[str]:
        """Jobs that the worker has not answered."""
        return [job_id for job_id in self.jobs if job_id not in self._ended]

    def take(self, message: dict[str, Any], data: bytes) -> Outcome | None:
        """One message; an outcome when the batch is over."""
        kind = message["event"]
        if kind == "progress":
            self._progress(message)
        elif kind == "result":
            self._result(message, data)
        elif kind in ("failed", "stopped", "done"):
            self._note()
            return Outcome(kind, message.get("error", ""))
        return None

    def _progress(self, message: dict[str, Any]) -> None:
        job_id = message["job"]
        progress = {name: message[name] for name in PROGRESS_FIELDS if name in message}
        self._board.tell(job_id, {**progress, "method": message["method"]})
        self._fresh[job_id] = progress
        if time.monotonic() - self._noted >= NOTE_SECONDS:
            self._note()

    def _note(self) -> None:
        fresh, self._fresh = self._fresh, {}
        if fresh:
            self._keep(lambda: self._store.note(fresh))
        self._noted = time.monotonic()

    def _result(self, message: dict[str, Any], data: bytes) -> None:
        job_id = message["job"]
        self._note()
        try:
            content = self._content(message["kind"], data)
        except ValueError as exc:
            reason = f"the fitted adapter cannot be served: {exc}"
            self._end(job_id, lambda: self._store.fail(job_id, reason))
        else:
            self._end(job_id, lambda: self._store.succeed(job_id, content, message["result"]))

    def _content(self, kind: str, data: bytes) -> Content:
        """Checked as if a client had sent it: a fit can diverge."""
        if kind == "routing":
            return Routing.from_safetensors(data, self._inventory.layout)
        return PrivateAdapter.from_safetensors(data, self._inventory.header.modules)

    def _end(self, job_id: str, change: Callable[[], Job]) -> None:
        def unless_ended() -> None:
            try:
                change()
            except JobEnded as exc:
                logger.info("a result came too late: %s", exc)

        self._keep(unless_ended)
        self._ended.add(job_id)
        self._board.changed(job_id)
