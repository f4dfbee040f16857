"""The body that asks for a fit, and how jobs are shown."""

from typing import Any

from pydantic import BaseModel, Field

from polyhead.server.http.schemas import Body, Examples, FitOptionsBody, Template
from polyhead.server.tasks.job import Job, JobState


class FitBody(Body):
    """`POST /tasks/{id}/fit`. Without a template the task's own stays."""

    examples: Examples
    template: Template | None = None
    fit: FitOptionsBody | None = None


class ProgressAnswer(BaseModel):
    """How far a fit has come. `score` is of the held-out examples, in [0, 1]."""

    step: int = 0
    steps: int = 0
    loss: float | None = None
    score: float | None = None


class PointAnswer(ProgressAnswer):
    """One `progress` event. `seconds_left` follows from the pace so far."""

    method: str
    seconds_left: float | None = None


class MethodAnswer(BaseModel):
    """What one method came to on the held-out examples."""

    method: str
    score: float | None = None
    seconds: float


class ResultAnswer(BaseModel):
    """What a job has made. The scores are of held-out examples, which the fit did not learn from;
    `prompted_score` is the bare backbone's, with the other examples in its prompt."""

    generation: str
    method: str
    score: float | None = None
    prompted_score: float | None = None
    methods: list[MethodAnswer] | None = None
    seconds: float
    began_from: list[str] | None = Field(
        None, description="The tasks that a warm start found near, if any was"
    )


class JobAnswer(BaseModel):
    """A job as it is now. `result` once it has succeeded, `error` once it has failed."""

    id: str
    task: str
    state: JobState
    progress: ProgressAnswer
    result: ResultAnswer | None = None
    error: str | None = None


class JobPage(BaseModel):
    """`next` is the cursor of the page after this one, null on the last."""

    jobs: list[JobAnswer]
    next: str | None = Field(...)


def job_answer(job: Job, newest: dict[str, Any] | None = None) -> dict[str, Any]:
    """`job` as JSON; `newest` is progress that the database has not seen yet."""
    progress = ProgressAnswer.model_validate({**job.progress, **(newest or {})})
    whole = JobAnswer(
        id=job.id,
        task=job.task,
        state=job.state,
        progress=progress,
        result=ResultAnswer.model_validate(job.result) if job.result else None,
        error=job.error,
    )
    shown = whole.model_dump(exclude_none=True)
    shown["progress"].setdefault("loss", None)
    return shown
