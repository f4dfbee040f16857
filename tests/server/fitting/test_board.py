"""What running jobs tell: curves, their pace, and who is woken."""

import time

from polyhead.server.fitting.board import MOST_CURVES, MOST_POINTS, Board


def point(step: int, steps: int = 100) -> dict[str, object]:
    return {"step": step, "steps": steps, "loss": 1.0 / step, "method": "z"}


def test_a_curve_is_read_from_where_one_left_off() -> None:
    board = Board()
    board.begin("a")
    board.begin("b")
    for step in (1, 2, 3):
        board.tell("a", point(step))
        board.tell("b", point(step + 10))
    whole = board.curve("a")
    assert [told["step"] for _, told in whole] == [1, 2, 3]
    assert board.curve("a", whole[1][0]) == whole[2:]
    assert board.curve("a", whole[2][0]) == []
    assert board.curve("unknown") == []


def test_a_long_curve_is_thinned_and_ends_with_the_newest() -> None:
    board = Board()
    board.begin("a")
    for step in range(1, 5 * MOST_POINTS):
        board.tell("a", point(step))
    steps = [told["step"] for _, told in board.curve("a")]
    assert MOST_POINTS / 2 <= len(steps) <= MOST_POINTS
    assert (steps[0], steps[-1]) == (1, 5 * MOST_POINTS - 1)
    assert steps == sorted(steps)


def test_the_time_left_follows_the_pace_and_starts_anew_with_a_method() -> None:
    board = Board()
    board.begin("a")
    for step in (1, 2, 3):
        board.tell("a", point(step, steps=11))
        time.sleep(0.05)
    board.tell("a", {**point(1, steps=11), "method": "mu"})
    left = [told["seconds_left"] for _, told in board.curve("a")]
    assert left[0] is None
    assert left[3] is None
    assert 0.3 <= float(str(left[2])) <= 2.0  # 8 steps of at least 0.05 s


def test_a_new_run_forgets_the_old_one_and_numbers_go_on() -> None:
    board = Board()
    board.begin("a")
    board.tell("a", point(5))
    ((number, _),) = board.curve("a")
    board.end("a")
    assert board.curve("a")
    board.begin("a")
    assert board.curve("a") == []
    board.tell("a", point(1))
    assert [told["step"] for _, told in board.curve("a", number)] == [1]


def test_curves_of_ended_jobs_go_in_the_end() -> None:
    board = Board()
    for job in range(MOST_CURVES + 1):
        board.begin(str(job))
        board.tell(str(job), point(1))
        board.end(str(job))
    assert board.curve("0") == []
    assert board.curve("1")


def test_listeners_hear_of_their_job_until_they_leave() -> None:
    board, heard = Board(), []
    board.begin("a")
    with board.listening("a", lambda: heard.append("a")):
        board.tell("a", point(1))
        board.changed("b")
        board.end("a")
        board.close()
    board.changed("a")
    assert heard == ["a", "a", "a"]
    assert board.closed
