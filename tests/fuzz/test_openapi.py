"""Every described call, with bodies that fit the description and bodies that do not.

`make fuzz` sends over 10,000; in the other tests each call gets a few. No answer is a failure of
the server, each has a status, a type and a form that are described, what breaks the description is
refused, no key no answer, and afterwards the server is as large and as fast as before.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from live_server import TASKS
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks
from server_process import ServerProcess, server_process

from polyhead.server.http.keys import hash_of, new_key

EXAMPLES = int(os.environ.get("POLYHEAD_FUZZ_EXAMPLES", "6"))
"""For each call."""
KEY = new_key()
HEADERS = {"Authorization": f"Bearer {KEY}"}
HANG_SECONDS = 20
MAX_GROWTH = 300 << 20
DOOMED = "doomed"
NAMES = ("task", "model", "copy_of")
CHOICES = (("task", "mixture", "routing"), ("prompt", "input", "messages"))
# The description cannot say that exactly one of some fields is wanted, nor what a task's own limits
# leave room for, so a body that fits it may be refused.
NOT_CHECKED = [checks.positive_data_acceptance]


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
    """Name a task that is there and keep one of the fields that exclude each other: what comes at
    random hardly ever does."""
    if "task_id" in (case.path_parameters or {}):
        case.path_parameters["task_id"] = (
            DOOMED if case.method == "DELETE" else chance.choice(TASKS)
        )
    if not isinstance(case.body, dict):
        return
    for name in NAMES:
        if isinstance(case.body.get(name), str):
            case.body[name] = chance.choice(TASKS)
    if case.path in ("/generate", "/score"):
        for names in CHOICES:
            given_ones = [name for name in names if case.body.get(name) is not None]
            for name in given_ones[1:]:
                del case.body[name]
        if not any(case.body.get(name) is not None for name in CHOICES[0]):
            case.body["task"] = chance.choice(TASKS)
        if not any(case.body.get(name) is not None for name in CHOICES[1]):
            case.body["prompt"] = "hello"


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
    assert {status for _, status in answers} >= {200, 404, 422}
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
        if case.meta.generation.mode.is_positive and seed % 4:
            aimed(case, random.Random(seed))
        answer = case.call(headers=HEADERS, timeout=HANG_SECONDS)
        answers[operation.label, answer.status_code] += 1
        case.validate_response(answer, excluded_checks=NOT_CHECKED)

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
