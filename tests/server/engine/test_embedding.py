"""Hidden states of texts, from the same steps as everybody's answers."""

from collections.abc import Iterator

import pytest
import torch
from factories import Collector, alone, make_engine, merged, random_task, tiny_inventory, tiny_model
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.request import Output, Request, SamplingParams

TEXTS = ("cat -> cats", "q", "a line that is a good deal longer than a step takes of it", "dog")


def embedding(name: str, *texts: str) -> Request:
    continuations = tuple(tuple(text.encode()) for text in texts)
    return Request(name, "base", "base", (), continuations=continuations, embeds=True)


def answered(collector: Collector, request: Request) -> list[torch.Tensor]:
    outputs = [e for e in collector.wait(request) if isinstance(e, Output)]
    assert [o.finish_reason for o in outputs] == ["stop"] * len(request.continuations)
    by_index = sorted(outputs, key=lambda o: o.index)
    return [torch.tensor(o.embedding) for o in by_index]


def plain(text: str) -> torch.Tensor:
    """The definition, by transformers alone."""
    out = tiny_model()(torch.tensor([list(text.encode())]), output_hidden_states=True)
    return out.hidden_states[-1][0].mean(0)


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def engine(model: PreTrainedModel, injection: Injection, collector: Collector) -> Iterator[Engine]:
    made = make_engine(model, injection, collector, max_running=4, max_step_tokens=16, kept=1024)
    yield made
    made.stop()


def test_embeddings_are_exact_beside_answers_in_the_same_steps(
    collector: Collector, engine: Engine
) -> None:
    """Each text alone, whole or in chunks; the neighbours answer as they do alone."""
    inventory = tiny_inventory(tiny_model())
    tasks = [random_task(inventory, f"t{i}", i) for i in range(3)]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    asked = [
        Request(t.key, t.key, "g", tuple(b"hello there"), adapter=t, params=params) for t in tasks
    ]
    wanted = embedding("e", *TEXTS)
    for request in (asked[0], wanted, *asked[1:]):
        engine.submit(request)
    engine.start()
    found = answered(collector, wanted)
    for text, own in zip(TEXTS, found, strict=True):
        torch.testing.assert_close(own, plain(text), rtol=1e-4, atol=1e-5)
    assert (found[0] - plain(TEXTS[3])).abs().max() > 0.1
    for request, task in zip(asked, tasks, strict=True):
        own = merged(tiny_model(), inventory, task)
        assert collector.tokens(request) == alone(own, request)


def test_what_the_prefix_cache_holds_is_computed_again(
    collector: Collector, engine: Engine
) -> None:
    """The bare backbone has answered the same text before."""
    text = TEXTS[2]
    before = Request(
        "b", "base", "base", tuple(text.encode()), params=SamplingParams(2, ignore_eos=True)
    )
    engine.submit(before)
    engine.start()
    collector.wait(before)
    again = Request("c", "base", "base", (*text.encode(), 65), params=SamplingParams(1))
    engine.submit(again)
    (output, *_) = collector.wait(again)
    assert isinstance(output, Output)
    assert output.cached_tokens > 0, "nothing was kept: the case is void"
    wanted = embedding("e", text)
    engine.submit(wanted)
    torch.testing.assert_close(answered(collector, wanted)[0], plain(text), rtol=1e-4, atol=1e-5)


def test_a_preempted_text_is_added_up_once(
    model: PreTrainedModel, injection: Injection, collector: Collector
) -> None:
    """A more urgent request takes the only seat while the text is half done."""
    engine = make_engine(model, injection, collector, max_running=1, max_step_tokens=4)
    try:
        wanted = embedding("e", TEXTS[2])
        engine.submit(wanted)
        seen: list[int] = []
        run = engine._runner.run

        def interrupted(batch):  # type: ignore[no-untyped-def]
            found = run(batch)
            seen.append(batch.rows[0].start)
            if len(seen) == 5:
                params = SamplingParams(3, ignore_eos=True)
                engine.submit(Request("u", "u", "u", (1, 2), params=params, priority=-1))
            return found

        engine._runner.run = interrupted  # type: ignore[method-assign]
        engine.start()
        found = answered(collector, wanted)[0]
        assert engine.stats().preemptions == 1
        assert seen.count(0) == 3, "the text was not begun twice"
        torch.testing.assert_close(found, plain(TEXTS[2]), rtol=1e-4, atol=1e-5)
    finally:
        engine.stop()


def test_a_text_can_be_abandoned(collector: Collector, engine: Engine) -> None:
    wanted = embedding("e", *TEXTS)
    engine.submit(wanted)
    engine.abort("e")
    engine.start()
    outputs = [e for e in collector.wait(wanted) if isinstance(e, Output)]
    assert {o.finish_reason for o in outputs} == {"abort"}
    assert engine.drain(10)
