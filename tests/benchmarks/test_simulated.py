"""The simulated cluster keeps to its own rules, and gives what can be worked out by hand."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "simulated.py"


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    """By its path: this folder's name hides the package from a test."""
    spec = importlib.util.spec_from_file_location("simulated", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["simulated"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def server(simulated: ModuleType, slots: int | None = None, seats: int = 8) -> object:
    times = simulated.StepTimes(0.1, 0.01, 0.001)
    return simulated.Server("s", times, seats, slots=slots, load_seconds=0.05)


def test_a_lone_request_takes_a_prefill_and_a_step_for_each_token(simulated: ModuleType) -> None:
    load = simulated.Load(rate=0.001, tasks=1, prompt=(100, 100), new_tokens=(10, 10))
    asked = simulated.simulate(server(simulated), 1, load, 20_000)
    assert len(asked) > 10
    ended = [one for one in asked if one.ended is not None]
    for one in ended:
        assert one.first_token - one.arrived == pytest.approx(0.1 + 0.01 + 0.1)
        assert one.ended - one.first_token == pytest.approx(9 * 0.11)


def test_slots_bound_the_tasks_of_a_batch_and_seats_its_requests(simulated: ModuleType) -> None:
    import numpy as np
    import simpy

    for slots, most in ((3, 3), (None, 8)):
        env = simpy.Environment()
        replica = simulated.Replica(env, server(simulated, slots))
        env.process(replica.run())
        draw = np.random.default_rng(0)
        asked = [simulated.Asked(int(draw.integers(20)), 10, 5, 0.0) for _ in range(200)]
        for one in asked:
            replica.submit(one)
        env.run(until=1000)
        assert all(one.ended is not None for one in asked)
        assert replica.most_tasks == most


def test_a_full_server_is_as_fast_as_its_steps(simulated: ModuleType) -> None:
    load = simulated.Load(rate=100, tasks=1, prompt=(1, 1), new_tokens=(10, 10))
    asked = simulated.simulate(server(simulated), 1, load, 100)
    ended = sum(one.ended is not None for one in asked)
    step = 0.1 + 8 * 0.01  # prompts come on top
    assert ended == pytest.approx(100 / step * 8 / 10, rel=0.05)


def test_tasks_cost_slots_and_nothing_else(simulated: ModuleType) -> None:
    few, many = (simulated.Load(rate=3, tasks=tasks, alpha=0.5) for tasks in (2, 5000))
    free, slotted = server(simulated), server(simulated, slots=2)

    def late(kind: object, load: object) -> float:
        return 1 - float(simulated.on_time(simulated.simulate(kind, 2, load, 400), 2.0, 100, 400))

    assert late(free, many) == pytest.approx(late(free, few), abs=0.05)
    assert late(slotted, few) == pytest.approx(late(free, few), abs=0.05)
    assert late(slotted, many) > 0.5


def test_replicas_needed_is_the_least_that_is_enough(simulated: ModuleType) -> None:
    load = simulated.Load(rate=6, tasks=100)
    kind = server(simulated)
    needed = simulated.replicas_needed(kind, load, 2.0, 200)

    def share(count: int) -> float:
        return float(simulated.on_time(simulated.simulate(kind, count, load, 200), 2.0, 50, 200))

    assert needed > 1
    assert share(needed) >= 0.99 > share(needed - 1)
    assert simulated.replicas_needed(kind, load, 0.01, 200, most=4) is None


def test_a_power_law_sums_to_one_and_falls_as_it_says(simulated: ModuleType) -> None:
    shares = simulated.popularity(1000, 1.0)
    assert shares.sum() == pytest.approx(1)
    assert shares[9] == pytest.approx(shares[0] / 10)
    assert simulated.popularity(5, 0.0) == pytest.approx([0.2] * 5)
