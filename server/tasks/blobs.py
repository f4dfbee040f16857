"""Where private adapters lie: files named by their content, or an S3-compatible store."""

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.store import from_url

from polyhead.server.tasks.errors import RegistryUnavailable, StorageFull, UnsupportedStore

SUFFIX = ".safetensors"
GRACE_SECONDS = 3600.0
"""How long a blob may lie before a task names it: it is stored first."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Blobs(Protocol):
    """Contents by fingerprint. What `put` took survives a crash.

    Every method raises `RegistryUnavailable` where the place refuses, `StorageFull` without room.
    """

    def put(self, fingerprint: str, data: bytes) -> bool:
        """Keep `data`; False where the database is to keep it."""

    def get(self, fingerprint: str) -> bytes:
        """What was put under `fingerprint`."""

    def sweep(self, used: Collection[str]) -> int:
        """Delete what is neither in `used` nor new; returns how many. No writer may be at work."""


class InDatabase:
    """No place of its own: the database keeps private adapters as it keeps routings."""

    def put(self, fingerprint: str, data: bytes) -> bool:  # noqa: ARG002
        return False

    def get(self, fingerprint: str) -> bytes:
        raise RegistryUnavailable(
            f"the private adapter {fingerprint[:12]} is not in the database: it was stored while "
            "--blob-store named another place"
        )

    def sweep(self, used: Collection[str]) -> int:  # noqa: ARG002
        return 0


class Folder:
    """Files in `root`, each written aside, synced and renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, fingerprint: str, data: bytes) -> bool:
        path = self._path(fingerprint)
        with _files(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                path.touch()  # it is new again for `sweep`
                return True
            aside = path.with_name(f".{fingerprint}.{secrets.token_hex(4)}")
            try:
                with aside.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                aside.rename(path)
            finally:
                aside.unlink(missing_ok=True)
            for folder in (path.parent, self._root):
                _sync_folder(folder)
        return True

    def get(self, fingerprint: str) -> bytes:
        path = self._path(fingerprint)
        with _files(path):
            return path.read_bytes()

    def sweep(self, used: Collection[str]) -> int:
        old = time.time() - GRACE_SECONDS
        swept = 0
        with _files(self._root):
            for path in self._root.glob("*/*"):
                # Files that were being written when the server ended begin with a dot.
                if path.stem not in used and path.stat().st_mtime < old:
                    path.unlink(missing_ok=True)
                    swept += 1
        return swept

    def _path(self, fingerprint: str) -> Path:
        return self._root / fingerprint[:2] / f"{fingerprint}{SUFFIX}"


class Bucket:
    """Objects below an `s3://bucket/prefix`. Keys and endpoint come from the usual AWS_ variables;
    a plain-HTTP endpoint needs AWS_ALLOW_HTTP=true. Raises `UnsupportedStore`."""

    def __init__(self, url: str) -> None:
        if not url.startswith("s3://"):
            raise UnsupportedStore(f"blob store: expected s3://bucket/prefix, found {url!r}")
        try:
            self._store = from_url(
                url,
                client_options={"timeout": "30s", "allow_http": _allows_http()},
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=10)},
            )
        except (BaseError, ValueError) as exc:
            raise UnsupportedStore(f"blob store {url}: {exc}") from exc

    def put(self, fingerprint: str, data: bytes) -> bool:
        with _objects():
            obstore.put(self._store, self._path(fingerprint), data)
        return True

    def get(self, fingerprint: str) -> bytes:
        with _objects():
            return bytes(obstore.get(self._store, self._path(fingerprint)).bytes())

    def sweep(self, used: Collection[str]) -> int:
        old = datetime.fromtimestamp(time.time() - GRACE_SECONDS, UTC)
        with _objects():
            gone = [
                entry["path"]
                for page in obstore.list(self._store)
                for entry in page
                if Path(entry["path"]).stem not in used and entry["last_modified"] < old
            ]
            if gone:
                obstore.delete(self._store, gone)
        return len(gone)

    def _path(self, fingerprint: str) -> str:
        return f"{fingerprint[:2]}/{fingerprint}{SUFFIX}"


@contextlib.contextmanager
def _files(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        kind = StorageFull if exc.errno in NO_ROOM else RegistryUnavailable
        raise kind(f"{path}: {exc.strerror}") from exc


@contextlib.contextmanager
def _objects() -> Iterator[None]:
    try:
        yield
    except (BaseError, OSError) as exc:
        reason = str(exc).partition("\n")[0]
        raise RegistryUnavailable(f"the blob store cannot be used: {reason}") from exc


def _allows_http() -> bool:
    """The one AWS_ variable that the library does not read by itself."""
    return os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_blobs(url: str | None, folder: Path, *, shared: bool) -> Blobs:
    """The place that `url` names; without one the folder, or the database where it is shared."""
    if url is not None:
        return Bucket(url)
    return InDatabase() if shared else Folder(folder)
