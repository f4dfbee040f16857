"""A warm prefix cache answers as a cold one; with the adapter left out of its key it does not."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from factories import (
    Collector,
    make_engine,
    random_private,
    random_task,
    tiny_inventory,
    tiny_model,
)
from live_server import LiveServer

from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.plan import Adapter
from polyhead.server.engine.request import Request, SamplingParams

Answers = list[list[int]]


def conversations(adapters: dict[str, Adapter], rounds: int) -> list[Request]:
    """Turns that begin like each other, over all tasks, in an order that mixes them."""
    draw = random.Random(0)
    roots = [draw.choices(range(256), k=length) for length in (40, 70)]
    asked = []
    for number in range(rounds):
        name = draw.choice(list(adapters))
        prompt = draw.choice(roots)[: draw.choice([30, 40, 70])] + draw.choices(range(256), k=4)
        params = SamplingParams(max_tokens=12, ignore_eos=True)
        asked.append(
            Request(f"r{number}", name, name, tuple(prompt), adapters[name], params=params)
        )
    return asked


@pytest.fixture(scope="module")
def world() -> tuple[Any, Injection, dict[str, Adapter]]:
    model = tiny_model()
    inventory = tiny_inventory(model)
    injection = inject(model, inventory)
    adapters: dict[str, Adapter] = {
        "bare": None,
        "one": random_task(inventory, "one", 1),
        "two": random_task(inventory, "two", 2),
        "own": random_private(inventory, 3),
    }
    return model, injection, adapters


def answers(
    world: tuple[Any, Injection, dict[str, Adapter]],
    kept: int,
    key: Callable[[Request], str] | None = None,
) -> tuple[Answers, int]:
    """Every request's tokens, asked one after another, and how many prompt tokens were found."""
    model, injection, adapters = world
    collector = Collector()
    engine = make_engine(model, injection, collector, kept=kept, key=key)
    engine.start()
    found, cached = [], 0
    try:
        for request in conversations(adapters, 60):
            engine.submit(request)
            found.append(collector.tokens(request))
            cached += max(event.cached_tokens for event in collector.wait(request))  # type: ignore[union-attr]
    finally:
        engine.stop()
    return found, cached


def test_warm_and_cold_answer_alike_and_a_key_without_the_adapter_does_not(
    world: tuple[Any, Injection, dict[str, Adapter]],
) -> None:
    cold, none = answers(world, 0)
    warm, some = answers(world, 4096)
    assert none == 0
    assert some > 1000
    assert warm == cold
    confused, _ = answers(world, 4096, key=lambda _: "")
    assert sum(a != b for a, b in zip(confused, cold, strict=True)) > 10


def test_a_call_tells_what_was_cached_and_a_replaced_task_starts_cold(live: LiveServer) -> None:
    client, prompt = live.client, "a beginning that several prompts share, and then "
    client.post("/tasks", json={"id": "warm", "copy_of": "amber"}).raise_for_status()
    try:

        def cached(end: str) -> int:
            return int(live.generate(task="warm", prompt=prompt + end)["usage"]["cached_tokens"])

        first = cached("one")
        assert cached("two") >= len(prompt)
        client.put("/tasks/warm", json={"copy_of": "birch"}).raise_for_status()
        fresh = live.generate(task="warm", prompt=prompt + "two")
        assert fresh["usage"]["cached_tokens"] == first == 0
        right = live.generate(task="birch", prompt=prompt + "two")
        assert fresh["choices"][0]["text"] == right["choices"][0]["text"]
        body = {"model": "warm", "prompt": prompt + "three", "max_tokens": 2}
        usage = client.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] >= len(prompt)
    finally:
        client.delete("/tasks/warm")
