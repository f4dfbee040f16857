"""The demo's tasks can be told apart from each other and from the bare backbone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.plan import Adapter, RoutedTask, use_plan
from polyhead.server.demo import backbone
from polyhead.server.demo.inventory import (
    FAVOURITES,
    HEADS,
    NAME,
    PATCHWORK,
    SKILLS,
    prepare_inventory,
)

PROMPT = "Write one sentence about the sea."
NEW_TOKENS = 14


@pytest.fixture(scope="module")
def inventory(data: Path) -> Inventory:
    return Inventory.load(data / NAME)


def test_every_layer_is_adapted_and_every_task_is_there(inventory: Inventory) -> None:
    assert inventory.layout.shape("module") == (30 * 7, HEADS, SKILLS)
    assert sorted(inventory.tasks) == sorted([*FAVOURITES, PATCHWORK])


def test_only_patchwork_differs_between_heads(inventory: Inventory) -> None:
    for name, routing in inventory.tasks.items():
        weights = routing.weights(inventory.layout)
        assert weights.max() > 0.8
        assert (weights == weights[:, :1]).all() == (name != PATCHWORK)


def test_every_task_answers_in_words_of_its_own(data: Path, inventory: Inventory) -> None:
    torch.set_num_threads(1)
    folder = data / backbone.NAME
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    inventory.check_backbone(BackboneRef.of(model, backbone.NAME))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    tasks: list[Adapter] = [None]
    tasks += [RoutedTask(n, r.weights(inventory.layout)) for n, r in inventory.tasks.items()]
    ids = tokenizer(text, return_tensors="pt").input_ids.repeat(len(tasks), 1)
    injection, cache = inject(model, inventory), DynamicCache()
    answers = new = ids
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            with use_plan(injection.plan(tasks, [new.shape[1]] * len(tasks))):
                new = model(new, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            answers = torch.cat([answers, new], 1)
    texts = [tokenizer.decode(row[ids.shape[1] :]) for row in answers]
    assert len(set(texts)) == len(tasks), texts
    assert all("sea" in text for text in texts), texts


def test_a_prepared_inventory_is_left_alone(data: Path) -> None:
    before = (data / NAME / "inventory.safetensors").stat().st_mtime_ns
    assert prepare_inventory(data, data / backbone.NAME) == data / NAME
    assert (data / NAME / "inventory.safetensors").stat().st_mtime_ns == before
