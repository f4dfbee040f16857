"""PEFT's patterns of module names, which are regular expressions and may come from a stranger."""

import time
from collections.abc import Mapping
from typing import Generic, TypeVar

import regex

from polyhead.adapters.errors import PrivateAdapterError

T = TypeVar("T")

MAX_PATTERNS = 2048
MAX_LENGTH = 512
SECONDS = 1.0
"""For all matches of one adapter. Python's own `re` can be made to run for years, and holds the
interpreter's lock meanwhile; `regex` lets go of it and stops in time."""


class NamePatterns(Generic[T]):
    """Values of modules by patterns of their names; the first that matches holds.

    A pattern matches a whole name, or its end after a dot (`get_pattern_key` of PEFT 0.21.2).
    """

    def __init__(self, field: str, patterns: Mapping[str, T]) -> None:
        """Raises `PrivateAdapterError` for a pattern that is none, and for too many.

        field: where the patterns stand, for errors.
        """
        if len(patterns) > MAX_PATTERNS:
            raise PrivateAdapterError(
                "too many patterns",
                field=field,
                found=str(len(patterns)),
                expected=f"at most {MAX_PATTERNS}",
            )
        self._compiled = [(_compiled(field, text), value) for text, value in patterns.items()]
        self._field = field
        self._left = SECONDS

    def find(self, name: str, default: T) -> T:
        """Raises `PrivateAdapterError` where matching takes too long."""
        started = time.monotonic()
        try:
            for pattern, value in self._compiled:
                if pattern.match(name, timeout=max(self._left, 1e-3), concurrent=True):
                    return value
        except TimeoutError as exc:
            raise PrivateAdapterError(
                "patterns that take too long to match",
                field=self._field,
                expected=f"at most {SECONDS:g} s",
            ) from exc
        finally:
            self._left -= time.monotonic() - started
        return default


def _compiled(field: str, text: str) -> "regex.Pattern[str]":
    if len(text) > MAX_LENGTH:
        raise PrivateAdapterError(
            "a pattern that is too long",
            field=field,
            found=f"{len(text)} characters",
            expected=f"at most {MAX_LENGTH}",
        )
    try:
        return regex.compile(rf"(.*\.)?({text})$", cache_pattern=False)
    except (regex.error, RecursionError, OverflowError, ValueError) as exc:
        raise PrivateAdapterError(
            "not a regular expression", field=field, found=repr(text)[:80]
        ) from exc
