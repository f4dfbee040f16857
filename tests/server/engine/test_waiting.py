import pytest
from scheduler_world import ask

from polyhead.server.engine.sequence import Sequence
from polyhead.server.engine.waiting import WaitingLine


def waiting(task: str, arrival: float, priority: int = 0, index: int = 0) -> Sequence:
    request = ask(f"{task}{arrival}", task, 3, 3, arrival=arrival, priority=priority)
    return Sequence(request, index, list(request.prompt))


def line_of(*sequences: Sequence) -> WaitingLine:
    line = WaitingLine()
    for sequence in sequences:
        line.add(sequence)
    return line


def order(line: WaitingLine) -> list[Sequence]:
    taken = []
    while (head := line.peek()) is not None:
        line.remove(head)
        taken.append(head)
    return taken


def test_an_empty_line_has_no_head() -> None:
    assert WaitingLine().peek() is None
    assert len(WaitingLine()) == 0


def test_by_arrival_and_choice_within_a_task() -> None:
    right = [waiting("a", 1), waiting("a", 2, index=0), waiting("a", 2, index=1), waiting("a", 3)]
    assert order(line_of(right[3], right[1], right[0], right[2])) == right


def test_priority_comes_before_fairness() -> None:
    line = line_of(waiting("a", 1, priority=0), waiting("b", 2, priority=-1), waiting("c", 0, 5))
    line.charge("b", 1000)
    assert [s.request.task for s in order(line)] == ["b", "a", "c"]


def test_the_least_served_task_goes_next() -> None:
    line = line_of(*(waiting(task, i) for i in range(3) for task in "ab"))
    taken = []
    for _ in range(6):
        head = line.peek()
        assert head is not None
        line.remove(head)
        line.charge(head.request.task, 30 if head.request.task == "a" else 10)
        taken.append(head.request.task)
    assert "".join(taken) == "abbbaa"


def test_nobody_saves_up_a_claim_by_staying_away() -> None:
    line = line_of(waiting("a", 1))
    line.charge("a", 500)
    line.add(waiting("new", 2))
    assert line.served("new") == 500


def test_after_a_quiet_time_all_begin_level() -> None:
    line = line_of(waiting("a", 1))
    line.charge("a", 500)
    order(line)
    line.add(waiting("b", 2))
    assert line.served("b") == line.served("a") == 500
    line.add(waiting("a", 3))
    assert line.served("a") == 500


def test_where_nobody_waits_the_last_one_that_did_sets_the_level() -> None:
    line = line_of(waiting("a", 1), waiting("b", 1))
    line.charge("a", 500)
    assert order(line)[0].request.task == "b"
    line.add(waiting("b", 2))
    line.add(waiting("a", 2))
    assert (line.served("a"), line.served("b")) == (500, 500)


def test_whose_patience_has_ended_goes_before_less_served_tasks_but_not_before_the_urgent() -> None:
    line = line_of(waiting("a", 1))
    held_up = waiting("b", 2)
    held_up.patience = 100
    line.charge("b", 40)
    line.add(held_up)
    line.charge("c", 99)
    assert line.peek() is not held_up
    line.charge("c", 1)
    assert line.peek() is held_up
    line.add(waiting("urgent", 3, priority=-1))
    assert [s.request.task for s in order(line)] == ["urgent", "b", "a"]


def test_of_those_out_of_patience_the_first_to_be_so_goes_first() -> None:
    late, early = waiting("a", 1), waiting("b", 2)
    late.patience, early.patience = 60, 50
    line = line_of(late, early)
    line.charge("b", 70)
    assert order(line) == [early, late]


def test_patience_begins_anew_whenever_one_is_put_in_line() -> None:
    one, other = waiting("a", 1), waiting("b", 2)
    one.patience = 50
    line = line_of(one, other)
    line.charge("a", 60)
    line.remove(one)
    line.add(one)
    assert order(line) == [other, one]


def test_removing_from_the_middle() -> None:
    first, second, other = waiting("a", 1), waiting("a", 2), waiting("b", 1)
    line = line_of(first, second, other)
    line.remove(second)
    assert second not in line
    assert len(line) == 2
    with pytest.raises(ValueError, match="not in list"):
        line.remove(second)
    assert set(line) == {first, other}


def test_counters_are_kept_for_those_who_run_or_wait_only() -> None:
    line = line_of(waiting("waits", 1))
    for task in ("waits", "runs", "gone"):
        line.charge(task, 10)
    line.forget_idle({"runs"})
    assert [line.served(task) for task in ("waits", "runs", "gone")] == [10, 10, 0]
