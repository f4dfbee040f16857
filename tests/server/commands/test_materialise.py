"""`polyhead tasks materialise` against a live server, and PEFT with what it wrote."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import random_private
from live_server import LiveServer
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from polyhead.clients import Client, NotFoundError
from polyhead.server.cli import app

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


@pytest.fixture
def client(live: LiveServer) -> Iterator[Client]:
    with Client(live.url) as client:
        private = random_private(live.service.inventory, seed=5)
        client.tasks.create("own", private_adapter=private.to_safetensors())
        yield client
        client.tasks.delete("own")


def materialise(live: LiveServer, task: str, out: Path, status: int = 0) -> str:
    arguments = ["tasks", "materialise", task, "--out", str(out), "--url", live.url]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == status, done.output
    return done.output


def answer_of(folder: Path, backbone: Path) -> list[int]:
    bare = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(bare, folder).eval()
    ids = torch.tensor([list(b"hello")])
    with torch.no_grad():
        for _ in range(12):
            last = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    found: list[int] = ids[0, 5:].tolist()
    return found


def test_the_folder_answers_in_peft_as_the_task_does_here(
    client: Client, live: LiveServer, model_folder: Path, tmp_path: Path
) -> None:
    found, served = [], []
    for task in ("amber", "birch", "own"):
        materialise(live, task, tmp_path / task)
        found.append(answer_of(tmp_path / task, model_folder / "backbone"))
        asked: dict[str, Any] = {"prompt": "hello", "max_tokens": 12, "ignore_eos": True}
        answer = client.generate(task, return_token_ids=True, **asked)
        served.append(list(answer.choices[0].token_ids or ()))
    assert found == served
    assert len({tuple(tokens) for tokens in served}) == 3


def test_what_was_taken_out_can_be_brought_back(
    client: Client, live: LiveServer, tmp_path: Path
) -> None:
    materialise(live, "own", tmp_path)
    back = client.tasks.create("back", private_adapter=tmp_path)
    assert back.generation == client.tasks.get("own").generation
    client.tasks.delete("back")


def test_what_cannot_be_written_is_refused(
    client: Client, live: LiveServer, tmp_path: Path
) -> None:
    assert "no task 'nobody'" in materialise(live, "nobody", tmp_path / "x", status=1)
    with pytest.raises(NotFoundError):
        client.tasks.lora("base")
    (tmp_path / "mine").write_text("keep")
    assert "empty folder" in materialise(live, "amber", tmp_path, status=2)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
