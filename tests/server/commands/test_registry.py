"""`polyhead tasks export` and `import`: from one folder to another."""

import json
from pathlib import Path

import pytest
from live_server import write_model
from typer.testing import CliRunner

from polyhead.adapters.inventory import Inventory
from polyhead.server.cli import app
from polyhead.server.tasks.registry import Registry

runner = CliRunner()


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_model(folder)
    return folder / "inventory"


def filled(inventory: Path, data: Path) -> None:
    loaded = Inventory.load(inventory)
    registry = Registry(data, loaded.fingerprint, loaded.layout)
    registry.seed(loaded)
    registry.close()


def test_an_export_is_imported_elsewhere_and_again(inventory: Path, tmp_path: Path) -> None:
    filled(inventory, tmp_path / "one")
    file = tmp_path / "tasks.tar"

    def run(command: str, data: str, *more: str) -> str:
        where = ["--inventory", str(inventory), "--data-dir", str(tmp_path / data)]
        done = runner.invoke(app, ["tasks", command, str(file), *where, *more])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    assert run("export", "one") == f"{file}: 3 tasks\n"
    whole = file.read_bytes()
    counts = {"created": 3, "replaced": 0, "unchanged": 0}
    assert json.loads(run("import", "two", "--json")) == counts
    assert run("import", "two") == f"{file}: 0 created, 0 replaced, 3 unchanged\n"
    assert json.loads(run("export", "two", "--json")) == {"tasks": 3}
    assert file.read_bytes() == whole


def test_what_is_wrong_is_told_in_one_line(inventory: Path, tmp_path: Path) -> None:
    filled(inventory, tmp_path / "data")
    file = tmp_path / "tasks.tar"
    file.write_bytes(b"nothing of the kind" * 100)
    where = ["--inventory", str(inventory), "--data-dir", str(tmp_path / "data")]
    done = runner.invoke(app, ["tasks", "import", str(file), *where])
    assert done.exit_code == 1
    assert done.stderr.startswith("error: not a whole tar file")
    assert len(done.stderr.splitlines()) == 1
    missing = runner.invoke(app, ["tasks", "import", str(tmp_path / "none"), *where])
    assert (missing.exit_code, "none" in missing.stderr) == (1, True)
