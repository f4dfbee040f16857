"""Every exception has an answer, and the answer carries what a client needs."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from polyhead.adapters.errors import InventoryError, RoutingError
from polyhead.server.engine.errors import EngineDraining, EngineFull
from polyhead.server.http.errors import BodyTooLarge, InvalidValue, UnknownTaskNamed, shown
from polyhead.server.http.problems import KINDS, ROOTS, field_path, problem_of, problem_response
from polyhead.server.http.schemas import GenerateBody
from polyhead.server.tasks.errors import InvalidId, StaleGeneration


def tree(root: type[Exception]) -> Iterator[type[Exception]]:
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def members() -> list[type[Exception]]:
    return [cls for root in ROOTS for cls in tree(root) if cls.__module__.startswith("polyhead")]


def test_every_exception_of_the_trees_has_its_own_answer() -> None:
    unmapped = [cls.__qualname__ for cls in members() if cls not in KINDS]
    assert unmapped == []


def test_an_exception_class_without_an_entry_is_noticed() -> None:
    class Unforeseen(RoutingError):
        """Belongs to a tree, has no entry."""

    Unforeseen.__module__ = "polyhead.adapters.errors"
    assert Unforeseen in members()
    assert Unforeseen not in KINDS


def test_no_entry_is_left_over() -> None:
    assert set(KINDS) <= set(members())


def test_codes_name_one_status_each() -> None:
    statuses: dict[str, set[int]] = {}
    for kind in KINDS.values():
        statuses.setdefault(kind.code, set()).add(kind.status)
    assert {code for code, found in statuses.items() if len(found) > 1} == set()


def test_a_routing_error_keeps_its_field() -> None:
    exc = RoutingError("wrong shape", field="routing.logits", found="[1]", expected="[2]")
    problem = problem_of(exc)
    assert (problem.status, problem.code) == (422, "invalid_routing")
    assert problem.errors is not None
    assert problem.errors[0].model_dump() == {
        "field": "routing.logits",
        "message": exc.message,
        "found": "[1]",
        "expected": "[2]",
    }


@pytest.mark.parametrize("exc", [InventoryError("/secret/place: broken"), KeyError("secret")])
def test_the_servers_own_errors_say_nothing_of_it(exc: Exception) -> None:
    problem = problem_of(exc)
    assert (problem.status, problem.code) == (500, "internal_error")
    assert "secret" not in problem.model_dump_json()


@pytest.mark.parametrize(
    ("exc", "wait"), [(EngineFull("full", 2.2), "3"), (EngineDraining("bye"), "5")]
)
def test_503_says_when_to_come_back(exc: Exception, wait: str) -> None:
    response = problem_response(exc)
    assert response.status_code == 503
    assert response.headers["retry-after"] == wait
    assert response.headers["content-type"] == "application/problem+json"


def test_other_statuses_do_not() -> None:
    assert "retry-after" not in problem_response(BodyTooLarge(1)).headers


@pytest.mark.parametrize(
    ("exc", "status", "code"),
    [
        (BodyTooLarge(10), 413, "body_too_large"),
        (InvalidValue.of("n", "over"), 422, "invalid_value"),
        (UnknownTaskNamed.of("task", "none"), 404, "unknown_task"),
        (StaleGeneration("t", found="b", expected="a"), 412, "stale_generation"),
        (InvalidId("a/b", expected="x"), 422, "invalid_id"),
        (HTTPException(404), 404, "not_found"),
        (HTTPException(405), 405, "method_not_allowed"),
        (RequestValidationError([]), 422, "invalid_value"),
    ],
)
def test_status_and_code(exc: Exception, status: int, code: str) -> None:
    problem = problem_of(exc)
    assert (problem.status, problem.code) == (status, code)
    assert problem.type == f"urn:polyhead:problem:{code}"


def refused(body: Any) -> dict[str, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises((ValidationError, InvalidValue)) as caught:
        GenerateBody.model_validate_json(data)
    found: dict[str, Any] = json.loads(problem_response(caught.value).body)
    return found


@pytest.mark.parametrize(
    ("change", "field", "found", "expected"),
    [
        ({"temperature": "hot"}, "temperature", "'hot'", "a valid number"),
        ({"temperature": -1}, "temperature", "-1", "greater than or equal to 0"),
        ({"temperature": 1e-9}, "temperature", "1e-09", "0 (greedy) or at least 0.01"),
        ({"max_tokens": 0}, "max_tokens", "0", "greater than or equal to 1"),
        ({"max_tokens": 1.0}, "max_tokens", "1.0", "a valid integer"),
        ({"max_tokens": True}, "max_tokens", "True", "a valid integer"),
        ({"seed": 2**63}, "seed", str(2**63), f"less than or equal to {2**63 - 1}"),
        ({"seed": 10**60}, "seed", "an integer of 200 bits", f"less than or equal to {2**63 - 1}"),
        ({"prompt": [1, "x"]}, "prompt[1]", "'x'", "a valid integer"),
        ({"stop": ["a", 1]}, "stop[1]", "1", "a valid string"),
        ({"colour": 1}, "colour", "1", "no such field"),
        ({"priority": 101}, "priority", "101", "less than or equal to 100"),
        ({"deadline": 0}, "deadline", "0", "greater than 0"),
        ({"task": "a/../b"}, "task", "'a/../b'", None),
        ({"prompt": None}, "prompt", "none", "exactly one of prompt, input, messages"),
        ({"input": "x"}, "input", "prompt and input", "exactly one of prompt, input, messages"),
        ({"task": None}, "task", "none", "exactly one of task, mixture, routing"),
    ],
)
def test_a_wrong_value_is_named(
    change: dict[str, Any], field: str, found: str, expected: str | None
) -> None:
    problem = refused({"task": "base", "prompt": "x"} | change)
    assert (problem["status"], problem["code"]) == (422, "invalid_value")
    error = problem["errors"][0]
    assert (error["field"], error["found"]) == (field, found)
    assert expected in (None, error["expected"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"task": "base",}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_a_broken_body_is_400(body: bytes) -> None:
    problem = refused(body)
    assert (problem["status"], problem["code"]) == (400, "malformed_body")


def test_nan_is_named() -> None:
    problem = refused(b'{"task": "base", "prompt": "x", "temperature": NaN}')
    assert problem["errors"][0]["field"] == "temperature"
    assert problem["errors"][0]["expected"] == "a finite number"


def test_a_million_wrong_ids_make_one_error() -> None:
    problem = refused({"task": "base", "prompt": ["x"] * 100_000})
    assert len(problem["errors"]) == 1


def test_field_paths() -> None:
    assert field_path(("messages", 0, "content")) == "messages[0].content"
    assert field_path(("prompt", "<token ids>", 3)) == "prompt[3]"


def test_what_is_shown_is_short() -> None:
    assert len(shown("x" * 10**6)) < 100
    assert shown([1] * 10**6) == "a list of 1000000"
    assert shown(10**100_000).startswith("an integer of")
