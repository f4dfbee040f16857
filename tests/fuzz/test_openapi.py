"""Every described call, with bodies that fit the description and bodies that do not.

`make fuzz` sends over 10,000; in the other tests each call gets a few. No answer is a failure of
the server, each has a status, a type and a form that are described, what breaks the description is
refused, no key no answer, and afterwards the server is as large and as fast as before.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from live_server import TASKS
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from server_process import ServerProcess, server_process

from polyhead.server.http.keys import hash_of, new_key

EXAMPLES = int(os.environ.get("TEST_FUZZ_EXAMPLES", "6"))
"""For each call."""
KEY = new_key()
HEADERS = {"Authorization": f"Bearer {KEY}"}
HANG_SECONDS = 20
MAX_GROWTH = 300 << 20
DOOMED = "doomed"
NAMES = ("task", "model", "copy_of")
CHOICES = (
    (("task", "mixture", "routing"), ("task", TASKS[0])),
    (("prompt", "input", "messages"), ("input", "hello")),
)
SOURCES = ("routing", "copy_of", "private_adapter", "examples", "context")
SMALL = {"max_tokens": 4, "n": 2, "logprobs": 3, "max_completion_tokens": 4, "top_logprobs": 3}
# The description cannot say that exactly one of some fields is wanted, nor what a task's own limits
# leave room for, so a body that fits it may be refused.
NOT_CHECKED = [checks.positive_data_acceptance]
LATE = [*NOT_CHECKED, not_a_server_error]
"""Whoever asks for an answer within no time at all is told 504, and nothing has failed."""


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("fuzzed")
    entry = {"id": "all", "hash": hash_of(KEY), "scopes": ["generate", "tasks", "admin"]}
    keys_file = folder / "keys.json"
    keys_file.write_text(json.dumps({"keys": [entry]}))
    limits = {"max_context": 64, "max_fit_jobs": 10**6, "max_body_bytes": 1 << 20}
    with server_process(model_folder, folder / "data", api_keys_file=keys_file, **limits) as found:
        yield found


def resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/statm").read_text()
    return int(status.split()[1]) * os.sysconf("SC_PAGE_SIZE")


def aimed(case: Any, chance: random.Random) -> None:
    """Name a task that is there, keep one of the fields that exclude each other, and ask for
    little: what comes at random hardly ever does, and is refused early."""
    if "task_id" in (case.path_parameters or {}):
        case.path_parameters["task_id"] = (
            DOOMED if case.method == "DELETE" else chance.choice(TASKS)
        )
    if not isinstance(case.body, dict):
        return
    for name in NAMES:
        if isinstance(case.body.get(name), str):
            case.body[name] = chance.choice(TASKS)
    for name, most in SMALL.items():
        if isinstance(case.body.get(name), int):
            case.body[name] = min(case.body[name], most)
    if case.path in ("/generate", "/score"):
        for names, usual in CHOICES:
            keep_one(case.body, names, usual, chance)
    elif case.path == "/tasks" or case.method == "PUT":
        case.body.pop("fit", None)
        keep_one(case.body, SOURCES, ("copy_of", chance.choice(TASKS)), chance)
        case.body["id"] = f"t{chance.random()}" if case.method == "POST" else None


def keep_one(
    body: dict[str, Any], names: Sequence[str], usual: tuple[str, str], chance: random.Random
) -> None:
    """Leave one of the fields `names`, more often than not the `usual` one."""
    there = [name for name in names if body.get(name) is not None]
    kept = chance.choice(there) if there and chance.random() < 0.3 else usual[0]
    for name in names:
        if name != kept:
            body.pop(name, None)
    if kept == usual[0]:
        body[kept] = usual[1]


def straightened(value: Any) -> bool:
    """Whether a query's parameter of this wrong value is sent as none or as a single text, with
    which nothing is wrong any more when it arrives."""
    return value is None or (isinstance(value, list | dict) and len(value) < 2)


def test_every_described_call(server: ServerProcess) -> None:
    described = schemathesis.openapi.from_url(f"{server.client.base_url}/openapi.json")
    answers: Counter[tuple[str, int]] = Counter()
    doomed = {"id": DOOMED, "copy_of": TASKS[0]}
    assert server.client.post("/tasks", json=doomed, headers=HEADERS).status_code == 201
    before = resident_bytes(server)
    for result in described.get_all_operations():
        send_many(result.ok(), answers)
        assert server.process.poll() is None
    assert len({label for label, _ in answers}) > 20
    assert sum(answers.values()) > 20 * EXAMPLES
    reached = {status for _, status in answers}
    assert reached >= ({200, 401, 404, 422} if EXAMPLES < 40 else {200, 201, 204, 401, 404, 422})
    assert resident_bytes(server) - before < MAX_GROWTH
    assert server.client.get("/health/ready").elapsed.total_seconds() < 1
    print(json.dumps({f"{label} {status}": n for (label, status), n in sorted(answers.items())}))


def send_many(operation: Any, answers: Counter[tuple[str, int]]) -> None:
    modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    cases = st.one_of([operation.as_strategy(generation_mode=mode) for mode in modes])

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=EXAMPLES < 50,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=cases, seed=st.integers(0, 2**32))
    def send(case: Any, seed: int) -> None:
        right = case.meta.generation.mode.is_positive
        assume(right or not any(map(straightened, (case.query or {}).values())))
        if right and seed % 4:
            aimed(case, random.Random(seed))
        answer = case.call(headers=HEADERS, timeout=HANG_SECONDS)
        answers[operation.label, answer.status_code] += 1
        late = answer.status_code == 504 and answer.json()["code"] == "deadline_passed"
        assert not late or "deadline" in case.body
        case.validate_response(answer, excluded_checks=LATE if late else NOT_CHECKED)

    send()


def test_the_checks_would_notice(server: ServerProcess) -> None:
    """A control: an answer that is not described fails them."""
    described = schemathesis.openapi.from_url(f"{server.client.base_url}/openapi.json")
    case = described["/inventory"]["GET"].Case()
    answer = case.call(headers=HEADERS)
    case.validate_response(answer, excluded_checks=NOT_CHECKED)
    answer.status_code = 299
    with pytest.raises(FailureGroup, match="1 distinct failure"):
        case.validate_response(answer, excluded_checks=NOT_CHECKED)
