"""What is wrong, what was found and what was expected: told together, and apart."""

from polyhead.adapters.errors import AdapterError, RoutingError


def test_what_is_told_together_is_told_once() -> None:
    error = RoutingError("wrong shape", field="routing", found="[1]", expected="[2]")
    assert str(error) == "routing: wrong shape; expected [2]; found [1]"
    assert error.message == "wrong shape"
    again = RoutingError(error.message, field="tasks.a", found=error.found, expected=error.expected)
    assert str(again) == "tasks.a: wrong shape; expected [2]; found [1]"


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert str(AdapterError("wrong")) == "wrong"
    assert str(AdapterError("wrong", found="1")) == "wrong; found 1"
