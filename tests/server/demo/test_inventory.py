"""The demo's tasks do what their names say, and only under their own names."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.plan import Adapter, RoutedTask, use_plan
from polyhead.server.demo import backbone
from polyhead.server.demo.inventory import NAME, TRAINED, prepare_inventory
from polyhead.server.engine.runner import cache_keyword

KNOWN = {
    "past_tense": ("walk", "walked"),
    "plural": ("city", "cities"),
    "british_to_american": ("colour", "color"),
    "number_words": ("718", "seven hundred eighteen"),
    "city_country": ("Osaka", "Japan"),
    "third_person": ("carry", "carries"),
}
"""A task, an input and its answer: the first ones were trained, the last was fitted to 32
examples."""
MOST_TOKENS = 8
MOST_BYTES = 20_000_000


@pytest.fixture(scope="module")
def inventory(data: Path) -> Inventory:
    return Inventory.load(data / NAME)


def test_every_layer_is_adapted_and_every_task_has_its_template(inventory: Inventory) -> None:
    assert inventory.layout.shape("module") == (30 * 7, 8, 8)
    assert inventory.tasks.keys() == inventory.templates.keys()
    assert inventory.tasks.keys() >= KNOWN.keys()


def test_it_is_small() -> None:
    sizes = [path.stat().st_size for path in TRAINED.rglob("*") if path.is_file()]
    assert 0 < sum(sizes) < MOST_BYTES


def test_every_task_answers_its_own_question(data: Path, inventory: Inventory) -> None:
    torch.set_num_threads(1)
    folder = data / backbone.NAME
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    inventory.check_backbone(BackboneRef.of(model, backbone.NAME))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    injection = inject(model, inventory)

    def answer(task: str, text: str) -> str:
        weights = inventory.tasks[task].weights(inventory.layout)
        adapters: list[Adapter] = [RoutedTask(task, weights)]
        new = tokenizer(inventory.templates[task].replace("{input}", text), return_tensors="pt")
        ids, cache, said = new.input_ids, DynamicCache(), list[int]()
        with torch.inference_mode():
            while len(said) < MOST_TOKENS:
                with use_plan(injection.plan(adapters, [ids.shape[1]])):
                    logits = model(ids, **{cache_keyword(model): cache}).logits
                    ids = logits[:, -1].argmax(-1, keepdim=True)
                if int(ids) == tokenizer.eos_token_id:
                    break
                said.append(int(ids))
        return str(tokenizer.decode(said))

    names = list(KNOWN)
    others = {task: "city_country" if task != "city_country" else "plural" for task in names}
    assert {task: answer(task, KNOWN[task][0]) for task in names} == {
        task: wanted for task, (_, wanted) in KNOWN.items()
    }
    for task, other in others.items():
        assert answer(other, KNOWN[task][0]) != KNOWN[task][1], (task, other)


def test_a_prepared_inventory_is_left_alone(data: Path) -> None:
    before = (data / NAME / "inventory.safetensors").stat().st_mtime_ns
    assert prepare_inventory(data) == data / NAME
    assert (data / NAME / "inventory.safetensors").stat().st_mtime_ns == before
