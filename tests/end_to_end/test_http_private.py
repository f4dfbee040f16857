"""Private adapters over a real server that has room for two of them."""

import base64
import concurrent.futures
import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from factories import random_private
from live_server import CONTEXT, LiveServer, serving, settings_for
from safetensors.torch import save

COUNT = 6
RANK = 5


def encoded(live: LiveServer, seed: int, rank: int = RANK) -> dict[str, str]:
    data = random_private(live.service.inventory, seed, rank).to_safetensors()
    return {"safetensors": base64.b64encode(data).decode()}


def register(live: LiveServer, name: str, seed: int, rank: int = RANK) -> httpx.Response:
    body = {"id": name, "private_adapter": encoded(live, seed, rank)}
    return live.client.post("/tasks", json=body)


@pytest.fixture(scope="module")
def crowded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    from polyhead.adapters.inventory import Inventory

    one = random_private(Inventory.load(model_folder / "inventory"), 0, RANK).nbytes
    settings = settings_for(
        model_folder,
        tmp_path_factory.mktemp("data"),
        private_cache_bytes=2 * one + one // 2,
        private_wait_seconds=20.0,
    )
    with serving(settings) as live:
        for seed in range(COUNT):
            assert register(live, f"own-{seed}", seed).status_code == 201
        yield live


def tokens(live: LiveServer, name: str) -> Any:
    body = {"max_tokens": 12, "return_token_ids": True}
    return live.generate(task=name, **body)["choices"][0]["token_ids"]


def test_more_adapters_than_slots_answer_as_each_does_alone(crowded: LiveServer) -> None:
    names = [f"own-{seed}" for seed in range(COUNT)]
    alone = {name: tokens(crowded, name) for name in [*names, "amber"]}
    assert len({tuple(answer) for answer in alone.values()}) == COUNT + 1
    asked = [*names, "amber"] * 6
    random.Random(0).shuffle(asked)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: tokens(crowded, name), asked))
    assert found == [alone[name] for name in asked]
    slots = crowded.service.slots
    assert len(slots) == 2
    assert slots.evictions >= COUNT - 2
    crowded.eventually(lambda: slots.pinned == 0)
    assert crowded.service.room.waiting == 0
    assert 0 < crowded.service.room.longest_handover < 1


def test_however_a_request_ends_its_slot_is_free(crowded: LiveServer) -> None:
    """Without waiting for Python to look for garbage."""
    modules = crowded.service.inventory.header.modules[:1]
    huge = {f"{m.name}.A": torch.full((m.in_features, 1), 3e38) for m in modules}
    huge |= {f"{m.name}.B": torch.full((1, m.out_features), 3e38) for m in modules}
    file = {"safetensors": base64.b64encode(save(huge)).decode()}
    body: dict[str, Any] = {"id": "huge", "private_adapter": file}
    assert crowded.client.post("/tasks", json=body).status_code == 201
    asked: dict[str, Any] = {"task": "own-0", "prompt": "hello", "max_tokens": 4}
    endless = {**asked, "max_tokens": CONTEXT - 10, "n": 16}
    endless |= {"ignore_eos": True, "stream": True}
    sent: list[tuple[str, dict[str, Any], int]] = [
        ("/generate", asked, 200),
        ("/generate", {**asked, "stream": True, "n": 2}, 200),
        ("/generate", {**asked, "max_tokens": CONTEXT}, 422),
        ("/generate", {**asked, "task": "huge"}, 500),
        ("/score", {"task": "own-0", "prompt": "x", "choices": ["a", "b"]}, 200),
        ("/v1/completions", {"model": "own-0", "prompt": ["a", "b"], "max_tokens": 4}, 200),
        ("/v1/completions", {"model": "own-0", "prompt": "a", "max_tokens": CONTEXT}, 422),
    ]
    gc.collect()
    gc.disable()
    try:
        for path, request, status in sent:
            assert crowded.client.post(path, json=request).status_code == status, (path, request)
            crowded.eventually(lambda: crowded.service.slots.pinned == 0)
        with crowded.client.stream("POST", "/generate", json=endless) as answer:
            chunks = answer.iter_bytes()  # dropping it would close the stream
            next(chunks)
            assert crowded.service.slots.pinned == 1
        crowded.eventually(lambda: crowded.service.slots.pinned == 0)
    finally:
        gc.enable()


def test_others_decode_on_while_a_request_waits_for_a_slot(crowded: LiveServer) -> None:
    long = {"max_tokens": CONTEXT // 2, "ignore_eos": True}
    running = [crowded.start(task=f"own-{seed}", **long) for seed in (0, 1)]
    waiting = concurrent.futures.ThreadPoolExecutor(1).submit(tokens, crowded, "own-2")
    crowded.eventually(lambda: crowded.service.room.waiting == 1)
    steps = crowded.service.engine.stats().steps
    assert tokens(crowded, "amber") == tokens(crowded, "amber")
    assert crowded.service.engine.stats().steps > steps
    assert crowded.service.room.waiting == 1
    crowded.eventually(lambda: crowded.service.slots.staged_bytes > 0)  # read while it waits
    assert all(answer.result().status_code == 200 for answer in running)
    alone = waiting.result()
    assert alone == tokens(crowded, "own-2")
    assert crowded.service.slots.staged_bytes == 0


def test_an_adapter_larger_than_all_room_is_413(crowded: LiveServer) -> None:
    answer = register(crowded, "large", 1, rank=4 * RANK)
    assert (answer.status_code, answer.json()["code"]) == (413, "adapter_too_large")
    body = {"private_adapter": encoded(crowded, 1, 4 * RANK)}
    answer = crowded.client.put("/tasks/own-0", json=body)
    assert (answer.status_code, answer.json()["code"]) == (413, "adapter_too_large")
    assert crowded.client.get("/tasks/large").status_code == 404


def test_no_room_for_too_long_is_503(
    crowded: LiveServer, model_folder: Path, tmp_path: Path
) -> None:
    one = crowded.service.slots.nbytes // len(crowded.service.slots)
    settings = settings_for(
        model_folder, tmp_path, private_cache_bytes=one, private_wait_seconds=0.1
    )
    with serving(settings) as live:
        for seed in range(2):
            register(live, f"own-{seed}", seed)
        running = live.start(task="own-0", max_tokens=CONTEXT - 10)
        body = {"task": "own-1", "prompt": "hello"}
        chat = {"model": "own-1", "messages": [{"role": "user", "content": "x"}]}
        score = {**body, "choices": ["a"]}
        for path, sent in (("/generate", body), ("/score", score), ("/v1/chat/completions", chat)):
            answer = live.client.post(path, json=sent)
            assert answer.status_code == 503, answer.text
            assert "no_adapter_slot" in answer.text
            assert int(answer.headers["retry-after"]) >= 1
        assert not running.done(), "the slot was free, so nothing was put to the test"
        assert running.result().status_code == 200
        assert live.client.post("/generate", json=body).status_code == 200
