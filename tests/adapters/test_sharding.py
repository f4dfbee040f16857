"""A backbone cut over two processes answers as one process does, for every kind of adapter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from factories import tiny_inventory, tiny_model

from polyhead.adapters.errors import InjectionError
from polyhead.adapters.inject import inject
from polyhead.adapters.sharding import HeadParts, Ranks, shard

TESTS = Path(__file__).parents[1]
Found = dict[str, Any]


def run(folder: Path, size: int, *more: str) -> list[Found]:
    """What each of `size` processes found."""
    folder.mkdir()
    paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"}
    worker = [sys.executable, str(TESTS / "sharded_worker.py"), str(folder)]
    commands = [[*worker, str(rank), str(size), *more] for rank in range(size)]
    running = [subprocess.Popen(command, env=variables) for command in commands]
    try:
        assert [process.wait(120) for process in running] == [0] * size
    finally:
        for process in running:
            process.kill()
    return [json.loads((folder / f"found-{size}-{rank}.json").read_text()) for rank in range(size)]


def difference(one: Found, other: Found) -> float:
    """The greatest of the log-probabilities; infinite where a token differs."""
    most = 0.0
    for name, answer in one["answers"].items():
        for (token, logprob), (same, close) in zip(answer, other["answers"][name], strict=True):
            most = max(most, abs(logprob - close) if token == same else float("inf"))
    return most


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process answers that holds everything."""
    (found,) = run(tmp_path_factory.mktemp("one") / "run", 1)
    return found


def test_two_processes_answer_as_one(tmp_path: Path, alone: Found) -> None:
    parts = run(tmp_path / "run", 2)
    assert parts[0]["answers"] == parts[1]["answers"]
    assert difference(alone, parts[0]) < 1e-4
    assert len({str(answer) for answer in alone["answers"].values()}) == len(alone["answers"])
    assert [part["heads"] for part in parts] == [alone["heads"] / 2] * 2
    assert max(part["share"] for part in parts) < 0.75  # embeddings and head stay whole


def test_with_each_others_heads_they_do_not(tmp_path: Path, alone: Found) -> None:
    """The control: what differs is the adapters, as the bare backbone's answers tell."""
    wrong = run(tmp_path / "run", 2, "wrong")[0]
    bare = {name: answer for name, answer in alone["answers"].items() if name.startswith("base")}
    own = {"answers": {k: v for k, v in alone["answers"].items() if not k.startswith("base")}}
    assert difference({"answers": bare}, wrong) < 1e-4
    assert difference(own, wrong) > 0.1


def test_what_cannot_be_split_is_refused_by_name() -> None:
    with pytest.raises(InjectionError, match="num_attention_heads"):
        shard(tiny_model(), Ranks(0, 3))
    with pytest.raises(InjectionError, match="num_key_value_heads"):
        shard(tiny_model(), Ranks(0, 4))
    with pytest.raises(InjectionError, match="GPT2LMHeadModel"):
        shard(tiny_model("gpt2"), Ranks(0, 2))


def test_an_inventory_with_one_head_is_refused() -> None:
    model = tiny_model()
    inventory = tiny_inventory(model, heads=1)
    assert shard(model, Ranks(0, 2)) == 14
    with pytest.raises(InjectionError, match="heads cannot be split"):
        inject(model, inventory)


def test_a_layer_that_is_not_cut_needs_every_head() -> None:
    layer = tiny_model().get_submodule("model.layers.0.mlp.up_proj")
    assert HeadParts.of(layer, 4).is_whole
