"""The engine's thread: how requests end, how it fails, how it stops."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import (
    Collector,
    make_engine,
    random_private,
    random_task,
    tiny_inventory,
    tiny_model,
)
from transformers import PreTrainedModel

from polyhead.adapters.inject import Injection, inject
from polyhead.adapters.plan import RoutedTask, use_plan
from polyhead.adapters.private import PrivateAdapter
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.errors import EngineDead, EngineDraining, EngineFull, RequestTooLarge
from polyhead.server.engine.request import Event, Failure, Output, Request, SamplingParams

Build = Callable[..., Engine]


def ask(name: str, answer: int = 10, prompt: int = 8, **more: Any) -> Request:
    params = more.pop("params", SamplingParams(max_tokens=answer, ignore_eos=True))
    ids = tuple((ord(name[0]) + 7 * i) % 256 for i in range(prompt))
    return Request(name, more.pop("task", name), "g", ids, params=params, **more)


def endless(name: str, **more: Any) -> Request:
    return ask(name, answer=500, **more)


def eventually(true: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.002)


@pytest.fixture
def collector() -> Collector:
    return Collector()


@pytest.fixture
def build(model: PreTrainedModel, injection: Injection, collector: Collector) -> Iterator[Build]:
    """Makes engines that are not started, and stops them in the end."""
    made: list[Engine] = []

    def make(**options: Any) -> Engine:
        engine = make_engine(model, injection, collector, **options)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.stop()


@pytest.fixture
def bare(model: PreTrainedModel, injection: Injection) -> Callable[[Request], list[int]]:
    """The whole text computed anew for every token, each request alone."""

    def compute(request: Request) -> list[int]:
        ids = list(request.prompt)
        for _ in range(request.params.max_tokens):
            plan = injection.plan([request.adapter], [len(ids)])
            with torch.no_grad(), use_plan(plan):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(request.prompt) :]

    return compute


def reasons(collector: Collector, request: Request) -> list[str | None]:
    events = collector.wait(request)
    return [e.finish_reason for e in events if isinstance(e, Output) and e.finish_reason]


def test_one_event_per_token_and_the_last_has_the_reason(
    build: Build, collector: Collector, bare: Callable[[Request], list[int]]
) -> None:
    engine = build()
    engine.start()
    request = ask("a", answer=7)
    engine.submit(request)
    events = collector.wait(request)
    assert [e.finish_reason for e in events if isinstance(e, Output)] == [None] * 6 + ["length"]
    assert collector.tokens(request) == bare(request)


def test_an_end_token_stops_and_is_not_shown(build: Build, collector: Collector) -> None:
    engine = build()
    engine.start()
    free = ask("a", answer=300, params=SamplingParams(max_tokens=300, temperature=100.0, seed=2))
    blind = SamplingParams(max_tokens=300, temperature=100.0, seed=2, ignore_eos=True)
    deaf = Request("deaf", "a", "g", free.prompt, params=blind)
    engine.submit(free)
    engine.submit(deaf)
    tokens, through = collector.tokens(free), collector.tokens(deaf)
    assert reasons(collector, free) == ["stop"]
    assert tokens[-1] == 256
    assert 256 not in tokens[:-1]
    assert through[: len(tokens)] == tokens
    assert len(through) == 300
    assert "<|end|>" not in collector.text(free) + collector.text(deaf)


def test_a_stop_string_ends_the_answer_in_front_of_it(build: Build, collector: Collector) -> None:
    engine = build()
    engine.start()
    whole = ask("a", answer=60)
    engine.submit(whole)
    text = collector.text(whole)
    stop = text[10:13]
    cut = ask("a2", params=SamplingParams(max_tokens=60, ignore_eos=True, stop=(stop,)))
    cut = Request("cut", "a", "g", whole.prompt, params=cut.params)
    engine.submit(cut)
    assert collector.text(cut) == text[: text.index(stop)]
    assert reasons(collector, cut) == ["stop"]


@pytest.mark.parametrize("late", [0.0, 0.3])
def test_a_deadline_gives_what_there_is(
    build: Build, collector: Collector, bare: Callable[[Request], list[int]], late: float
) -> None:
    engine = build()
    engine.start()
    request = endless("a", deadline=time.monotonic() + late)
    engine.submit(request)
    assert reasons(collector, request) == ["deadline"]
    tokens = collector.tokens(request)
    assert len(tokens) < 500
    assert bool(tokens) == (late > 0)
    assert tokens[:20] == bare(ask("a", answer=20))[: len(tokens)]
    eventually(lambda: engine.stats().kv_used_tokens == 0)


def test_abort_ends_a_request_wherever_it_is(build: Build, collector: Collector) -> None:
    engine = build(max_running=2)
    engine.start()
    runs, waits, more = endless("a"), endless("b", task="a"), endless("c", task="a")
    for request in (runs, waits, more):
        engine.submit(request)
    eventually(lambda: "b" in collector.events)
    for name in ("a", "c", "unknown"):
        engine.abort(name)
    assert reasons(collector, runs) == reasons(collector, more) == ["abort"]
    assert collector.tokens(more) == []
    before = len(collector.events["a"])
    engine.abort("b")
    assert reasons(collector, waits) == ["abort"]
    assert len(collector.events["a"]) == before
    eventually(lambda: engine.stats().requests == 0)


def test_abort_right_after_submit_is_not_lost(build: Build, collector: Collector) -> None:
    engine = build()
    engine.start()
    for i in range(50):
        request = endless(f"a{i}")
        engine.submit(request)
        engine.abort(request.id)
        assert reasons(collector, request) == ["abort"]


def test_memory_follows_use_and_goes_back(build: Build, collector: Collector) -> None:
    engine = build(max_running=8, kv_tokens=8 * 512)
    store = engine._runner.store
    token = store.shape.token_bytes(torch.float32)
    assert store.nbytes == 0
    engine.start()
    requests = [endless(f"{i}") for i in range(3)]
    for request in requests:
        engine.submit(request)
    eventually(lambda: all(request.id in collector.events for request in requests))
    assert 3 * 128 * token <= store.nbytes <= 5 * 256 * token  # and not 8 * 512
    for request in requests:
        engine.abort(request.id)
    eventually(lambda: store.nbytes == 0)


def test_a_full_line_refuses_and_says_when_to_come_again(
    build: Build, collector: Collector
) -> None:
    engine = build(max_waiting=5)
    requests = [ask(f"{i}") for i in range(5)]
    for request in requests:
        engine.submit(request)
    with pytest.raises(EngineFull) as caught:
        engine.submit(ask("x"))
    assert caught.value.retry_after > 0
    with pytest.raises(EngineFull):
        engine.check("x")
    engine.start()
    for request in requests:
        collector.wait(request)
    engine.check("x")
    engine.submit(ask("x"))


def test_a_burst_cannot_slip_past_the_limit(build: Build) -> None:
    engine = build(max_running=1, max_waiting=5)
    engine.start()
    accepted = 0
    for i in range(200):
        try:
            engine.submit(endless(f"{i}", task="a"))
            accepted += 1
        except EngineFull:
            time.sleep(0.0005)
    assert accepted <= 6


def test_what_can_never_fit_is_refused(build: Build, collector: Collector) -> None:
    engine = build(kv_tokens=300, longest=512)
    engine.start()
    with pytest.raises(RequestTooLarge, match="301 tokens; the cache holds 300"):
        engine.submit(ask("a", answer=200, prompt=101))
    fits = ask("b", answer=200, prompt=100)
    engine.submit(fits)
    assert len(collector.tokens(fits)) == 200
    scores = ask("c", prompt=290, continuations=((1, 2, 3), (4,)))
    engine.submit(scores)
    assert reasons(collector, scores) == ["stop", "stop"]
    with pytest.raises(RequestTooLarge):
        engine.submit(ask("d", prompt=290, continuations=((1,) * 11, (4,))))


def wrong_task(injection: Injection) -> RoutedTask:
    good = random_task(injection.inventory, "wrong", 1)
    return RoutedTask("wrong", good.weights[:-1])


def test_a_failed_step_fails_its_own_requests_only(
    build: Build,
    collector: Collector,
    injection: Injection,
    bare: Callable[[Request], list[int]],
) -> None:
    engine = build(max_running=2, max_step_tokens=32)
    adapter = random_task(injection.inventory, "good", 5)
    poison = ask("poison", adapter=wrong_task(injection))
    beside = ask("beside", adapter=adapter)
    later = [ask(f"{i}", adapter=adapter if i % 2 else None) for i in range(5)]
    for request in (poison, beside, *later):
        engine.submit(request)
    engine.start()
    for request in (poison, beside):
        assert [type(e) for e in collector.wait(request)] == [Failure]
    for request in later:
        assert collector.tokens(request) == bare(request)
    assert engine.stats().failed_steps == 1
    assert engine.alive
    again = ask("beside again", adapter=adapter)
    engine.submit(again)
    assert collector.tokens(again) == bare(again)


def test_a_running_request_outside_the_failed_step_goes_on(
    build: Build,
    collector: Collector,
    injection: Injection,
    bare: Callable[[Request], list[int]],
) -> None:
    engine = build(max_running=4, max_step_tokens=8)
    slow = ask("slow", prompt=400, answer=4)
    shared = Request(
        "shared", "s", "g", tuple(range(200)), params=SamplingParams(4, ignore_eos=True, n=3)
    )
    engine.submit(slow)
    engine.submit(shared)
    engine.start()
    eventually(lambda: engine.stats().steps > 3)
    urgent = ask("poison", adapter=wrong_task(injection), prompt=30, priority=-1)
    engine.submit(urgent)
    assert [type(e) for e in collector.wait(urgent)] == [Failure]
    assert collector.tokens(slow) == bare(slow)
    for index in range(3):
        assert collector.tokens(shared, index) == bare(shared)
    assert engine.stats().failed_steps == 1


@pytest.mark.parametrize(
    "params", [SamplingParams(20), SamplingParams(20, 1.0, top_p=0.9)], ids=["greedy", "drawn"]
)
def test_a_task_that_overflows_spoils_no_other(
    build: Build,
    collector: Collector,
    injection: Injection,
    bare: Callable[[Request], list[int]],
    params: SamplingParams,
) -> None:
    """What it leaves behind in the cache is in rows that others get next."""
    engine = build(max_running=4)
    huge = random_private(injection.inventory, 1, std=1e25)
    # These keep the memory in use. The short one comes to the row of the overflowing one, where
    # it is attended to as far as the long one's reaches.
    keeper, long = ask("k", answer=300), ask("l", prompt=90, answer=200)
    overflowing = ask("o", prompt=100, params=params, adapter=huge)
    short = ask("s", prompt=3, answer=20)
    for request in (keeper, long, overflowing):
        engine.submit(request)
    engine.start()
    collector.wait(overflowing)
    engine.submit(short)
    for request in (keeper, long, short):
        assert collector.tokens(request) == bare(request)


def test_a_dead_engine_says_so(
    model: PreTrainedModel, injection: Injection, collector: Collector
) -> None:
    deaths: list[BaseException] = []
    broken = RuntimeError("nobody listens")
    told: list[Event] = []

    def publish(events: list[Event]) -> None:
        if not told:
            told.extend(events)
            raise broken
        told.extend(events)

    engine = make_engine(model, injection, collector, on_death=deaths.append)
    engine._publish = publish
    for name in "ab":
        engine.submit(ask(name))
    engine.start()
    eventually(lambda: bool(deaths))
    assert deaths == [broken]
    assert not engine.alive
    assert {e.request_id for e in told if isinstance(e, Failure)} == {"a", "b"}
    with pytest.raises(EngineDead) as caught:
        engine.submit(ask("c"))
    assert caught.value.__cause__ is broken
    assert engine.drain(1)
    engine.stop()


def test_death_is_told_even_when_publishing_is_what_broke(
    model: PreTrainedModel, injection: Injection
) -> None:
    class Deaf(Collector):
        def publish(self, events: list[Event]) -> None:
            raise RuntimeError(f"{len(events)} events too many")

    deaths: list[BaseException] = []
    engine = make_engine(model, injection, Deaf(), on_death=deaths.append)
    engine.submit(ask("a"))
    engine.start()
    eventually(lambda: bool(deaths))
    engine.stop()
    assert not engine.alive


def test_draining_refuses_new_requests_and_finishes_the_old(
    build: Build, collector: Collector
) -> None:
    engine = build()
    engine.start()
    requests = [ask(f"{i}", answer=40) for i in range(6)]
    for request in requests:
        engine.submit(request)
    assert engine.drain(30)
    ended = [e for e in list(collector.order) if isinstance(e, Output) and e.finish_reason]
    assert [e.finish_reason for e in ended] == ["length"] * 6
    assert engine.draining
    assert engine.alive
    with pytest.raises(EngineDraining):
        engine.submit(ask("late"))


def test_draining_waits_for_what_was_submitted_just_now(
    model: PreTrainedModel, injection: Injection
) -> None:
    """At no moment may a request be neither in the inbox nor counted."""
    for i in range(30):
        collector = Collector()
        engine = make_engine(model, injection, collector)
        engine.start()
        engine.submit(ask("a", answer=1))
        time.sleep(i * 1e-5)
        assert engine.drain(20)
        assert "a" in collector.events
        engine.stop()


def test_draining_gives_up_in_time(build: Build, collector: Collector) -> None:
    engine = build()
    engine.start()
    request = endless("a")
    engine.submit(request)
    assert not engine.drain(0.05)
    engine.abort("a")
    assert engine.drain(20)
    assert reasons(collector, request) == ["abort"]


def test_stop_aborts_what_is_left(build: Build, collector: Collector) -> None:
    engine = build(max_running=2)
    engine.start()
    requests = [endless(f"{i}") for i in range(4)]
    for request in requests:
        engine.submit(request)
    eventually(lambda: bool(collector.events))
    engine.stop()
    assert not engine.alive
    for request in requests:
        assert reasons(collector, request) == ["abort"]
    with pytest.raises(EngineDraining):
        engine.submit(ask("late"))
    engine.stop()


def test_many_threads_may_submit_and_abort(build: Build, collector: Collector) -> None:
    engine = build(max_running=8, max_waiting=1000)
    engine.start()
    kept: list[Request] = []

    def client(number: int) -> None:
        for i in range(10):
            request = ask(f"{number}-{i}", answer=5, task=f"{number}")
            engine.submit(request)
            if i % 3 == 0:
                engine.abort(request.id)
            kept.append(request)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in kept:
        assert len(reasons(collector, request)) == 1
    eventually(lambda: engine.stats().kv_used_tokens == 0)
    assert engine.stats().requests == engine.stats().waiting == engine.stats().running == 0


def test_stats_tell_what_is_going_on(build: Build) -> None:
    engine = build(max_running=3, kv_tokens=2048)
    assert engine.stats().kv_capacity_tokens == 2048
    engine.start()
    for i in range(5):
        engine.submit(endless(f"{i}", task=f"t{i % 2}"))
    eventually(lambda: engine.stats().running == 3 and engine.stats().step_tasks == 2)
    stats = engine.stats()
    assert (stats.waiting, stats.requests) == (2, 5)
    assert stats.kv_used_tokens >= 3 * 128
    assert stats.steps > 0
    assert stats.step_seconds > 0


def test_an_adapter_that_overflows_fails_its_request_alone() -> None:
    model = tiny_model()
    inventory = tiny_inventory(model)
    module = inventory.header.modules[2]
    huge = PrivateAdapter.checked(
        {module.name: torch.full((module.in_features, 1), 1e30)},
        {module.name: torch.full((1, module.out_features), 1e30)},
        inventory.header.modules,
    )
    collector = Collector()
    engine = make_engine(model, inject(model, inventory), collector)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    sound = Request("sound", "base", "base", tuple(b"hello"), None, params)
    broken = Request("broken", "huge", "g", tuple(b"hello"), huge, params)
    engine.start()
    try:
        engine.submit(sound)
        engine.submit(broken)
        (failure,) = collector.wait(broken)
        assert isinstance(failure, Failure)
        assert "overflows" in failure.message
        assert len(collector.tokens(sound)) == 12
    finally:
        engine.stop()


def known(collector: Collector, request: Request) -> list[list[float]]:
    """The log-probabilities of each choice's given tokens."""
    outputs = [event for event in collector.wait(request) if isinstance(event, Output)]
    found: dict[int, list[float]] = {}
    for output in outputs:
        given = output.logprobs if request.continuations else output.prompt_logprobs
        found.setdefault(output.index, []).extend(entry.logprob for entry in given)
    return [found[index] for index in sorted(found)]


@pytest.mark.parametrize("n", [1, 2])
def test_an_echo_tells_the_prompt_s_own_log_probabilities(
    build: Build, collector: Collector, n: int
) -> None:
    engine = build(max_step_tokens=16)
    params = SamplingParams(max_tokens=3, ignore_eos=True, n=n, logprobs=2)
    echo = ask("e", prompt=40, params=params, echo=True)
    plain = ask("p", params=params)
    score = replace(ask("s", prompt=40), prompt=echo.prompt[:1], continuations=(echo.prompt[1:],))
    engine.start()
    for request in (echo, plain, score):
        engine.submit(request)
    assert known(collector, echo) == [pytest.approx(known(collector, score)[0], abs=1e-4)] * n
    assert len(known(collector, echo)[0]) == 39
    assert known(collector, plain) == [[]] * n
    first = next(e for e in collector.wait(echo) if isinstance(e, Output))
    assert all(len(entry.top) == 2 for entry in first.prompt_logprobs)
    alone = replace(echo, id="alone", echo=False)
    engine.submit(alone)
    assert collector.tokens(alone) == collector.tokens(echo)


def test_a_preempted_score_counts_no_token_twice(build: Build, collector: Collector) -> None:
    """The score's prompt takes many steps; a more urgent request takes its seat in between."""
    engine = build(max_step_tokens=4, max_running=1)
    score = replace(ask("s", prompt=300), prompt=(7,), continuations=(tuple(range(200)),))
    engine.start()
    engine.submit(score)
    eventually(lambda: engine.stats().steps > 10)
    urgent = ask("u", priority=-1)
    engine.submit(urgent)
    collector.wait(urgent)
    (found,) = known(collector, score)
    assert engine.stats().preemptions > 0
    assert len(found) == 200
    again = replace(score, id="again")
    engine.submit(again)
    assert known(collector, again) == [pytest.approx(found, abs=1e-4)]


def test_who_would_wait_too_long_is_refused_and_a_newcomer_is_not(
    build: Build, collector: Collector
) -> None:
    engine = build(max_running=1, max_wait=0.5)
    engine.start()
    pauses = []
    for i in range(400):
        try:
            engine.submit(ask(f"{i}", answer=100, task="crowd"))
        except EngineFull as exc:
            pauses.append(exc.retry_after)
        time.sleep(0.001)
    assert 0 < len(pauses) < 400
    assert min(pauses) > 0
    newcomer = ask("new", answer=2)
    engine.submit(newcomer)
    assert len(collector.tokens(newcomer)) == 2
