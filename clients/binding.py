"""Methods from the functions that make calls: the same arguments, doing instead of describing."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar, get_args

F = TypeVar("F", bound=Callable[..., Any])


def documented(method: F, make: Callable[..., Any], skip: int = 0) -> F:
    """`method` with the name, the text and the signature of `make`.

    skip: parameters of `make` that the method fills in itself.
    """
    made = inspect.signature(make)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    result = (get_args(made.return_annotation) or (made.return_annotation,))[-1]
    parameters = [own, *list(made.parameters.values())[skip:]]
    method.__name__ = method.__qualname__ = make.__name__
    method.__doc__ = make.__doc__
    method.__signature__ = inspect.Signature(parameters, return_annotation=result)  # type: ignore[attr-defined]
    return method
