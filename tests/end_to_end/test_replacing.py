"""A task that is replaced while it is served, under prompts that begin alike.

Keys and values depend on the adapter: what was computed for one generation is wrong for the next.
`make replacing` asks 1,000 times; the other tests a few.
"""

import itertools
import os
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, tiny_model
from live_server import CONTEXT, TASKS, LiveServer, serving, settings_for
from oracles import merged

from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import RoutedTask

REQUESTS = int(os.environ.get("TEST_REPLACING_REQUESTS", "120"))
TASK = "flips"
TOKENS = 12
ASKERS = 4
SHARED = "These words stand before every question, and are computed anew or kept. " * 2
PROMPTS = tuple(f"{SHARED}{tail}" for tail in ("", "one", "one two", "2", "three?", "x = 4;"))
UNFINISHED = "\ufffd"
"""Stands for the bytes of a character that the last token leaves unfinished, or is left out."""

Truth = dict[tuple[str, str], str]
"""What a generation must answer to a prompt."""


@dataclass(frozen=True)
class Answer:
    prompt: str
    generation: str
    text: str
    cached_tokens: int


@pytest.fixture
def server(model_folder: Path, tmp_path: Path) -> Iterator[LiveServer]:
    with serving(settings_for(model_folder, tmp_path)) as found:
        yield found


def texts_of_the_merged_models(folder: Path) -> dict[tuple[str, str], str]:
    """By source and prompt: transformers' own greedy answers, each from a model of its own."""
    model, tokenizer = tiny_model(max_position_embeddings=CONTEXT), byte_tokenizer()
    inventory = Inventory.load(folder / "inventory")
    texts = {}
    for source in TASKS:
        weights = inventory.tasks[source].weights(inventory.layout)
        own: Any = merged(model, inventory, RoutedTask(source, weights))
        for prompt in PROMPTS:
            ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False)])
            whole = own.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            text = tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
            texts[source, prompt] = text.rstrip(UNFINISHED)
    return texts


def replace(server: LiveServer, source: str) -> str:
    answer = server.client.put(f"/tasks/{TASK}", json={"copy_of": source})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["generation"])


def ask(server: LiveServer, number: int) -> Answer:
    """Every other question goes through OpenAI's call."""
    prompt = PROMPTS[number % len(PROMPTS)]
    asked = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if number % 2:
        answer = server.client.post("/v1/completions", json={"model": TASK, **asked})
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return Answer(prompt, found["system_fingerprint"], found["choices"][0]["text"], 0)
    found = server.generate(task=TASK, **asked)
    cached = found["usage"]["cached_tokens"]
    return Answer(prompt, found["generation"], found["choices"][0]["text"], cached)


def asked_while_replacing(server: LiveServer) -> tuple[list[Answer], int]:
    """`REQUESTS` answers, and how often the task was replaced meanwhile."""
    ended = threading.Event()

    def flip() -> int:
        for count, source in enumerate(itertools.cycle(TASKS)):
            if ended.wait(0.02):
                return count
            replace(server, source)
        raise AssertionError

    with ThreadPoolExecutor(ASKERS) as askers, ThreadPoolExecutor(1) as writer:
        replaced = writer.submit(flip)
        try:
            answers = list(askers.map(lambda number: ask(server, number), range(REQUESTS)))
        finally:
            ended.set()
        return answers, replaced.result()


def wrong(answers: list[Answer], truth: Truth) -> list[Answer]:
    return [
        one for one in answers if one.text.rstrip(UNFINISHED) != truth[one.generation, one.prompt]
    ]


def test_no_answer_is_of_another_generation(server: LiveServer, model_folder: Path) -> None:
    server.client.post("/tasks", json={"id": TASK, "copy_of": TASKS[0]}).raise_for_status()
    texts = texts_of_the_merged_models(model_folder)
    for prompt in PROMPTS:
        assert len({texts[source, prompt] for source in TASKS}) == len(TASKS)
    truth: Truth = {}
    for source in TASKS:
        generation = replace(server, source)
        truth |= {(generation, prompt): texts[source, prompt] for prompt in PROMPTS}
        for number in range(2 * len(PROMPTS)):  # whatever is kept of prompts is kept now
            assert not wrong([ask(server, number)], truth)
    answers, replaced = asked_while_replacing(server)
    seen = Counter(one.generation for one in answers)
    cached = sum(one.cached_tokens for one in answers)
    assert wrong(answers, truth) == []
    assert len(answers) == REQUESTS
    assert len(seen) == len(TASKS)
    assert replaced > REQUESTS / 20
    assert cached > REQUESTS  # or the prefix cache was not warm
    # A control: had the generations been taken for each other, every answer would be wrong.
    turned = dict(zip(seen, [*list(seen)[1:], next(iter(seen))], strict=True))
    others = {(turned[generation], prompt): text for (generation, prompt), text in truth.items()}
    assert len(wrong(answers, others)) == REQUESTS
    print(f"{REQUESTS} answers, {replaced} replacements, {cached} cached tokens, 0 wrong")
