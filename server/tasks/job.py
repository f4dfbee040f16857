"""A job: the fit of one task from examples, as the database keeps it."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, get_args

from polyhead.server.tasks.task import JsonScalar

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
STATES: tuple[JobState, ...] = get_args(JobState)
OPEN: tuple[JobState, ...] = ("queued", "running")


@dataclass(frozen=True)
class FitExample:
    """An input and the answer that the task is to give."""

    input: str
    output: str


@dataclass(frozen=True)
class Order:
    """What a job was asked to do; it never changes.

    options: of the fit, as the caller gave them. defaults, metadata: of a task that the job is to
    register; a task that exists keeps its own.
    """

    examples: tuple[FitExample, ...]
    template: str
    options: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, JsonScalar] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """Where a job stands. Treat the dictionaries as read-only: instances are shared."""

    id: str
    task: str
    state: JobState
    base: str | None  # the generation that the fit replaces; None registers a new task
    batch: str | None  # jobs of one batch were fitted together; None before the first start
    attempts: int  # starts that were not undone by an orderly stop
    progress: dict[str, Any]
    result: dict[str, Any] | None
    error: str | None
    created_at: datetime  # UTC
    started_at: datetime | None  # of the newest start
    ended_at: datetime | None
    owner: str | None = None  # the server that runs it
    lease: datetime | None = None  # renewed while that server lives: a sign of life, no deadline

    @property
    def is_open(self) -> bool:
        return self.state in OPEN


def new_job_id() -> str:
    """Ids sort by the time they were made at, to the millisecond."""
    return f"job-{time.time_ns() // 1_000_000:012x}{secrets.token_hex(5)}"


def new_batch_id() -> str:
    return f"batch-{secrets.token_hex(8)}"
