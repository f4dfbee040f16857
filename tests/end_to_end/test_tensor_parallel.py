"""A server whose backbone is cut over two processes answers as one, and ends as one."""

import base64
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from factories import (
    byte_tokenizer,
    random_private,
    tiny_generator,
    tiny_inventory,
    tiny_model,
)
from live_server import CONTEXT, LiveServer
from safetensors.torch import load
from server_process import ServerProcess, server_process

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.embedding import embed

PROMPTS = ("hello", "a much longer prompt, which is cut into pieces " * 4, "x")
Answers = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def private() -> str:
    """A private adapter for the tests' backbone, as it is uploaded."""
    adapter = random_private(tiny_inventory(tiny_model()), 3)
    return base64.b64encode(adapter.to_safetensors()).decode()


@pytest.fixture(scope="module")
def pair(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("pair")
    shutil.copytree(model_folder / "inventory", folder / "inventory")
    (folder / "backbone").symlink_to(model_folder / "backbone")
    inventory = Inventory.load(folder / "inventory")
    inventory.generator = tiny_generator(inventory, torch.zeros(64))
    inventory.save(folder / "inventory")
    with server_process(folder, folder / "data", tensor_parallel=2, max_step_tokens=64) as server:
        workers = server.children()
        yield server
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert workers
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def answers_of(client: httpx.Client, private: str) -> Answers:
    """Tokens and log-probabilities by task and prompt; the second round finds prefixes kept."""
    body = {"id": "own", "private_adapter": {"safetensors": private}}
    assert client.post("/tasks", json=body).status_code == 201
    found = {}
    for task in ("amber", "birch", "own", "base", "amber"):
        for number, prompt in enumerate(PROMPTS):
            asked: dict[str, Any] = {"task": task, "prompt": prompt, "max_tokens": 16}
            answer = client.post("/generate", json=asked | {"ignore_eos": True, "logprobs": 0})
            assert answer.status_code == 200, answer.text
            (choice,) = answer.json()["choices"]
            entries = [(token["token_id"], token["logprob"]) for token in choice["logprobs"]]
            found[f"{task}-{number}-{len(found)}"] = entries
    assert client.delete("/tasks/own").status_code == 204
    return found


def test_two_processes_answer_as_one(pair: ServerProcess, live: LiveServer, private: str) -> None:
    together, alone = answers_of(pair.client, private), answers_of(live.client, private)
    for name, answer in alone.items():
        assert [token for token, _ in together[name]] == [token for token, _ in answer], name
        gaps = [abs(a - b) for (_, a), (_, b) in zip(together[name], answer, strict=True)]
        assert max(gaps) < 1e-4, name
    first = [answer for name, answer in alone.items() if name.split("-")[1] == "0"]
    said = {tuple(token for token, _ in answer) for answer in first}
    assert len(said) == 4  # the control: every task answers otherwise
    assert len(pair.children()) == 1


def test_many_at_once_are_answered_alike(pair: ServerProcess, live: LiveServer) -> None:
    body = {"task": "coral", "prompt": "hi", "n": 4, "temperature": 1.0, "seed": 7}
    asked = body | {"max_tokens": 12, "ignore_eos": True}
    texts = [
        [choice["text"] for choice in client.post("/generate", json=asked).json()["choices"]]
        for client in (pair.client, live.client)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 4


def test_a_context_is_read_as_by_one(pair: ServerProcess) -> None:
    """The coefficients are those of transformers' own hidden states; another context has others."""
    lines = [
        "cat -> cats",
        "a line that is longer than a step of sixty-four tokens has room for it",
    ]
    inventory = tiny_inventory(tiny_model())
    plain = embed(tiny_model(max_position_embeddings=CONTEXT), byte_tokenizer(), lines)
    found = []
    for context in ("\n".join(lines), lines[0]):
        answer = pair.client.post("/tasks", json={"id": "read", "context": context})
        assert answer.status_code == 201, answer.text
        file = pair.client.get("/tasks/read/routing").content
        found.append(load(file)["coefficients"])
        assert pair.client.delete("/tasks/read").status_code == 204
    generator = tiny_generator(inventory, torch.zeros(64))
    wanted = generator.routing(plain.mean(0), inventory.layout).values
    torch.testing.assert_close(found[0], wanted, rtol=1e-3, atol=1e-3)
    assert (found[0] - found[1]).abs().max() > 0.05


def test_a_dead_worker_ends_the_server(model_folder: Path, tmp_path: Path) -> None:
    with server_process(model_folder, tmp_path, tensor_parallel=2) as server:
        (worker,) = server.children()
        os.kill(worker, signal.SIGKILL)
        end = time.monotonic() + 10
        while _ready(server.client):
            assert time.monotonic() < end
        assert server.process.wait(30) == 1


def test_workers_end_with_whoever_leads_them() -> None:
    script = "import os; from polyhead.server.engine.team import Team; Team(2); os._exit(3)"
    command = [sys.executable, "-c", script]
    leading = subprocess.Popen(command, stderr=subprocess.PIPE)
    _, said = leading.communicate(timeout=60)  # the worker holds the pipe for as long as it lives
    assert leading.returncode == 3
    assert said == b""


def test_heads_that_do_not_divide_are_refused_by_name(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from polyhead.server.cli import app; app()", "serve"]
    folders = {"backbone": model_folder / "backbone", "inventory": model_folder / "inventory"}
    for flag, value in {**folders, "data-dir": tmp_path, "tensor-parallel": 3, "port": 0}.items():
        command += [f"--{flag}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "heads: the inventory's heads cannot be split" in said
    assert "multiple of 3" in said


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/health/ready").status_code == 200
    except httpx.TransportError:
        return False
