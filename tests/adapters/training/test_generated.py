"""Training a generator on a tiny backbone: what it learns, writes, survives and refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import byte_tokenizer, tiny_model, tiny_t5
from torch import Tensor
from training_world import examples, save_world
from transformers import PreTrainedModel

from polyhead.adapters.generator import GENERATOR_FILE, Generator, piece
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.config import TrainingConfig, parse_config
from polyhead.adapters.training.corpus import Corpus, read_corpus
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.embedding import embed
from polyhead.adapters.training.errors import CheckpointError, ConfigError
from polyhead.adapters.training.generated import GeneratorPlan
from polyhead.adapters.training.pretrain import pretrain
from polyhead.adapters.training.records import read_metrics

TASKS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a file of examples and the inventory that a short run made of them."""
    folder = tmp_path_factory.mktemp("world")
    save_world(folder, TASKS)
    first = config(folder, folder / "skills", method="mhr", start=None, optimiser={"steps": 30})
    pretrain(first, folder / "backbone", lambda _: None)
    return folder


def config(world: Path, output: Path, **changes: Any) -> TrainingConfig:
    plain: dict[str, Any] = {
        "backbone": str(world / "backbone"),
        "output": str(output),
        "method": "generator",
        "start": str(world / "skills" / "inventory"),
        "data": {"train": [str(world / "*.jsonl")]},
        "skills": {"heads": 4, "skills": 3, "rank": 2},
        "generator": {"rank": 6, "context": 5},
        "optimiser": {"steps": 30, "rate": 0.02},
        "batch": {"examples": 16, "tasks": 4, "threads": 1},
        "records": {"checkpoint_every": 7, "tensorboard": False},
    }
    for key, value in changes.items():
        plain[key] = {**plain[key], **value} if isinstance(plain.get(key), dict) else value
    return parse_config(plain, "test")


def losses(output: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(output / "metrics.jsonl")]


def generator_of(folder: Path) -> Generator:
    found = Inventory.load(folder / "inventory").generator
    assert found is not None
    return found


def mean_of(model: PreTrainedModel, texts: list[str]) -> Tensor:
    return embed(model, byte_tokenizer(), texts).mean(0)


def test_a_text_is_the_mean_of_its_last_hidden_states() -> None:
    model, texts = tiny_model(), ["a", "cat -> cats", "a rather long line of text"]
    found = embed(model, byte_tokenizer(), texts)
    for row, text in zip(found, texts, strict=True):
        ids = torch.tensor([list(text.encode())])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(row, hidden[0].mean(0), rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_run_learns_and_leaves_the_skills_alone(world: Path, tmp_path: Path) -> None:
    """A context of another task makes another routing, which is worse at this one."""
    pretrain(config(world, tmp_path), world / "backbone", lambda _: None)
    curve = losses(tmp_path)
    assert sum(curve[-5:]) < 0.97 * sum(curve[:5])
    begun, ended = Inventory.load(world / "skills" / "inventory"), tmp_path / "inventory"
    inventory = Inventory.load(ended)
    assert inventory.fingerprint == begun.fingerprint
    assert inventory.tasks.keys() == begun.tasks.keys()
    generator = generator_of(tmp_path)
    assert generator.facts.template == "{input}\n"
    assert generator.facts.provenance["steps"] == 30
    contexts = {
        task: [piece(e.input, e.output) for e in examples(TASKS, each=12) if e.task == task]
        for task in begun.tasks
    }
    means = {task: mean_of(tiny_model(), texts) for task, texts in contexts.items()}
    made = {task: generator.routing(e, inventory.layout).values for task, e in means.items()}
    for task, own in made.items():
        for other in made.keys() - {task}:
            assert (own - made[other]).abs().max() > 0.05


def test_contexts_never_hold_what_is_asked(world: Path, tmp_path: Path) -> None:
    """The embedding of each step's context is a mean of others' embeddings."""
    given = config(world, tmp_path)
    plan, corpus = plan_of(given)
    own = [plan._embedded[rows] for rows in plan._pool.rows]
    for step in range(20):
        drawn = [(task, corpus.encoded[task][(step + k) % 12]) for task in (1, 3) for k in (0, 1)]
        plan.begin(step, drawn)
        for task in (1, 3):
            asked = [example for owner, example in drawn if owner == task]
            left = [
                row
                for row, encoded in zip(own[task], plan._pool.encoded_of(task), strict=True)
                if encoded not in asked
            ]
            assert len(left) == 10
            context = plan.source.contexts[task]
            rest = torch.stack(left)
            share = torch.linalg.lstsq(rest.T, context[:, None]).solution[:, 0]
            torch.testing.assert_close(share @ rest, context, rtol=1e-3, atol=1e-3)
            assert float(share.sum()) == pytest.approx(1, abs=1e-2)
    before = plan.source.contexts.clone()
    plan.begin(99, drawn)
    assert not torch.equal(before, plan.source.contexts)


def plan_of(given: TrainingConfig) -> tuple[GeneratorPlan, Corpus]:
    corpus = read_corpus(given.data, byte_tokenizer())
    return GeneratorPlan(given, tiny_model(), "backbone", corpus, byte_tokenizer()), corpus


def test_it_starts_near_the_known_routings(world: Path, tmp_path: Path) -> None:
    """Of the tasks' whole contexts; far from them where the tasks are exchanged."""
    plan, corpus = plan_of(config(world, tmp_path))
    wanted = plan.routed.routings.weights(torch.arange(TASKS)).detach()
    whole = torch.stack([plan._embedded[rows].mean(0) for rows in plan._pool.rows])
    plan.source.contexts.copy_(whole)
    bias, left, right = (p.detach() for p in plan.optimiser().param_groups[0]["params"])
    found = bias + torch.einsum("mhsr,rd,td->tmhs", left, right, whole)
    near = (found - wanted).pow(2).sum()
    exchanged = (found - wanted.roll(1, 0)).pow(2).sum()
    uniform = (1 / 3 - wanted).pow(2).sum()
    assert near < 0.4 * uniform < exchanged
    assert len(corpus.tasks) == TASKS


def test_a_run_that_goes_on_ends_as_if_it_had_not_stopped(world: Path, tmp_path: Path) -> None:
    """Bit for bit; the control of another seed differs."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pretrain(config(world, whole), world / "backbone", lambda _: None)

    class Killed(Exception):
        pass

    def kill(report: Any) -> None:
        if report.step == 17:
            raise Killed

    with pytest.raises(Killed):
        pretrain(config(world, parts), world / "backbone", kill)
    pretrain(config(world, parts), world / "backbone", lambda _: None)
    assert losses(parts) == losses(whole)
    a, b = generator_of(whole), generator_of(parts)
    assert torch.equal(a.left, b.left)
    assert torch.equal(a.right, b.right)
    other = tmp_path / "other"
    pretrain(config(world, other, seed=1), world / "backbone", lambda _: None)
    assert not torch.equal(generator_of(other).left, a.left)
    again = config(world, parts, generator={"context": 6})
    with pytest.raises(CheckpointError, match="another configuration"):
        pretrain(again, world / "backbone", lambda _: None)


def test_what_cannot_be_trained_is_refused(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs an inventory to `start` from"):
        config(world, tmp_path, start=None)
    one = tmp_path / "one.jsonl"
    one.write_text('{"task": "t0", "input": "a", "output": "b"}\n')
    with pytest.raises(ConfigError, match="at least 2 of each task"):
        plan_of(config(world, tmp_path, data={"train": [str(one)]}))
    talk = tmp_path / "talk.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    talk.write_text(json.dumps({"task": "t0", "messages": turns}) + "\n")
    with pytest.raises(ConfigError, match="messages in task 't0'"):
        plan_of(config(world, tmp_path, data={"train": [str(talk)]}))
    given = config(world, tmp_path)
    corpus = read_corpus(given.data, byte_tokenizer())
    with pytest.raises(ConfigError, match="encoder-decoder"):
        GeneratorPlan(given, tiny_t5(), "t5", corpus, byte_tokenizer())


def test_another_method_writes_no_generator(world: Path) -> None:
    assert not (world / "skills" / "inventory" / GENERATOR_FILE).exists()


def test_the_examples_of_a_corpus_go_with_their_tokens(world: Path, tmp_path: Path) -> None:
    corpus = read_corpus(config(world, tmp_path).data, byte_tokenizer())
    for task, own, encoded in zip(corpus.tasks, corpus.examples, corpus.encoded, strict=True):
        for example, one in zip(own, encoded, strict=True):
            assert isinstance(example, Example)
            assert example.task == task
            assert bytes(one.prompt) == f"{example.input}\n".encode()
