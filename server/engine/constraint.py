"""Answers held to a grammar: which tokens may come next in JSON, or in what fits a JSON schema."""

import json
import math
from collections.abc import Iterator
from collections.abc import Sequence as Ordered
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from polyhead.server.engine.tokenizer import Tokenizer

MAX_SCHEMA_BYTES = 65536
MAX_MULTIPLE = 100_000
"""The automaton of `multipleOf` has as many states as the number, and no fuel bounds it."""
COMPILE_SECONDS = 2.0
TOKEN_SECONDS = 0.25
"""How long a step of the whole batch may wait for one answer's next tokens. Usual are 0.1 ms."""
COMPILE_THREADS = 2
MASK_THREADS = 8
"""More than cores, so that an answer whose mask takes long does not keep the others waiting."""
JSON_OBJECT = '{"type": "object"}'
LAYOUT: Any = {
    # One blank after commas and colons, as Python writes it: small models like blanks too much.
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
    "coerce_one_of": False,
}

Mask = NDArray[np.bool_]


class BadSchema(ValueError):
    """A schema that answers cannot be held to; says why."""


class Grammars:
    """Compiles grammars for one backbone's tokens. Thread-safe."""

    def __init__(self, tokenizer: Tokenizer, compile_seconds: float = COMPILE_SECONDS) -> None:
        self._tokenizer = tokenizer
        self._seconds = compile_seconds
        self._compiling = ThreadPoolExecutor(COMPILE_THREADS, "polyhead-schema")
        self._masking = ThreadPoolExecutor(MASK_THREADS, "polyhead-grammar")
        self._cached = lru_cache(maxsize=64)(self._compile_in_time)

    def json_object(self) -> "Grammar":
        """Any JSON object."""
        return self._cached(JSON_OBJECT)

    def of_schema(self, schema: dict[str, Any]) -> "Grammar":
        """JSON that fits `schema`. Takes at most `compile_seconds`. Raises `BadSchema`."""
        if "x-guidance" in schema:
            raise BadSchema("x-guidance: how JSON is laid out is the server's choice")
        try:
            text = json.dumps(schema, allow_nan=False)
            multiple = math.lcm(*_multiples(schema))
        except (ValueError, RecursionError, ArithmeticError) as exc:
            raise BadSchema(str(exc)) from exc
        if len(text) > MAX_SCHEMA_BYTES:
            raise BadSchema(f"{len(text)} bytes, of which at most {MAX_SCHEMA_BYTES} are taken")
        if multiple > MAX_MULTIPLE:
            raise BadSchema(f"multipleOf: the least common multiple of all is over {MAX_MULTIPLE}")
        return self._cached(text)

    def _compile_in_time(self, schema: str) -> "Grammar":
        compiled = self._compiling.submit(self._compile, schema)
        try:
            return compiled.result(self._seconds)
        except TimeoutError as exc:
            compiled.cancel()
            raise BadSchema(f"takes longer than {self._seconds:g} s to prepare") from exc

    def _compile(self, schema: str) -> "Grammar":
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=LAYOUT)
        except ValueError as exc:
            raise BadSchema(_in_short(str(exc))) from exc
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=limits)
        first = matcher.compute_bitmask() if not matcher.is_error() else b""
        if matcher.is_error():
            raise BadSchema(_in_short(matcher.get_error()))
        return Grammar(matcher, first, self._tokens.vocab_size, self._masking)

    @cached_property
    def _tokens(self) -> LLTokenizer:
        # Takes about half a second, so whoever needs no grammar does not wait for it.
        ends = sorted(self._tokenizer.stop_ids)
        if not ends:
            raise BadSchema("the backbone has no token that ends an answer")
        return LLTokenizer(self._tokenizer.fast.to_str(), eos_token=ends)


@dataclass(frozen=True, eq=False)
class Grammar:
    """A compiled grammar, from which every choice of a request starts anew."""

    matcher: LLMatcher
    first: bytes
    vocabulary: int
    pool: ThreadPoolExecutor

    def cursor(self) -> "Cursor":
        return Cursor(self)


class Cursor:
    """Where one answer is in its grammar.

    The next mask is computed in a thread while the backbone computes the step, and a step waits
    for it no longer than `TOKEN_SECONDS`; after that the answer has `failed`, and only this one.
    """

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar
        self.failed = False
        self._start()

    def allowed(self, answer: Ordered[int]) -> Mask:
        """Which tokens may follow `answer` [vocabulary]; every one once it has `failed`."""
        if self._taken != list(answer):
            self._start()
            self._go_on(answer)
        try:
            bits = self._next.result(TOKEN_SECONDS)
        except (TimeoutError, BadSchema):
            bits = b""
        if not any(bits):
            self.failed = True
            return np.ones(self._grammar.vocabulary, np.bool_)
        flat = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        return flat[: self._grammar.vocabulary].astype(np.bool_)

    def take(self, token: int) -> None:
        """The answer goes on with `token`: begin to find out what may follow."""
        self._go_on([token])

    def _start(self) -> None:
        self._matcher = self._grammar.matcher.deep_copy()
        self._taken: list[int] = []
        self._next: Future[bytes] = Future()
        self._next.set_result(self._grammar.first)

    def _go_on(self, tokens: Ordered[int]) -> None:
        """Only ever called when nothing is being computed on the matcher."""
        self._taken += tokens
        self._next = self._grammar.pool.submit(_advance, self._matcher, list(tokens))


def _advance(matcher: LLMatcher, tokens: list[int]) -> bytes:
    """The mask after `tokens`. After the answer's end there is none, and nobody asks for one."""
    matcher.consume_tokens(tokens)
    bits = b"" if matcher.is_error() else matcher.compute_bitmask()
    if matcher.is_error():
        raise BadSchema(_in_short(matcher.get_error()))
    return bits


def _multiples(schema: Any) -> Iterator[int]:
    """The numbers of every `multipleOf`, without their decimal points."""
    if isinstance(schema, dict):
        value = schema.get("multipleOf")
        if isinstance(value, int | float) and value:
            yield abs(int("".join(map(str, Decimal(str(value)).as_tuple().digits))))
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _multiples(part)


def _in_short(text: str) -> str:
    """A parser's message in one line: of several, what it is about and what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(dict.fromkeys(lines[:1] + lines[-1:]))[:200]
