"""Where private adapters lie: a folder, an S3-compatible store, PostgreSQL."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from ports import free_port

from polyhead.adapters.private import PrivateAdapter
from polyhead.server.tasks import blobs
from polyhead.server.tasks.blobs import Blobs, Bucket, Folder
from polyhead.server.tasks.errors import RegistryUnavailable, UnsupportedStore
from polyhead.server.tasks.registry import Registry

Open = Callable[..., Registry]
NAMES = ("aa" * 32, "ab" * 32)
KEYS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The endpoint of a running S3 look-alike with the bucket `adapters`."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    endpoint = f"http://127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env={**os.environ, **KEYS}, **quiet) as process:
        try:
            end = time.monotonic() + 60
            while True:
                with contextlib.suppress(httpx.TransportError):
                    httpx.put(f"{endpoint}/adapters", trust_env=False).raise_for_status()
                    break
                assert time.monotonic() < end
                time.sleep(0.1)
            yield endpoint
        finally:
            process.kill()


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty place in it."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": s3, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    return f"s3://adapters/{time.monotonic_ns()}"


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    if request.param == "folder":
        return Folder(tmp_path / "blobs")
    return Bucket(request.getfixturevalue("bucket"))


def test_what_is_put_comes_back(place: Blobs) -> None:
    for name in NAMES:
        assert place.put(name, name.encode() * 1000)
        assert place.put(name, name.encode() * 1000)
    assert [place.get(name) for name in NAMES] == [name.encode() * 1000 for name in NAMES]
    with pytest.raises(RegistryUnavailable):
        place.get("f" * 64)


def test_only_what_is_old_and_unused_is_swept(
    place: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place.sweep(set()) == 0
    for name in NAMES:
        place.put(name, b"x")
    assert place.sweep({NAMES[0]}) == 0  # too new
    monkeypatch.setattr(blobs, "GRACE_SECONDS", -60.0)
    assert place.sweep({NAMES[0]}) == 1
    assert place.get(NAMES[0]) == b"x"
    with pytest.raises(RegistryUnavailable):
        place.get(NAMES[1])


def test_other_stores_are_refused(open_registry: Open) -> None:
    with pytest.raises(UnsupportedStore, match="expected s3://bucket/prefix"):
        open_registry(blob_store="file:///etc")


def test_private_adapters_lie_beside_sqlite_and_inside_of_postgresql(
    open_registry: Open, private: PrivateAdapter, tmp_path: Path, database_url: str | None
) -> None:
    registry = open_registry()
    registry.create("t", private)
    files = [path.name for path in (tmp_path / "data").glob("blobs/*/*")]
    assert files == ([] if database_url else [f"{private.fingerprint}.safetensors"])
    assert registry.content_bytes("t") == private.to_safetensors()


def test_every_replica_reads_what_one_put_into_the_bucket(
    open_registry: Open, private: PrivateAdapter, bucket: str
) -> None:
    one, other = (open_registry(blob_store=bucket) for _ in range(2))
    one.create("t", private)
    found = other.load("t")[1]
    assert isinstance(found, PrivateAdapter)
    assert all(torch.equal(found.a[name], private.a[name]) for name in private.a)
    one.delete("t")
    assert other.restore("t").id == "t"
    assert other.content_bytes("t") == private.to_safetensors()
    with pytest.raises(RegistryUnavailable):
        open_registry(blob_store=f"{bucket}-elsewhere").load("t")
