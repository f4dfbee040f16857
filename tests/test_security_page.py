"""The threat model names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", (TESTS.parent / "docs" / "security.md").read_text())


def test_every_test_that_it_names_exists() -> None:
    defined = {
        file: set(re.findall(r"^def (\w+)\(", (TESTS / file).read_text(), re.MULTILINE))
        for file, _ in NAMED
    }
    assert [f"{file}::{name}" for file, name in NAMED if name not in defined[file]] == []
    assert len(set(NAMED)) > 25


def test_every_threat_names_a_test() -> None:
    text = (TESTS.parent / "docs" / "security.md").read_text()
    tables = re.findall(r"^\| threat \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row for table in tables for row in table.splitlines()]
    assert len(rows) > 20
    assert [row for row in rows if "::test_" not in row] == []
