"""`POST /tasks/{id}/fit`, and the fit behind `POST /tasks` with examples."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.responses import Response

from polyhead.adapters.training.encode import DEFAULT_TEMPLATE
from polyhead.server.http.bodies import json_body, takes
from polyhead.server.http.errors import InvalidValue, shown
from polyhead.server.http.examples import sound_examples
from polyhead.server.http.job_schemas import FitBody, JobAnswer, job_answer
from polyhead.server.http.parameters import Holdout, IfMatch, TaskId, TheService
from polyhead.server.http.registering import Registration, given_fields
from polyhead.server.http.schemas import ExampleBody, FitOptionsBody
from polyhead.server.http.service import Service
from polyhead.server.tasks.job import Job, Order

router = APIRouter(prefix="/tasks")


@router.post(
    "/{task_id}/fit", status_code=202, response_model=JobAnswer, openapi_extra=takes(FitBody)
)
async def fit(
    task_id: TaskId,
    body: Annotated[FitBody, Depends(json_body(FitBody))],
    service: TheService,
    if_match: IfMatch,
    holdout: Holdout = None,
) -> Response:
    """Fit a task from examples. The job is on disk when the answer comes; its success gives the
    task a new generation, and until then, and on failure, the old one stays."""
    job = await service.pool.run(_submit, service, task_id, body, if_match, holdout)
    return accepted(job)


def submit_new(service: Service, registered: Registration, holdout: float | None) -> Job:
    """A job that registers a task. Raises `InvalidValue` and what `Jobs.submit_new` raises."""
    body = registered.body
    registered.check_sources()
    if body.id is None:
        raise InvalidValue.of("id", "missing", found="nothing", expected="a task id")
    fields = given_fields(body, service.settings)
    template = fields.pop("template", None) or DEFAULT_TEMPLATE
    order = _order(service, body.examples or [], template, body.fit, holdout, **fields)
    return _woken(service, service.jobs.submit_new(body.id, order))


def accepted(job: Job) -> Response:
    """202 with the job."""
    headers = {"Location": f"/jobs/{job.id}"}
    return Response(to_json(job_answer(job)), 202, headers, "application/json")


def refuse_holdout(holdout: float | None) -> None:
    """Raises `InvalidValue` where a share to hold out is given and there are no examples."""
    if holdout is not None:
        raise InvalidValue.of(
            "query.holdout", "given without examples", found=str(holdout), expected="examples"
        )


def _submit(
    service: Service, task_id: str, body: FitBody, if_match: str | None, holdout: float | None
) -> Job:
    task = service.registry.get(task_id)
    template = body.template or task.template or DEFAULT_TEMPLATE
    order = _order(service, body.examples, template, body.fit, holdout)
    # The template is this generation's: another one may have another.
    return _woken(service, service.jobs.submit(task_id, order, if_match or task.generation))


def _order(
    service: Service,
    examples: list[ExampleBody],
    template: str,
    fit: FitOptionsBody | None,
    holdout: float | None,
    **fields: Any,
) -> Order:
    sound = sound_examples(examples, template, service.tokenizer, service.settings)
    return Order(sound, template, _options(fit, holdout), **fields)


def _options(fit: FitOptionsBody | None, holdout: float | None) -> dict[str, Any]:
    options = fit.model_dump(exclude_none=True) if fit is not None else {}
    if holdout is None:
        return options
    for name in ("holdout", "folds"):
        if options.get(name, holdout) != holdout:
            raise InvalidValue.of(
                "query.holdout",
                "differs from the body's",
                found=str(holdout),
                expected=f"no other than fit.{name}, {shown(options[name])}",
            )
    return {**options, "holdout": holdout}


def _woken(service: Service, job: Job) -> Job:
    service.lane.wake()
    return job
