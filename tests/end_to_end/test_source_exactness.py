"""T5 in the engine: mixed batches against each task's own merged model, run alone."""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from exactness_world import KINDS, Served, answer_in_motion
from factories import (
    VOCAB,
    Collector,
    alone,
    make_engine,
    merged,
    random_task,
    restless_t5,
    tiny_inventory,
)
from transformers import PreTrainedModel

from polyhead.adapters.inject import inject
from polyhead.adapters.plan import Adapter
from polyhead.server.engine import source_attention
from polyhead.server.engine.batch import Row
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.request import Failure, Output, Request, SamplingParams

STACKS = ["relu", "gated-gelu"]  # T5; T5 1.1, Flan-T5, T0 and mT5


@cache
def served(stack: str) -> Served:
    return Served.of(restless_t5(stack))


def ask(bench: Served, name: str, kind: str, source: tuple[int, ...], **more: Any) -> Request:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | more)
    return Request(name, kind, kind, (0,), bench.adapters[kind], params, source=source)


def requests(bench: Served, count: int, seed: int) -> list[Request]:
    draw = random.Random(seed)
    made = []
    for i in range(count):
        source = tuple(draw.randrange(2, VOCAB) for _ in range(draw.choice([1, 9, 20, 40, 130])))
        tokens = 140 if i in (1, 2, 3) else draw.choice([1, 12, 30])  # these outgrow their rows
        made.append(ask(bench, f"r{i}", KINDS[i % len(KINDS)], source, max_tokens=tokens))
    return made


def answers_of(engine: Engine, collector: Collector, asked: list[Request]) -> list[list[int]]:
    engine.start()
    for request in asked:
        engine.submit(request)
    found = [collector.tokens(request) for request in asked]
    engine.stop()
    return found


@pytest.mark.parametrize("kv_tokens", [8192, 900], ids=["roomy", "preempting"])
@pytest.mark.parametrize("stack", STACKS)
def test_mixed_batches_equal_merged_models_alone(stack: str, kv_tokens: int) -> None:
    bench = served(stack)
    asked = requests(bench, 12, seed=len(stack) + kv_tokens)
    leaving = [ask(bench, f"leaves{i}", "base", (65 + i,), max_tokens=300) for i in range(2)]
    collector = Collector()
    engine = make_engine(bench.model, bench.injection, collector, kv_tokens=kv_tokens)
    answers, stats = answer_in_motion(bench, engine, collector, asked, leaving)
    distinct = 0
    for request in asked:
        expected = alone(bench.references[request.task], request)
        assert answers[request.id] == expected, request.id
        distinct += len(set(expected))
    assert distinct > 4 * len(asked), "the references repeat themselves"
    assert (stats.preemptions > 0) == (kv_tokens == 900)
    assert stats.kv_used_tokens == 0


SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"kind": "relu", "tie_word_embeddings": True},
    "mt5": {"family": "mt5"},
    "uneven": {"num_layers": 4, "num_decoder_layers": 1, "d_kv": 12},  # encoded in 1 to 4 steps
    "three": {"num_heads": 3, "d_kv": 8, "relative_attention_max_distance": 20},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_of_the_family(shape: str) -> None:
    torch.set_num_threads(1)
    model = restless_t5(**SHAPES[shape])
    inventory = tiny_inventory(model)
    tasks: list[Adapter] = [random_task(inventory, "a", 1), random_task(inventory, "b", 2), None]
    references = [merged(model, inventory, task) for task in tasks]
    draw = random.Random(4)
    asked = [
        Request(
            f"r{i}",
            str(i % 3),
            "g",
            (0,),
            tasks[i % 3],
            SamplingParams(max_tokens=20, ignore_eos=True),
            source=tuple(draw.choices(range(2, VOCAB), k=10 + 8 * i)),
        )
        for i in range(6)
    ]
    collector = Collector()
    engine = make_engine(model, inject(model, inventory), collector)
    found = answers_of(engine, collector, asked)
    for i, request in enumerate(asked):
        assert found[i] == alone(references[i % 3], request)
        assert found[i] != alone(references[(i + 1) % 3], request)


@pytest.mark.parametrize("stack", STACKS)
def test_the_wrong_task_answers_otherwise(stack: str) -> None:
    """The control: were adapters mixed up, the test above would see it."""
    bench = served(stack)
    source = tuple(range(40, 70))
    answers = {tuple(alone(bench.references[k], ask(bench, k, k, source))) for k in KINDS}
    assert len(answers) == len(KINDS)


def test_without_biases_or_with_keys_of_another_source_answers_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other controls: what the engine computes by itself is computed, and is needed."""
    bench, draw = served("gated-gelu"), random.Random(5)
    sources = [tuple(draw.randrange(2, VOCAB) for _ in range(20)) for _ in range(4)]
    asked = [ask(bench, f"r{i}", "routed", source) for i, source in enumerate(sources)]
    expected = [alone(bench.references["routed"], request) for request in asked]

    def found() -> list[list[int]]:
        collector = Collector()
        engine = make_engine(bench.model, bench.injection, collector)
        return answers_of(engine, collector, asked)

    assert found() == expected
    real = source_attention.cpu_attention.decode_biased

    def unbiased(*args: Any) -> None:
        real(*args[:-2], args[-2] * 0, args[-1])

    with monkeypatch.context() as patch:
        patch.setattr(source_attention.cpu_attention, "decode_biased", unbiased)
        assert all(a != b for a, b in zip(found(), expected, strict=True))
    looks = source_attention._looks

    def swapped(rows: list[Row], *given: Any, of_source: bool) -> list[source_attention.Looks]:
        turned = [replace(r, source=o.source) for r, o in zip(rows, rows[::-1], strict=True)]
        return looks(turned, *given, of_source=of_source)

    with monkeypatch.context() as patch:
        patch.setattr(source_attention, "_looks", swapped)
        assert sum(a != b for a, b in zip(found(), expected, strict=True)) >= 2


@pytest.mark.parametrize("stack", STACKS)
def test_by_torch_alone_the_same(stack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves other devices and dtypes, against the same references."""
    monkeypatch.setattr(source_attention, "compiled_for", lambda *_: False)
    monkeypatch.setattr(source_attention, "GATHERED", 3)
    monkeypatch.setattr(source_attention, "QUERIES", 50)
    bench, collector = served(stack), Collector()
    asked = requests(bench, 10, seed=3)
    engine = make_engine(bench.model, bench.injection, collector, kv_tokens=900)
    for request, tokens in zip(asked, answers_of(engine, collector, asked), strict=True):
        assert tokens == alone(bench.references[request.task], request), request.id
    assert engine.stats().preemptions > 0


def labels_by_loop(model: PreTrainedModel, request: Request) -> list[float]:
    """Mean log-probability of each continuation: rank classification as T0 is evaluated."""
    source = torch.tensor([request.source])
    labels = [torch.tensor([tail]) for tail in request.continuations]
    return [-float(model(input_ids=source, labels=gold).loss) for gold in labels]


@pytest.mark.parametrize("kv_tokens", [8192, 520], ids=["roomy", "tight"])
def test_scores_are_those_of_a_plain_loop_over_labels(kv_tokens: int) -> None:
    bench, collector = served("gated-gelu"), Collector()
    tails = ((10, 20, 30), (99,), tuple(range(100, 140)), (10, 20, 31))
    engine = make_engine(
        bench.model, bench.injection, collector, kv_tokens=kv_tokens, longest=min(kv_tokens, 512)
    )
    engine.start()
    asked = [
        replace(ask(bench, k, k, tuple(range(5, 105)), max_tokens=1), continuations=tails)
        for k in KINDS
    ]
    for request in asked:
        engine.submit(request)
    means: dict[str, list[float]] = {}
    for request in asked:
        outputs = [e for e in collector.wait(request) if isinstance(e, Output)]
        outputs.sort(key=lambda output: output.index)
        assert [output.token_ids for output in outputs] == list(tails)
        sums = [sum(token.logprob for token in output.logprobs) for output in outputs]
        means[request.id] = [s / len(tail) for s, tail in zip(sums, tails, strict=True)]
    engine.stop()
    for request in asked:
        right = labels_by_loop(bench.references[request.task], request)
        assert means[request.id] == pytest.approx(right, abs=1e-4)
        for wrong in set(KINDS) - {request.task}:
            other = labels_by_loop(bench.references[wrong], request)
            assert other != pytest.approx(right, abs=2e-2)


def test_samples_share_one_source_and_depend_on_their_seed_alone() -> None:
    bench, collector = served("gated-gelu"), Collector()
    engine = make_engine(bench.model, bench.injection, collector, kept=1024)
    encoded: list[int] = []
    runner: Any = engine._runner
    encode = runner._encode
    runner._encode = lambda sources: (encoded.append(len(sources)), encode(sources))[1]
    engine.start()

    def samples(name: str, seed: int) -> list[list[int]]:
        more = {"max_tokens": 20, "temperature": 1.2, "seed": seed, "n": 4}
        request = ask(bench, name, "other", tuple(range(2, 32)), **more)
        engine.submit(request)
        return [collector.tokens(request, index) for index in range(4)]

    first = samples("a", 1)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert sum(encoded) == 1
    for request in requests(bench, 8, seed=1):
        engine.submit(request)
    assert samples("b", 1) == first
    assert samples("c", 2) != first
    engine.stop()


def test_kept_sources_answer_as_cold_ones_and_a_key_without_the_adapter_does_not() -> None:
    bench, draw = served("gated-gelu"), random.Random(6)
    sources = [tuple(draw.choices(range(2, VOCAB), k=length)) for length in (20, 50, 90)]
    asked = [
        ask(bench, f"r{i}", draw.choice(KINDS), draw.choice(sources), max_tokens=8)
        for i in range(40)
    ]

    def found(kept: int, key: Callable[[Request], str] | None = None) -> tuple[Any, int]:
        """Every request's tokens, asked one after another, and how many tokens were cached."""
        collector, answers, cached = Collector(), [], 0
        engine = make_engine(bench.model, bench.injection, collector, kept=kept, key=key)
        engine.start()
        for request in asked:
            engine.submit(request)
            answers.append(collector.tokens(request))
            cached += max(event.cached_tokens for event in collector.wait(request))  # type: ignore[union-attr]
        engine.stop()
        return answers, cached

    cold, none = found(0)
    warm, some = found(4096)
    assert (none, some > 500) == (0, True)
    assert warm == cold
    confused, _ = found(4096, lambda _: "")
    assert sum(a != b for a, b in zip(confused, cold, strict=True)) > 10


def test_after_a_failed_step_others_are_answered_and_no_memory_is_lost() -> None:
    bench, collector = served("gated-gelu"), Collector()
    engine = make_engine(bench.model, bench.injection, collector, max_running=2, kept=1024)
    runner: Any = engine._runner
    encode, calls = runner._encode, iter(range(1000))

    def failing(sources: list[Any]) -> None:
        encode(sources)
        if sources and next(calls) == 1:
            raise RuntimeError("half-way")

    runner._encode = failing
    asked = [
        ask(bench, f"r{i}", KINDS[i], tuple(range(2 + i, 30)), max_tokens=40) for i in range(5)
    ]
    engine.start()
    for request in asked:
        engine.submit(request)
    ended = [collector.wait(request) for request in asked]
    lost = [isinstance(events[-1], Failure) for events in ended]
    assert 1 <= sum(lost) <= 2
    for request, gone in zip(asked, lost, strict=True):
        if not gone:
            assert collector.tokens(request) == alone(bench.references[request.task], request)
    assert (engine.stats().failed_steps, engine.stats().kv_used_tokens) == (1, 0)
    engine.stop()


def test_a_source_that_cannot_be_encoded_fails_its_own_requests_and_nothing_repeats() -> None:
    """Its first portions come in steps without any row, which nobody would be told of."""
    bench, collector = served("gated-gelu"), Collector()
    engine = make_engine(bench.model, bench.injection, collector)
    runner: Any = engine._runner
    encode = runner._encode

    def failing(sources: list[Any]) -> None:
        if any(len(source.tokens) == 100 for source in sources):
            raise RuntimeError("too deep")
        encode(sources)

    runner._encode = failing
    engine.start()
    bad = ask(bench, "bad", "routed", (5,) * 100, n=2)
    engine.submit(bad)
    assert isinstance(collector.wait(bad)[-1], Failure)
    good = ask(bench, "good", "routed", (5,) * 60)
    engine.submit(good)
    assert collector.tokens(good) == alone(bench.references["routed"], good)
    assert engine.stats().failed_steps == 1
    engine.stop()


@pytest.mark.parametrize("stack", STACKS)
def test_in_bfloat16_scores_are_near_those_in_float32(stack: str) -> None:
    bench = served(stack)
    inventory = bench.injection.inventory
    model = merged(restless_t5(stack), inventory, None).to(torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    collector = Collector()
    engine = make_engine(model, inject(model, inventory), collector)
    engine.start()
    near = []
    for i, kind in enumerate(["routed", "other", "base"] * 2):
        request = replace(
            ask(bench, f"r{i}", kind, tuple(range(10, 50 + i))), continuations=((5, 6, 7),)
        )
        engine.submit(request)
        (output,) = collector.wait(request)
        assert isinstance(output, Output)
        mean = sum(token.logprob for token in output.logprobs) / 3
        near.append(abs(mean - labels_by_loop(bench.references[kind], request)[0]))
    engine.stop()
    assert max(near) < 0.05
