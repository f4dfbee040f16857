"""One live server for the tests that leave it as they found it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import LiveServer, serving, settings_for, write_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone and an inventory of three tasks."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder


@pytest.fixture(scope="session")
def live(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that many tests share: whoever adds a task removes it again."""
    data_dir = tmp_path_factory.mktemp("registry")
    with serving(settings_for(model_folder, data_dir, max_body_bytes=200_000)) as server:
        yield server
