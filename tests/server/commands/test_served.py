"""`polyhead generate` and `polyhead tasks …` against a live server."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from click.testing import Result
from live_server import LiveServer
from typer.testing import CliRunner

from polyhead.clients import Client
from polyhead.server.cli import app

runner = CliRunner()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, live: LiveServer) -> None:
    monkeypatch.setenv("POLYHEAD_URL", live.url)
    monkeypatch.delenv("POLYHEAD_API_KEY", raising=False)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def own(live: LiveServer) -> Iterator[str]:
    """An id without a history, whose task is removed again."""
    name = f"own-{uuid4().hex}"
    yield name
    live.client.delete(f"/tasks/{name}")


def run(*arguments: str, status: int = 0, text: str | None = None) -> Result:
    done = runner.invoke(app, list(arguments), input=text)
    assert done.exit_code == status, done.output
    return done


def as_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


ASKED = ("hello", "--as", "prompt", "--max-tokens", "12")


def test_a_text_is_the_same_streamed_whole_and_from_a_pipe(live: LiveServer) -> None:
    whole = as_json("generate", "amber", *ASKED)
    text = whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] > 1
    assert run("generate", "amber", *ASKED).stdout == text + "\n"
    assert run("generate", "amber", *ASKED[1:], text="hello").stdout == text + "\n"
    assert run("generate", "amber", *ASKED, "--url", live.url).stdout == text + "\n"
    assert run("generate", "birch", *ASKED).stdout != text + "\n"


def test_what_is_asked_for_reaches_the_server() -> None:
    drawn = ("--temperature", "1", "--n", "2", "--seed")
    first, same, other = (as_json("generate", "amber", *ASKED, *drawn, s) for s in ("1", "1", "2"))
    assert [len(one["choices"]) for one in (first, other)] == [2, 2]
    assert first["choices"] == same["choices"] != other["choices"]
    table = run("generate", "amber", *ASKED, *drawn, "1").stdout
    assert table.splitlines()[0].split() == ["answer", "ended", "text"]
    message = as_json("generate", "amber", "hello", "--as", "message", "--max-tokens", "2")
    prompt = as_json("generate", "amber", "hello", "--as", "prompt", "--max-tokens", "2")
    assert message["usage"]["prompt_tokens"] > prompt["usage"]["prompt_tokens"]


def test_a_task_is_made_listed_shown_and_taken_back(
    live: LiveServer, own: str, tmp_path: Path
) -> None:
    with Client(live.url) as client:
        client.tasks.routing("amber").save(tmp_path / "amber.safetensors")
    words = ["--metadata", "team:docs", "--template", "{input}\\n"]
    made = as_json("tasks", "create", own, "--routing", str(tmp_path / "amber.safetensors"), *words)
    assert (made["template"], made["metadata"]) == ("{input}\n", {"team": "docs"})
    assert [one["id"] for one in as_json("tasks", "list", "--metadata", "team:docs")] == [own]
    assert {"amber", "birch", own} <= {one["id"] for one in as_json("tasks", "list")}
    assert run("tasks", "list", "--prefix", own[:-1]).stdout.splitlines()[1].split()[0] == own
    live.client.put(f"/tasks/{own}", json={"copy_of": "birch"}).raise_for_status()
    shown = as_json("tasks", "show", own)
    assert shown["generation"] != made["generation"]
    assert [one["ended"] for one in shown["versions"]] == [None, "replaced"]
    table = run("tasks", "show", own).stdout
    assert made["generation"][:12] in table
    assert as_json("tasks", "rollback", own)["generation"] == made["generation"]
    named = run("tasks", "rollback", own, "--to", shown["generation"][:12]).stdout
    assert shown["generation"][:12] in named
    lost = run("tasks", "rollback", own, "--to", "f" * 64, status=1)
    assert lost.stderr.startswith(f"error: {own}: not one version")


def test_a_copy_and_a_fit_of_it(live: LiveServer, own: str, tmp_path: Path) -> None:
    assert run("tasks", "create", own, "--copy-of", "amber").stdout.startswith(f"{own}: routing")
    assert "one of --routing" in run("tasks", "create", "x", status=2).stderr
    file = tmp_path / "examples.jsonl"
    lines = [{"task": own, "input": f"n{i}", "output": "ab"[i % 2]} for i in range(6)]
    others = [{"task": "other", "input": "x", "output": "y"}]
    file.write_text("\n".join(map(json.dumps, lines + others)))
    options = ["--examples", str(file), "--method", "z", "--steps", "4", "--holdout", "0.34"]
    before = live.client.get(f"/tasks/{own}").json()["generation"]
    job = as_json("tasks", "fit", own, *options)
    assert (job["state"], job["result"]["method"]) == ("succeeded", "z")
    assert live.client.get(f"/tasks/{own}").json()["generation"] == job["result"]["generation"]
    assert job["result"]["generation"] != before
    live.client.delete(f"/tasks/{own}")
    table = run("tasks", "fit", own, *options).stdout
    assert table.splitlines()[1].split()[:2] == ["z", "kept"]
    assert live.client.get(f"/tasks/{own}").json()["provenance"]["how"] == "fitted"


def test_what_is_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    def refused(*arguments: str, status: int = 1) -> str:
        told = run(*arguments, status=status).stderr
        assert told.startswith("error: ")
        assert len(told.splitlines()) == 1
        return told

    assert "unknown_task" in refused("generate", "nobody", "x")
    assert "temperature" in refused("generate", "amber", "x", "--temperature", "-1")
    assert "connection" in refused("tasks", "list", "--url", "http://127.0.0.1:9")
    assert "KEY:VALUE" in refused("tasks", "list", "--metadata", "team", status=2)
    file = tmp_path / "wrong.jsonl"
    file.write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n')
    assert "wrong.jsonl:2" in refused("tasks", "fit", "x", "--examples", str(file))
    assert "safetensors" in refused("tasks", "create", "x", "--routing", str(file))


def test_a_value_does_not_steer_the_terminal(live: LiveServer, own: str) -> None:
    body = {"copy_of": "amber", "id": own, "template": "[red]\x1b[2J{input}"}
    live.client.post("/tasks", json=body).raise_for_status()
    shown = run("tasks", "show", own).stdout
    assert "\x1b" not in shown
    assert "[red]" in shown


def test_no_key_is_taken_from_the_command_line() -> None:
    for command in (["generate"], ["tasks", "list"]):
        shown = run(*command, "--help").output
        assert "POLYHEAD_API_KEY" in shown
        assert "--api-key" not in shown
    assert "POLYHEAD_API_KEY" not in os.environ
