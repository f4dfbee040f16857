"""Greedy answers of mixed batches against each task's own merged model, run alone."""

import random
from functools import cache

import pytest
import torch
from exactness_world import KINDS, Served, answer_in_motion
from factories import (
    Collector,
    alone,
    make_engine,
    tiny_model,
)
from torch import Tensor
from transformers import PreTrainedModel

from polyhead.server.engine.engine import Engine
from polyhead.server.engine.request import Output, Request, SamplingParams

FAMILIES = ["llama", "qwen2", "qwen3", "gpt2"]


@cache
def served(family: str) -> Served:
    return Served.of(tiny_model(family))


def requests(bench: Served, count: int, seed: int) -> list[Request]:
    generator = random.Random(seed)
    made = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        length = generator.choice([1, 2, 9, 40, 130])
        made.append(
            Request(
                f"r{i}",
                kind,
                "g",
                tuple(generator.randrange(256) for _ in range(length)),
                bench.adapters[kind],
                SamplingParams(max_tokens=generator.choice([1, 12, 30]), ignore_eos=True),
            )
        )
    return made


@pytest.mark.parametrize("kv_tokens", [4096, 400], ids=["roomy", "preempting"])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_equal_merged_models_alone(family: str, kv_tokens: int) -> None:
    bench = served(family)
    asked = requests(bench, 15, seed=len(family) + kv_tokens)
    long = SamplingParams(max_tokens=300, ignore_eos=True)
    leaving = [Request(f"leaves{i}", "x", "g", (65 + i,), params=long) for i in range(2)]
    collector = Collector()
    engine = make_engine(
        bench.model, bench.injection, collector, kv_tokens=kv_tokens, longest=min(512, kv_tokens)
    )
    answers, stats = answer_in_motion(bench, engine, collector, asked, leaving)
    for request in asked:
        assert answers[request.id] == alone(bench.references[request.task], request), request.id
    assert (stats.preemptions > 0) == (kv_tokens == 400)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_wrong_task_answers_otherwise(family: str) -> None:
    """The control: were adapters mixed up, the test above would see it."""
    bench = served(family)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    prompt = tuple(range(40, 70))
    answers = {
        tuple(alone(bench.references[k], Request(k, k, "g", prompt, params=params))) for k in KINDS
    }
    assert len(answers) == len(KINDS)


def logprobs_by_loop(model: PreTrainedModel, prompt: Tensor, tail: Tensor) -> list[float]:
    found = []
    for i, token in enumerate(tail.tolist()):
        with torch.no_grad():
            logits = model(torch.cat([prompt, tail[:i]])[None]).logits[0, -1]
        found.append(torch.log_softmax(logits.double(), -1)[token].item())
    return found


@pytest.mark.parametrize("kv_tokens", [4096, 200], ids=["roomy", "tight"])
def test_scores_equal_a_plain_loop(kv_tokens: int) -> None:
    bench = served("llama")
    collector = Collector()
    engine = make_engine(
        bench.model, bench.injection, collector, kv_tokens=kv_tokens, longest=min(512, kv_tokens)
    )
    engine.start()
    tails = ((10, 20, 30), (99,), tuple(range(100, 140)), (10, 20, 31))
    asked = [
        Request(k, k, "g", tuple(range(5, 105)), bench.adapters[k], continuations=tails)
        for k in KINDS
    ]
    asked.append(Request("short", "base", "g", (7,), continuations=tails))
    for request in asked:
        engine.submit(request)
    for request in asked:
        outputs = sorted(collector.wait(request), key=lambda e: getattr(e, "index", -1))
        assert [e.index for e in outputs if isinstance(e, Output)] == list(range(len(tails)))
        for tail, output in zip(tails, outputs, strict=True):
            assert isinstance(output, Output)
            assert output.finish_reason == "stop"
            assert output.token_ids == tuple(entry.token_id for entry in output.logprobs) == tail
            wanted = logprobs_by_loop(
                bench.references[request.task], torch.tensor(request.prompt), torch.tensor(tail)
            )
            assert [e.logprob for e in output.logprobs] == pytest.approx(wanted, abs=2e-3)
    engine.stop()


def sampled(engine: Engine, collector: Collector, request: Request) -> list[list[int]]:
    engine.submit(request)
    return [collector.tokens(request, index) for index in range(request.params.n)]


def test_samples_depend_on_their_seed_and_not_on_their_neighbours() -> None:
    bench = served("llama")
    collector = Collector()
    engine = make_engine(bench.model, bench.injection, collector)
    engine.start()

    def ask(name: str, seed: int | None) -> Request:
        params = SamplingParams(max_tokens=20, temperature=1.2, seed=seed, n=4, ignore_eos=True)
        return Request(name, "other", "g", tuple(range(30)), bench.adapters["other"], params)

    first = sampled(engine, collector, ask("a", 1))
    assert len({tuple(tokens) for tokens in first}) == 4
    for request in requests(bench, 8, seed=1):
        engine.submit(request)
    assert sampled(engine, collector, ask("b", 1)) == first
    assert sampled(engine, collector, ask("c", 2)) != first
    unseeded = [sampled(engine, collector, ask(name, None)) for name in "de"]
    assert unseeded[0] != unseeded[1]
    engine.stop()
