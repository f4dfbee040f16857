"""The keys file: what it may say, how it is followed, and that it holds no secret."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from polyhead.server.config import Settings
from polyhead.server.http.keys import KeyRing, KeysFileError, hash_of, new_key, read_keys

KEY = new_key()
NEEDED = {"backbone": "b", "inventory": "i", "data_dir": "d"}


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "one", "hash": hash_of(KEY), "scopes": ["generate"]} | changes


def write(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"keys": list(entries)}))
    return path


def test_keys_are_random_and_long() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("polyhead_") and len(key) >= 9 + 43 for key in made)


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    toml = tmp_path / "keys.toml"
    toml.write_text(
        f'[[keys]]\nid = "one"\nhash = "{hash_of(KEY)}"\nscopes = ["generate", "tasks"]\n'
        'requests_per_minute = 60\ntask_prefix = "acme-"\n'
    )
    same = entry(scopes=["generate", "tasks"], requests_per_minute=60, task_prefix="acme-")
    assert read_keys(toml) == read_keys(write(tmp_path / "keys.json", same))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"hash": KEY}, "keys.0.hash"),
        ({"scopes": []}, "keys.0.scopes"),
        ({"scopes": ["root"]}, "keys.0.scopes.0"),
        ({"id": "a b"}, "keys.0.id"),
        ({"requests_per_minute": 0}, "keys.0.requests_per_minute"),
        ({"max_concurrent": 0}, "keys.0.max_concurrent"),
        ({"tokens_per_minute": float("inf")}, "keys.0.tokens_per_minute"),
        ({"task_prefix": ""}, "keys.0.task_prefix"),
        ({"task_prefix": "a%"}, "keys.0.task_prefix"),
        ({"key": KEY}, "keys.0.key"),
        ({"scopes": ["admin"], "task_prefix": "a"}, "admin"),
    ],
)
def test_a_wrong_entry_is_named_without_its_value(
    tmp_path: Path, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(KeysFileError, match=r"keys\.json") as caught:
        read_keys(write(tmp_path / "keys.json", entry(**wrong)))
    assert named in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("twice", [{"id": "two"}, {"hash": hash_of("other")}])
def test_ids_and_hashes_are_unique(tmp_path: Path, twice: dict[str, Any]) -> None:
    with pytest.raises(KeysFileError, match="twice"):
        read_keys(write(tmp_path / "keys.json", entry(), entry(**twice)))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "[" * 100_000, "\ud800".encode("utf-8", "replace").decode()]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(KeysFileError, match=r"keys\.json"):
        KeyRing(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeysFileError, match=r"no\.toml"):
        KeyRing(tmp_path / "no.toml")


def test_only_the_whole_key_is_known(tmp_path: Path) -> None:
    ring = KeyRing(write(tmp_path / "keys.json", entry()))
    assert (found := ring.find(KEY)) is not None
    assert found.id == "one"
    for other in ("", KEY[:-1], KEY + "x", KEY.swapcase(), hash_of(KEY), "\ud800", new_key()):
        assert ring.find(other) is None


def test_a_changed_file_is_followed(tmp_path: Path) -> None:
    path, other = write(tmp_path / "keys.json", entry()), new_key()
    ring = KeyRing(path)
    write(path, entry(id="two", hash=hash_of(other)))
    assert ring.find(other) is None, "before it is looked at again"
    ring.refresh()
    assert ring.find(KEY) is None
    assert ring.find(other) is not None


@pytest.mark.parametrize("broken", ["{", '{"keys": [{"id": "x"}]}', None])
def test_a_broken_file_changes_nothing_and_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str | None
) -> None:
    path = write(tmp_path / "keys.json", entry())
    ring = KeyRing(path)
    if broken is None:
        path.unlink()
    else:
        path.write_text(broken)
    with caplog.at_level(logging.INFO):
        ring.refresh()
        ring.refresh()
    assert ring.find(KEY) is not None
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    write(path, entry(scopes=["tasks", "generate"]))
    ring.refresh()
    assert (found := ring.find(KEY)) is not None
    assert "tasks" in found.scopes


def test_neither_key_nor_hash_is_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", entry())
    found = KeyRing(path).find(KEY)
    assert KEY not in repr(found)
    assert hash_of(KEY) not in repr(found)
    assert KEY not in path.read_text()


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a/b", "", "null"])
def test_an_origin_that_no_browser_sends_is_refused(origin: str) -> None:
    with pytest.raises(ValidationError, match="cors_origin"):
        Settings.model_validate(NEEDED | {"cors_origin": [origin]})
    good = ["*", "https://a.example", "http://localhost:3000"]
    assert Settings.model_validate(NEEDED | {"cors_origin": good}).cors_origin == good
