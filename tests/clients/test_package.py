"""What the package promises: what it imports, which names it has, which answers it knows."""

import inspect
import subprocess
import sys
from typing import Any

import pytest

import polyhead.clients
from polyhead.clients import AsyncClient, Client, errors, models
from polyhead.clients.errors import retry_after, status_error


def test_neither_torch_nor_numpy_nor_the_server_is_imported() -> None:
    code = (
        "import sys; from polyhead.clients import AsyncClient, Client, Routing;"
        "AsyncClient(), Client(), Routing.from_logits([[0.0, 1.0]]).weights();"
        "print({'torch', 'numpy', 'polyhead.server', 'polyhead.adapters'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_public_names() -> None:
    assert all(hasattr(polyhead.clients, name) for name in polyhead.clients.__all__)
    classes = [c for c in vars(errors).values() if inspect.isclass(c)]
    raised = {c.__name__ for c in classes if issubclass(c, errors.PolyheadError)}
    assert raised <= set(polyhead.clients.__all__)


@pytest.mark.parametrize("part", ["", "tasks", "jobs"])
def test_both_clients_have_the_same_methods(part: str) -> None:
    def methods(client: Any) -> dict[str, list[str]]:
        owner = getattr(client, part) if part else client
        named = {name: getattr(owner, name) for name in dir(owner) if not name.startswith("_")}
        callables = {name: m for name, m in named.items() if callable(m)}
        return {name: list(inspect.signature(m).parameters) for name, m in callables.items()}

    found = methods(Client())
    assert found == methods(AsyncClient())
    assert found["get" if part else "generate"]


def test_methods_document_themselves() -> None:
    tasks = Client().tasks
    assert "if_match: the generation" in (tasks.replace.__doc__ or "")
    assert list(inspect.signature(tasks.copy).parameters)[:2] == ["source", "id"]
    assert inspect.signature(tasks.get).return_annotation is models.Task
    assert inspect.signature(Client().jobs.wait).parameters.keys() == {"job", "timeout"}


def test_every_field_of_the_servers_answers_is_known() -> None:
    from polyhead.server.http import history, job_schemas, schemas

    theirs = {
        schemas.TaskAnswer: models.Task,
        schemas.TaskPage: models.TaskPage,
        history.VersionAnswer: models.Version,
        history.HistoryAnswer: models.History,
        schemas.SimilarAnswer: models.Similar,
        schemas.Neighbour: models.Neighbour,
        schemas.GenerateAnswer: models.Generated,
        schemas.Choice: models.Choice,
        schemas.TokenAnswer: models.Token,
        schemas.Usage: models.Usage,
        schemas.ScoreAnswer: models.Scored,
        schemas.Score: models.Score,
        schemas.InventoryAnswer: models.Inventory,
        job_schemas.JobAnswer: models.Job,
        job_schemas.ProgressAnswer: models.Progress,
        job_schemas.PointAnswer: models.Point,
        job_schemas.MethodAnswer: models.MethodScore,
        job_schemas.ResultAnswer: models.FitResult,
    }
    for server, client in theirs.items():
        assert set(server.model_fields) == set(client.model_fields), client.__name__


def test_what_can_be_asked_is_what_the_server_takes() -> None:
    from polyhead.clients import asking
    from polyhead.server.http import schemas

    taken = set(schemas.GenerateBody.model_fields) - {"task", "stream"}
    assert set(asking.Generating.__annotations__) == taken
    assert set(asking.Sampling.__annotations__) == set(schemas.Sampling.model_fields)
    assert set(asking.FitOptions.__annotations__) == set(schemas.FitOptionsBody.model_fields)


def test_answers_that_are_not_the_servers_are_still_typed() -> None:
    page = b"<html>Bad gateway</html>"
    found = status_error(502, {}, page)
    assert (type(found).__name__, found.code, found.message) == (
        "ServerError",
        "http_502",
        page.decode(),
    )
    assert type(status_error(418, {}, b"")) is errors.APIStatusError
    assert status_error(422, {"x-request-id": "r1"}, b"{}").request_id == "r1"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 0 ", 0.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("soon", None),
        (None, None),
    ],
)
def test_retry_after_is_read_or_left(value: str | None, seconds: float | None) -> None:
    assert retry_after(value) == seconds
