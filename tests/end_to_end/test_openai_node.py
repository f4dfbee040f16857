"""OpenAI's npm client, unmodified, against a real server."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from live_server import TASKS, LiveServer

HERE = Path(__file__).parent
MODULES = HERE.parents[1] / ".venv" / "npm" / "node_modules"
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "maximum": 99, "minimum": 0},
        "up": {"type": "boolean"},
    },
    "required": ["x", "up"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def found(live: LiveServer) -> dict[str, Any]:
    """What the client made of every call."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: OpenAI's npm client cannot run")
    if not (MODULES / "openai").is_dir():
        pytest.skip("OpenAI's npm client is not installed: `make npm` does it, and needs npm")
    run = subprocess.run(
        [node, str(HERE / "openai_node.cjs"), live.url, json.dumps(POINT)],
        env={"PATH": os.environ["PATH"], "NODE_PATH": str(MODULES), "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr.decode()
    answers: dict[str, Any] = json.loads(run.stdout)
    return answers


def test_it_lists_models(found: dict[str, Any]) -> None:
    assert set(found["models"]) >= {"base", *TASKS}
    assert found["model"]["id"] == "amber"


def test_it_completes(found: dict[str, Any], live: LiveServer) -> None:
    (choice,) = found["completion"]["choices"]
    assert choice["text"] == live.generate(max_tokens=12)["choices"][0]["text"]
    assert len(choice["logprobs"]["token_logprobs"]) == 12
    assert found["completion"]["usage"]["total_tokens"] == 17


def test_it_chats_whole_and_streamed(found: dict[str, Any], live: LiveServer) -> None:
    native = live.generate(prompt="user: hi\nassistant:", max_tokens=12)["choices"][0]["text"]
    assert found["chat"]["choices"][0]["message"]["content"] == native
    assert found["streamed"] == {"text": native, "usage": found["chat"]["usage"]}


def test_it_raises_its_own_errors(found: dict[str, Any]) -> None:
    assert found["unknown"] == {
        "name": "NotFoundError",
        "status": 404,
        "code": "model_not_found",
        "param": "model",
        "type": "invalid_request_error",
    }
    assert found["wrong"]["name"] == "UnprocessableEntityError"
    assert found["wrong"]["param"] == "n"


def test_it_parses_an_answer_held_to_a_schema(found: dict[str, Any]) -> None:
    (choice,) = found["json"]["choices"]
    assert choice["finish_reason"] == "stop"
    parsed = json.loads(choice["message"]["content"])
    assert set(parsed) == {"x", "up"}
    assert 0 <= parsed["x"] <= 99
    assert isinstance(parsed["up"], bool)
