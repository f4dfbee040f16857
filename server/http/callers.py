"""Whom a call comes from: what that caller may see, do and use."""

import time
from collections.abc import Callable, Collection
from contextvars import ContextVar

from polyhead.server.engine.request import BASE_TASK
from polyhead.server.http.buckets import Bucket
from polyhead.server.http.errors import (
    KeyInvalid,
    KeyMissing,
    MissingScope,
    OutsidePrefix,
    TokenRateExceeded,
    TooManyAtOnce,
    TooManyRequests,
)
from polyhead.server.http.keys import ApiKey, KeyRing, Scope

AT_ONCE_SECONDS = 1.0
"""When to come back after being one too many: nobody knows when another request ends."""

NO_TASK = "~"
"""A prefix that no id has."""


class Caller:
    """One key's holder, the same object for all of its calls. Used on the event loop, but for
    `may_see`, which changes nothing and which any thread may call."""

    def __init__(self, key: ApiKey | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._key = key
        self._clock = clock
        self._running = 0
        self._requests = self._bucket(None, key.requests_per_minute if key else None)
        self._tokens = self._bucket(None, key.tokens_per_minute if key else None)

    @property
    def id(self) -> str | None:
        """The key's id; None where no keys are asked for."""
        return self._key.id if self._key else None

    @property
    def task_prefix(self) -> str | None:
        """What the ids of all this caller's tasks begin with; None sees every task."""
        return self._key.task_prefix if self._key else None

    def renew(self, key: ApiKey) -> None:
        """The key's entry has changed; what was used stays used."""
        if key != self._key:
            self._key = key
            self._requests = self._bucket(self._requests, key.requests_per_minute)
            self._tokens = self._bucket(self._tokens, key.tokens_per_minute)

    def may_see(self, task_id: str) -> bool:
        """Whether a task of this id, there or not, is for this caller."""
        prefix = self.task_prefix
        return prefix is None or task_id == BASE_TASK or task_id.startswith(prefix)

    def narrow(self, prefix: str | None) -> str | None:
        """The prefix of what a list of `prefix` holds for this caller; None lists everything."""
        own = self.task_prefix
        if own is None or (prefix is not None and prefix.startswith(own)):
            return prefix
        return own if own.startswith(prefix or "") else NO_TASK

    def check_owns(self, task_id: str) -> None:
        """Raises `OutsidePrefix` for an id that this caller may not give to a new task."""
        if not self.may_see(task_id):
            raise OutsidePrefix(task_id, str(self.task_prefix))

    def check_scope(self, scopes: Collection[Scope]) -> None:
        """Raises `MissingScope` unless the key has one of `scopes`."""
        if self._key is not None and not set(scopes) & set(self._key.scopes):
            raise MissingScope(sorted(scopes))

    def enter(self) -> None:
        """Begin a call, which must `leave`.

        Raises `TooManyAtOnce`, `TooManyRequests` or `TokenRateExceeded`; then nothing is used.
        """
        most = self._key.max_concurrent if self._key else None
        if most is not None and self._running >= most:
            raise TooManyAtOnce(most, AT_ONCE_SECONDS)
        if self._requests is not None and (wait := self._requests.wait_for(1)):
            raise TooManyRequests(wait)
        # One whole token, because a level that is barely positive would admit without end.
        if self._tokens is not None and (wait := self._tokens.wait_for(1)):
            raise TokenRateExceeded(wait)
        if self._requests is not None:
            self._requests.take(1)
        self._running += 1

    def leave(self) -> None:
        """The call is over."""
        self._running -= 1

    def charge(self, tokens: int) -> None:
        """Account for tokens that were computed for this caller."""
        if self._tokens is not None:
            self._tokens.take(tokens)

    def _bucket(self, old: Bucket | None, per_minute: float | None) -> Bucket | None:
        if per_minute is None:
            return None
        if old is None:
            return Bucket(per_minute, self._clock)
        old.set_rate(per_minute)
        return old


class Callers:
    """Everyone who may call: the holders of a ring's keys, or anyone where there is no ring."""

    def __init__(self, ring: KeyRing | None) -> None:
        self._ring = ring
        self._anyone = Caller(None)
        self._known: dict[str, Caller] = {}

    @property
    def keyed(self) -> bool:
        """Whether a key is needed."""
        return self._ring is not None

    def identify(self, key: str | None) -> Caller:
        """Raises `KeyMissing`, or `KeyInvalid` for one that is unknown or revoked."""
        if self._ring is None:
            return self._anyone
        if key is None:
            raise KeyMissing
        found = self._ring.find(key)
        if found is None:
            raise KeyInvalid
        caller = self._known.setdefault(found.id, Caller(found))
        caller.renew(found)
        return caller

    def refresh(self) -> None:
        """Follow the keys file. May block: call it in a thread."""
        if self._ring is not None:
            self._ring.refresh()


_CALLER: ContextVar[Caller] = ContextVar("caller")


def set_caller(caller: Caller) -> None:
    """Whom the running call comes from, for everything that is done for it from now on."""
    _CALLER.set(caller)


def the_caller() -> Caller:
    """Whom the running call comes from, also in the pool's threads.

    Raises `LookupError` in a call that nobody has let in, which is then answered with 500: a
    route that forgot to ask for a key cannot reach a task.
    """
    return _CALLER.get()
