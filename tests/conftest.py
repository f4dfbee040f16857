"""What holds for every test, and one live server for the tests that leave it as they found it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from postgres_server import PostgresServer, find_programs, postgres_server

if TYPE_CHECKING:
    from live_server import LiveServer

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is first imported
os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported, by torch or by a test
os.environ["GOMP_SPINCOUNT"] = "0"  # tests share their cores: no thread spins while it waits


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and an inventory of three tasks."""
    from live_server import write_model  # torch is slow to import, and not every test needs it

    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def live(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator["LiveServer"]:
    """A server that many tests share: whoever adds a task removes it again."""
    from live_server import serving, settings_for

    data_dir = tmp_path_factory.mktemp("registry")
    with serving(settings_for(model_folder, data_dir, max_body_bytes=200_000)) as server:
        yield server


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """A real PostgreSQL, fresh for this run of the tests."""
    programs = find_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed: initdb is neither on the PATH nor Debian's")
    with postgres_server(programs) as server:
        yield server
