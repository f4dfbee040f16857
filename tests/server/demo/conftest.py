from pathlib import Path

import pytest

DATA = Path(__file__).parents[3] / "data"


@pytest.fixture(scope="session")
def data() -> Path:
    """The data folder that `make setup` prepares."""
    if not (DATA / "inventory" / "inventory.json").exists():
        pytest.fail(f"{DATA} is not prepared: run `make setup` first")
    return DATA
