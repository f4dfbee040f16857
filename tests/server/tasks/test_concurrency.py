"""Many callers at once."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from polyhead.adapters.routing import Routing
from polyhead.server.tasks.errors import StaleGeneration, TaskExists
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.task import Task

Make = Callable[..., Routing]
CALLERS = 8


def race(call: Callable[[int], Task]) -> list[Task | Exception]:
    """What each of `CALLERS` threads got that started together."""
    together = threading.Barrier(CALLERS)

    def attempt(number: int) -> Task | Exception:
        together.wait()
        try:
            return call(number)
        except (TaskExists, StaleGeneration) as exc:
            return exc

    with ThreadPoolExecutor(CALLERS) as pool:
        return list(pool.map(attempt, range(CALLERS)))


@pytest.mark.parametrize("connections", [1, 2])
def test_one_of_many_creators_wins(
    open_registry: Callable[..., Registry], routing: Make, connections: int
) -> None:
    registries = [open_registry() for _ in range(connections)]
    routings = [routing(number) for number in range(CALLERS)]
    for attempt in range(5):
        name = f"t{attempt}"
        results = race(lambda n, name=name: registries[n % connections].create(name, routings[n]))
        (winner,) = (n for n, result in enumerate(results) if isinstance(result, Task))
        assert sum(isinstance(result, TaskExists) for result in results) == CALLERS - 1
        assert registries[0].get(name) == results[winner]
        assert registries[0].content_bytes(name) == routings[winner].to_safetensors()


@pytest.mark.parametrize("connections", [1, 2])
def test_one_of_many_replacers_of_a_generation_wins(
    open_registry: Callable[..., Registry], routing: Make, connections: int
) -> None:
    registries = [open_registry() for _ in range(connections)]
    registry = registries[0]
    registry.create("t", routing(100))
    routings = [routing(number) for number in range(CALLERS)]
    for _ in range(5):
        start = registry.replace("t", routing(100)).generation
        results = race(
            lambda n, start=start: registries[n % connections].replace(
                "t", routings[n], if_match=start
            )
        )
        (winner,) = (n for n, result in enumerate(results) if isinstance(result, Task))
        assert sum(isinstance(result, StaleGeneration) for result in results) == CALLERS - 1
        assert registry.get("t") == results[winner]
        assert registry.content_bytes("t") == routings[winner].to_safetensors()


def test_readers_see_whole_generations_while_one_writes(registry: Registry, routing: Make) -> None:
    routings = [routing(number) for number in range(4)]
    generations = {
        registry.create(f"t{number}", made).generation: made.fingerprint
        for number, made in enumerate(routings)
    }
    registry.create("t", routings[0])
    stop = threading.Event()

    def read() -> int:
        seen = set()
        while not stop.is_set():
            task, content = registry.load("t")
            assert content.fingerprint == generations[task.generation]
            seen.add(task.generation)
        return len(seen)

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(read) for _ in range(3)]
        try:
            for number in range(60):
                registry.replace("t", routings[number % 4])
        finally:
            stop.set()
        assert max(reader.result() for reader in readers) > 1
