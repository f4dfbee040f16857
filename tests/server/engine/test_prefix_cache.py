"""What was computed is not computed again for the same beginning, nor used for another key."""

import random
from dataclasses import replace

import pytest
from scheduler_world import World, ask, expected

from polyhead.server.engine.prefix_cache import BLOCK
from polyhead.server.engine.request import Request, SamplingParams


def asked(
    name: str, prompt: list[int], answer: int = 5, generation: str = "g", n: int = 1
) -> Request:
    params = SamplingParams(max_tokens=answer, ignore_eos=True, n=n)
    return replace(
        ask(name, "a", 1, answer, arrival=float(len(name))),
        prompt=tuple(prompt),
        generation=generation,
        params=params,
    )


def words(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(32, 127), k=length)


def answer(world: World, request: Request) -> list[int]:
    world.submit(request)
    world.run()
    return world.tokens[request.id, 0]


def test_the_same_prompt_is_computed_once_but_for_its_last_token() -> None:
    world, prompt = World(kept=4096), words(0, 100)
    first, again = asked("first", prompt), asked("again", prompt)
    assert answer(world, first) == answer(world, again) == expected(first)
    assert (world.computed["first"], world.computed["again"]) == (104, 5)
    assert (world.cached["first"], world.cached["again"]) == (0, 99)


def test_a_conversation_goes_on_from_its_last_turn() -> None:
    world, said = World(kept=4096), words(0, 60)
    for turn in range(4):
        request = asked(f"turn-{turn}", said, answer=20)
        told = answer(world, request)
        assert told == expected(request)
        assert world.cached[request.id] == (len(said) - 11 if turn else 0)
        said = said + told + words(turn, 10)
    assert len(world.prefixes) == 1  # a turn takes the place of those before it


def test_a_shared_beginning_is_found_to_the_token() -> None:
    world, system = World(kept=4096), words(0, 3 * BLOCK + 5)
    for number in range(5):
        request = asked(f"r{number}", [*system, number, *words(number + 1, 20)])
        assert answer(world, request) == expected(request)
        assert world.cached[request.id] == (len(system) if number else 0)


def test_another_generation_begins_anew() -> None:
    world, prompt = World(kept=4096), words(0, 100)
    for generation in ("old", "new"):
        answer(world, asked(generation, prompt, generation=generation))
        assert world.cached[generation] == 0
        assert world.computed[generation] == 104
    answer(world, asked("control", prompt, generation="old"))
    assert world.cached["control"] == 99


def test_beginnings_shorter_than_a_block_are_not_kept() -> None:
    world = World(kept=4096)
    answer(world, asked("short", words(0, BLOCK - 6), answer=5))
    assert len(world.prefixes) == 0
    answer(world, asked("long", words(0, BLOCK), answer=5))
    assert len(world.prefixes) == 1


def test_without_an_allowance_nothing_is_kept() -> None:
    world, prompt = World(), words(0, 100)
    for name in ("first", "again"):
        answer(world, asked(name, prompt))
        assert world.computed[name] == 104
    assert world.space.parked == 0


def test_choices_tell_what_their_stem_found() -> None:
    world, prompt = World(kept=4096), words(0, 100)
    answer(world, asked("first", prompt))
    answer(world, asked("many", prompt, n=3))
    assert world.cached["many"] == 98
    assert world.tokens["many", 2] == world.tokens["many", 0]


def test_the_least_recently_used_goes_first() -> None:
    world = World(kept=3 * 128)
    prompts = [words(seed, 100) for seed in range(4)]
    for name, number in zip("abcde", (0, 1, 2, 0, 3), strict=True):
        answer(world, asked(name, prompts[number]))  # 1 is the oldest when 3 needs its place
    for number, found in ((0, 99), (2, 99), (1, 0)):
        answer(world, asked(f"look-{number}", prompts[number]))
        assert world.cached[f"look-{number}"] == found


def test_whoever_runs_goes_before_what_is_kept() -> None:
    world = World(budget=1024, kept=1024)
    for seed in range(8):
        answer(world, asked(f"{seed}", words(seed, 100)))
    assert world.space.parked > 512
    request = asked("long", words(99, 500), answer=10)
    assert answer(world, request) == expected(request)
    assert world.scheduler.preemptions == 0


def test_scores_still_see_every_token_they_need() -> None:
    world, prompt = World(kept=4096), tuple(words(0, 100))
    base = asked("plain", list(prompt))
    answer(world, base)
    scored = replace(base, id="scored", continuations=((1, 2, 3), (4, 5)))
    world.submit(scored)
    world.run()
    assert [len(world.scores["scored", index]) for index in range(2)] == [3, 2]
    echoed = replace(base, id="echoed", echo=True)
    world.submit(echoed)
    world.run()
    assert world.cached["echoed"] == 0


@pytest.mark.parametrize("seed", range(12))
def test_any_traffic_gets_the_same_answers(seed: int) -> None:
    """Prompts that begin alike, several generations, little memory, aborts and preemptions."""
    draw = random.Random(seed)
    budget = draw.choice([700, 1500, 4000])
    world = World(max_running=4, budget=budget, longest=512, kept=draw.choice([300, budget]))
    roots = [words(root, draw.randint(10, 120)) for root in range(3)]
    requests: list[Request] = []
    for number in range(60):
        prompt = draw.choice(roots)[: draw.randint(1, 120)] + words(number, draw.randint(0, 40))
        if requests and draw.random() < 0.3:  # a conversation goes on
            before = draw.choice(requests)
            prompt = [*before.prompt, *world.tokens.get((before.id, 0), []), number % 90 + 32]
        request = asked(
            f"r{number}",
            prompt[:300],
            draw.randint(1, 30),
            draw.choice("xyz"),
            draw.choice([1, 1, 3]),
        )
        requests.append(replace(request, task=draw.choice("ab"), priority=draw.randint(0, 1)))
        world.submit(requests[-1])
        for _ in range(draw.randint(0, 12)):
            world.step()
        if draw.random() < 0.1:
            world.abort(draw.choice(requests).id)
    world.run()
    for request in requests:
        if world.ended[request.id, 0] != "abort":
            assert world.tokens[request.id, 0] == expected(request)
    assert world.space.used == 0
    assert sum(world.cached.values()) > 0
