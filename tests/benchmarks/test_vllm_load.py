"""What the comparison with vLLM over HTTP rests on: the same tasks, and clients that leave."""

import socket
from pathlib import Path

import torch
from factories import tiny_inventory, tiny_model
from oracles import deltas, distance
from safetensors.torch import load_file

from benchmarks.load import random_logits
from benchmarks.load_client import Planned, send
from benchmarks.vllm_load import write_loras
from polyhead.adapters.plan import RoutedTask
from polyhead.adapters.routing import Routing


def test_the_loras_are_the_tasks_that_are_registered(tmp_path: Path) -> None:
    inventory = tiny_inventory(tiny_model())
    inventory.save(tmp_path / "inventory")
    told = [one.split("=") for one in write_loras(tmp_path / "inventory", tmp_path, 2)]
    assert [name for name, _ in told] == ["load-0", "load-1"]
    header, layout = inventory.header, inventory.layout
    added = []
    for logits in random_logits(2, header.heads, header.skills):
        routing = Routing.from_nested(logits, layout, granularity="model")
        added.append(deltas(inventory, RoutedTask("t", routing.weights(layout))))
    for number, (_, folder) in enumerate(told):
        found = load_file(Path(folder) / "adapter_model.safetensors")
        for name in layout.modules:
            a, b = (found[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
            product = (b.double() @ a.double()).T
            assert distance(product, added[number][name]) < 1e-6
            assert distance(product, added[1 - number][name]) > 0.1  # control: the other task


def test_a_client_leaves_a_server_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        (found,) = send(url, ["m"], [Planned(0.0, 0, [1], 1)], limit=0.2)
    assert (found.status, found.complete) == (0, False)
    assert not found.good(float("inf"), float("inf"))


def test_logits_are_the_same_every_time() -> None:
    first, more = random_logits(2, 2, 3), random_logits(4, 2, 3)
    assert more[:2] == first
    assert torch.tensor(more).shape == (4, 2, 3)
    assert more[0] != more[1]
