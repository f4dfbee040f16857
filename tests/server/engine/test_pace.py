"""A newcomer waits for its own task's line and a turn of each other task, at the pace seen."""

from math import inf

import pytest
from scheduler_world import ask

from polyhead.server.engine.pace import Pace
from polyhead.server.engine.request import Request
from polyhead.server.engine.sequence import Sequence


def asked(task: str, tokens: int = 100, priority: int = 0, number: int = 0) -> Request:
    """A request of a tenth of its tokens in the prompt."""
    prompt = tokens // 10
    name = f"{task}-{number}"
    return ask(name, task, prompt, tokens - prompt, arrival=0.0, priority=priority)


def join(pace: Pace, request: Request) -> None:
    pace.joins(request, pace.ahead_of(request))


def wait_of(pace: Pace, request: Request) -> float:
    return pace.seconds(pace.ahead_of(request))


def least_wait_of(pace: Pace, task: str, priority: int, answer: int) -> float:
    return pace.seconds(pace.least_ahead_of(task, priority, answer))


def busy(line: dict[str, int], rate: float = 1000.0, longest: float = inf) -> Pace:
    """A pace of `rate` tokens a second, with so many requests of 100 tokens in line."""
    pace = Pace(longest)
    for task, count in line.items():
        for number in range(count):
            join(pace, asked(task, number=number))
    pace.begun([], 0, 1)
    for _ in range(100):
        pace.stepped(int(rate / 100), 0.01)
    return pace


def test_nobody_waits_where_nothing_has_waited() -> None:
    pace = Pace()
    for _ in range(10):
        pace.stepped(1, 10.0)
    join(pace, asked("a"))
    assert wait_of(pace, asked("b")) == 0.0


def test_a_task_waits_for_its_own_line() -> None:
    assert wait_of(busy({"a": 50}), asked("a")) == pytest.approx(5.0)
    assert wait_of(busy({"a": 50}, rate=500), asked("a")) == pytest.approx(10.0)


def test_a_newcomer_waits_for_a_turn_of_each_other_task_only() -> None:
    crowd = busy({"a": 500})
    assert wait_of(crowd, asked("a")) == pytest.approx(50.0)
    assert wait_of(crowd, asked("new")) == pytest.approx(0.1)
    many = busy({f"t{number}": 1 for number in range(200)})
    assert wait_of(many, asked("new")) == pytest.approx(20.0)


def test_whoever_has_its_own_task_before_it_waits_for_what_others_bring_meanwhile() -> None:
    """What joined in the last `longest` seconds, at most as much for each task as its own line."""
    pace = busy({"a": 20, "b": 3, "c": 30}, longest=5.0)
    assert wait_of(pace, asked("a")) == pytest.approx(2.0 + 0.3 + 2.1 + 0.3 + 3.0)
    assert wait_of(pace, asked("b")) == pytest.approx(0.3 + 0.4 + 0.4 + 2 * 0.3)
    assert wait_of(pace, asked("new")) == pytest.approx(0.3)
    for _ in range(50):
        pace.stepped(100, 0.1)
    assert wait_of(pace, asked("a")) == pytest.approx(2.0 + 0.3 + 2.1)
    join(pace, asked("d", priority=1))
    assert wait_of(pace, asked("a")) == pytest.approx(2.0 + 0.3 + 2.1)


def test_patience_lasts_a_quarter_longer_than_what_is_before_and_itself() -> None:
    pace = busy({"a": 20, "b": 3})
    join(pace, asked("b", number=3))
    assert pace.patience_of("b-3") == pytest.approx(1.25 * (300 + 400 + 100))
    pace.begun(["b-3"], 0, 22)
    assert pace.patience_of("b-3") == inf


def test_before_a_prompt_is_read_no_more_is_expected_than_for_the_shortest() -> None:
    crowd = busy({"a": 500, "b": 1})
    assert least_wait_of(crowd, "a", 0, 90) == pytest.approx(50.1)
    assert least_wait_of(crowd, "new", 0, 90) == pytest.approx(0.182)
    assert least_wait_of(crowd, "new", 0, 90) <= wait_of(crowd, asked("new"))
    assert least_wait_of(crowd, "a", -1, 90) == 0.0


def test_the_less_urgent_are_not_waited_for() -> None:
    pace = busy({"a": 50})
    assert wait_of(pace, asked("a", priority=-1)) == 0.0
    assert wait_of(pace, asked("a", priority=1)) == pytest.approx(5.0)


def test_who_has_begun_or_ended_is_waited_for_no_longer() -> None:
    pace = busy({"a": 50})
    pace.begun([asked("a", number=number).id for number in range(20)], 0, 30)
    assert wait_of(pace, asked("a")) == pytest.approx(3.0)
    request = asked("a", number=20)
    pace.ended(Sequence(request, 0, list(request.prompt)))
    assert wait_of(pace, asked("a")) == pytest.approx(2.9)


def test_steps_of_a_small_batch_do_not_slow_the_pace() -> None:
    pace = busy({"a": 50})
    pace.begun([asked("a", number=number).id for number in range(50)], 14, 0)
    for number in range(20):
        join(pace, asked("a", number=number))  # after it has begun: it was small without them
    for _ in range(100):
        pace.stepped(1, 1.0)
    assert wait_of(pace, asked("a")) == pytest.approx(2.0)


def test_whoever_finds_a_free_seat_waits_for_the_prompts_before_it_only() -> None:
    pace = busy({"a": 50})
    pace.begun([asked("a", number=number).id for number in range(50)], 14, 0)
    assert wait_of(pace, asked("a")) == 0.0
    for number in range(13):
        join(pace, asked("a", number=number))
    assert wait_of(pace, asked("a")) == pytest.approx(0.13)
    assert wait_of(pace, asked("new")) == pytest.approx(0.01)
    join(pace, asked("a", number=13))
    assert wait_of(pace, asked("a")) == pytest.approx(1.4)


def test_the_pace_follows_a_change_within_seconds() -> None:
    pace = busy({"a": 100})
    for _ in range(20):
        pace.stepped(250, 1.0)
    assert wait_of(pace, asked("a")) == pytest.approx(40.0, rel=0.1)


def test_answers_that_end_early_shorten_the_line() -> None:
    pace = busy({})
    for number in range(200):
        request = asked("a", 100, number=number)
        pace.ended(Sequence(request, 0, [*request.prompt, 1, 2, 3, 4, 5, 6, 7, 8, 9]))
    for number in range(50):
        join(pace, asked("a", number=number))
    pace.begun([], 0, 50)
    pace.stepped(1000, 1.0)
    assert wait_of(pace, asked("a")) == pytest.approx(50 * (10 + 90 * 0.1) / 1000, rel=0.01)
