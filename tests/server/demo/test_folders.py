"""A folder is there and whole, or it is not there."""

from pathlib import Path

import pytest

from polyhead.server.demo.folders import is_made_from, replaced

RECIPE: dict[str, str | int] = {"thing": "a", "version": 1}


def test_a_finished_folder_knows_what_it_was_made_from(tmp_path: Path) -> None:
    with replaced(tmp_path / "out", RECIPE) as fresh:
        (fresh / "file").write_text("one")
        assert not (tmp_path / "out").exists()
    assert is_made_from(tmp_path / "out", RECIPE)
    assert not is_made_from(tmp_path / "out", {**RECIPE, "version": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    with replaced(tmp_path / "out", RECIPE) as fresh:
        (fresh / "old").write_text("one")
    with replaced(tmp_path / "out", {**RECIPE, "version": 2}) as fresh:
        (fresh / "new").write_text("two")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "new",
        "polyhead-demo.json",
    ]


def test_an_interrupted_folder_leaves_the_older_one_alone(tmp_path: Path) -> None:
    with replaced(tmp_path / "out", RECIPE) as fresh:
        (fresh / "file").write_text("one")
    with pytest.raises(KeyboardInterrupt):
        _stop_halfway(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "one"
    assert is_made_from(tmp_path / "out", RECIPE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _stop_halfway(folder: Path) -> None:
    with replaced(folder, {**RECIPE, "version": 2}) as fresh:
        (fresh / "file").write_text("half")
        raise KeyboardInterrupt


def test_files_can_be_read_by_another_user(tmp_path: Path) -> None:
    with replaced(tmp_path / "out", RECIPE) as fresh:
        (fresh / "file").write_text("one")
        (fresh / "file").chmod(0o600)
    assert (tmp_path / "out" / "file").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "out").stat().st_mode & 0o055 == 0o055
