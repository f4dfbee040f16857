"""The keys file: who may call, what for and how much. It holds hashes, never a key."""

import hashlib
import hmac
import json
import logging
import os
import secrets
import threading
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

log = logging.getLogger(__name__)

Scope = Literal["generate", "tasks", "admin"]
Stamp = tuple[int, int, int]

KEY_BYTES = 32
KEY_MARK = "polyhead_"
"""What every key begins with, so that a scanner for leaked secrets can know one."""
KEY_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
TASK_PREFIX = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class KeysFileError(Exception):
    """The keys file cannot be read, or says what it may not; the message names file and key."""


class ApiKey(BaseModel):
    """One key. What is None has no limit; `task_prefix` None sees every task."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    id: str = Field(pattern=KEY_ID)
    hash: str = Field(pattern=r"^sha256:[0-9a-f]{64}$", repr=False)
    scopes: Annotated[list[Scope], Field(min_length=1)]
    requests_per_minute: float | None = Field(None, gt=0)
    tokens_per_minute: float | None = Field(None, gt=0)
    max_concurrent: int | None = Field(None, ge=1)
    task_prefix: str | None = Field(None, pattern=TASK_PREFIX)

    @model_validator(mode="after")
    def _admin_sees_all(self) -> "ApiKey":
        if "admin" in self.scopes and self.task_prefix is not None:
            raise ValueError("the scope admin concerns every task, so it takes no task_prefix")
        return self


class KeysFile(BaseModel):
    """`{"keys": […]}`, or TOML with a `[[keys]]` table for each."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    keys: list[ApiKey]

    @model_validator(mode="after")
    def _unique(self) -> "KeysFile":
        for values in ([key.id for key in self.keys], [key.hash for key in self.keys]):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"{twice[0]!r} stands there twice")
        return self


def new_key() -> str:
    """A key of 256 random bits, to be shown once and never stored."""
    return KEY_MARK + secrets.token_urlsafe(KEY_BYTES)


def hash_of(key: str) -> str:
    """What the file holds of `key`. A plain hash is enough: nobody can try 2^256 keys."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def read_keys(path: Path) -> Sequence[ApiKey]:
    """Every key in `path`, TOML by its suffix and JSON otherwise. Raises `KeysFileError`."""
    try:
        data = path.read_bytes()
        found: Any = tomllib.loads(data.decode()) if is_toml(path) else json.loads(data)
    except (OSError, ValueError, RecursionError) as exc:
        raise KeysFileError(f"{path}: {exc}") from exc
    try:
        return KeysFile.model_validate(found).keys
    except ValidationError as exc:
        raise KeysFileError(f"{path}: {first_error(exc)}") from exc


def is_toml(path: Path) -> bool:
    return path.suffix.lower() == ".toml"


def first_error(exc: ValidationError) -> str:
    """Where the first wrong value is and what is wrong, without the value, which may be secret."""
    error = exc.errors(include_input=False, include_url=False)[0]
    place = ".".join(str(part) for part in error["loc"])
    return f"{place}: {error['msg']}" if place else str(error["msg"])


class KeyRing:
    """The keys in force. `refresh` follows the file; `find` may be called from any thread.

    The constructor raises `KeysFileError`; later a file that is broken or gone changes nothing.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._stamp = _stamp(path)
        self._by_hash: Mapping[str, ApiKey] = _by_hash(read_keys(path))

    @property
    def keys(self) -> Sequence[ApiKey]:
        return tuple(self._by_hash.values())

    def find(self, key: str) -> ApiKey | None:
        """Whose key that is.

        The look-up is by a hash that nobody can steer towards another one, and the comparison
        that decides takes the same time wherever they differ.
        """
        wanted = hash_of(key)
        found = self._by_hash.get(wanted)
        same = hmac.compare_digest(found.hash if found else hash_of(""), wanted)
        return found if same else None

    def refresh(self) -> None:
        """Read the file again if it has changed; a broken one is logged once and not used."""
        with self._lock:
            try:
                stamp = _stamp(self._path)
                if stamp == self._stamp:
                    return
                self._stamp = stamp
                self._by_hash = _by_hash(read_keys(self._path))
            except KeysFileError as exc:
                log.error("the keys that were in force stay: %s", exc)
            else:
                log.info("%s: %d keys are in force", self._path, len(self._by_hash))


def _by_hash(keys: Sequence[ApiKey]) -> Mapping[str, ApiKey]:
    return {key.hash: key for key in keys}


GONE: Stamp = (0, 0, 0)


def _stamp(path: Path) -> Stamp:
    try:
        found = os.stat(path)
    except OSError:
        return GONE
    return found.st_mtime_ns, found.st_size, found.st_ino
