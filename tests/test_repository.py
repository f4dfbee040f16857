"""What the repository promises about itself: packages, commands, documents and sizes."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from polyhead.server.config import Settings

ROOT = Path(__file__).parents[1]
SOURCES = ("adapters", "clients", "server")
MAX_TRACKED_BYTES = 20 << 20
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules(package: Path) -> list[str]:
    return sorted(p.stem for p in package.glob("*.py") if p.stem != "__init__")


def packages() -> list[Path]:
    return sorted(init.parent for name in SOURCES for init in (ROOT / name).rglob("__init__.py"))


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.split("\0") if name]


def test_every_package_is_installed() -> None:
    found = ["polyhead." + ".".join(p.relative_to(ROOT).parts) for p in packages()]
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(found)


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {path.parent for name in SOURCES for path in (ROOT / name).rglob("*.py")}
    assert sorted(folders) == packages()


def test_the_architecture_page_names_every_module() -> None:
    page = ROOT / "docs" / "architecture.md"
    if not page.exists():
        pytest.skip("docs/architecture.md is not written yet")
    text = page.read_text()
    missing = [
        f"{package.relative_to(ROOT)}/{module}.py"
        for package in packages()
        for module in modules(package)
        if not re.search(rf"\b{module}\b", text)
    ]
    assert missing == []


def test_no_large_file_is_tracked() -> None:
    sizes = {path: path.lstat().st_size for path in tracked_files() if path.is_file()}
    assert sizes
    assert {path for path, size in sizes.items() if size > MAX_TRACKED_BYTES} == set()


def test_readme_commands_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", readme))
    assert {"serve", "test"} <= named
    assert named <= make_targets()


def test_readme_flags_exist() -> None:
    commands = re.findall(r"polyhead serve ([^`\n]+)", (ROOT / "README.md").read_text())
    named = {flag for command in commands for flag in re.findall(r"--([a-z-]+)", command)}
    settings = {name.replace("_", "-") for name in Settings.model_fields}
    assert "backbone" in named
    assert named <= settings | {"help", "print-config"}


def test_the_changelog_knows_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{PROJECT['project']['version']}]" in text


def test_licence_is_the_one_declared() -> None:
    assert PROJECT["project"]["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
