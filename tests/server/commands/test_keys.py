"""`polyhead keys` writes what a server reads, and never a key."""

import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from polyhead.server.commands.keys import keys_app
from polyhead.server.http.keys import KeyRing, hash_of

runner = CliRunner()


def run(*arguments: str, status: int = 0) -> str:
    done = runner.invoke(keys_app, arguments)
    assert done.exit_code == status, done.output
    return done.output


@pytest.mark.parametrize("name", ["keys.toml", "keys.json"])
def test_a_new_key_opens_and_a_revoked_one_does_not(tmp_path: Path, name: str) -> None:
    file = str(tmp_path / name)
    key = run("new", "one", "--file", file, "--scope", "generate", "--scope", "tasks").strip()
    limited = ("--requests-per-minute", "60", "--task-prefix", "acme-", "--json")
    other = json.loads(run("new", "two", "--file", file, "--scope", "tasks", *limited))["key"]
    ring = KeyRing(tmp_path / name)
    assert (first := ring.find(key)) is not None
    assert first.scopes == ["generate", "tasks"]
    assert (second := ring.find(other)) is not None
    assert (second.requests_per_minute, second.task_prefix) == (60, "acme-")
    run("revoke", "one", "--file", file)
    ring.refresh()
    assert ring.find(key) is None
    assert ring.find(other) is not None


def test_the_list_shows_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    key = run("new", "one", "--file", str(file), "--scope", "generate").strip()
    for flags in ([], ["--json"]):
        shown = run("list", "--file", str(file), *flags)
        assert "one" in shown
        assert key not in shown
        assert hash_of(key).partition(":")[2] not in shown
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_comments_of_toml_stay(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'# ours\n[[keys]]\nid = "one"\nhash = "{hash_of("k")}"\nscopes = ["tasks"]\n')
    run("new", "two", "--file", str(file), "--scope", "tasks")
    run("revoke", "two", "--file", str(file))
    assert "# ours" in file.read_text()
    assert [key["id"] for key in tomllib.loads(file.read_text())["keys"]] == ["one"]


def test_what_cannot_be_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    run("new", "one", "--file", str(file), "--scope", "tasks")
    before = file.read_bytes()
    assert "twice" in run("new", "one", "--file", str(file), "--scope", "tasks", status=2)
    assert "scopes" in run("new", "two", "--file", str(file), "--scope", "root", status=2)
    assert "no key" in run("revoke", "two", "--file", str(file), status=1)
    assert file.read_bytes() == before
    file.write_text("[")
    assert "keys.toml" in run("new", "two", "--file", str(file), "--scope", "tasks", status=1)
    assert file.read_text() == "["
