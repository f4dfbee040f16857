"""The tutorial's blocks do, on the demo, what stands under them."""

import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from ports import free_port

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.M | re.S)
BLOCKS = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text())
ADDRESS = "127.0.0.1:8000"


@dataclass(frozen=True)
class Reader:
    """Someone who follows the tutorial: a folder, a terminal, a Python session."""

    folder: Path
    address: str
    names: dict[str, Any]

    def does(self, language: str, block: str) -> str:
        code = block.replace(ADDRESS, self.address)
        return self._python(code) if language == "python" else self._shell(code)

    def _python(self, code: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, self.names)
        return printed.getvalue()

    def _shell(self, code: str) -> str:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "POLYHEAD_URL": f"http://{self.address}",
            "COLUMNS": "120",
        }
        command = ["bash", "-euo", "pipefail", "-c", code]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """With the server of the first block running: on a free port, and a registry of its own."""
    if not (DATA / "inventory" / "inventory.json").exists():
        pytest.fail(f"{DATA} is not prepared: run `make setup` first")
    language, command, _ = BLOCKS[0]
    assert (language, command) == ("sh", "make serve\n")
    for name in ("SmolLM2-135M-Instruct", "inventory"):
        (tmp_path / name).symlink_to(DATA / name)
    port = free_port()
    # The set-up is what these tests run in already.
    make = [*command.split(), "--old-file=setup", f"PORT={port}", f"DATA={tmp_path}"]
    with subprocess.Popen(make, cwd=ROOT, start_new_session=True) as process:
        try:
            address = f"127.0.0.1:{port}"
            wait_until_ready(address, process)
            yield Reader(tmp_path, address, {})
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(address: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while True:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"http://{address}/health/ready", trust_env=False).status_code == 200:
                return
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)


def pattern(shown: str) -> str:
    """What is shown as an expression: `…` is anything, and so are blanks at a line's end."""
    lines = [re.escape(line.rstrip()).replace("…", ".*") for line in shown.splitlines()]
    return " *\n".join(lines) + r"\s*"


def test_every_block_prints_what_stands_under_it(reader: Reader) -> None:
    for language, block, shown in BLOCKS[1:]:
        printed = reader.does(language, block)
        assert re.fullmatch(pattern(shown), printed), f"{block}\nprinted {printed}"


def test_it_would_notice_another_output() -> None:
    shown = "a … c\nlast"
    assert re.fullmatch(pattern(shown), "a b c  \nlast\n")
    for other in ("a b d\nlast\n", "a b c\n", "a b c\nlast\nmore\n", ""):
        assert not re.fullmatch(pattern(shown), other)


def test_no_block_is_left_out() -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    shown = sum(bool(output) for _, _, output in BLOCKS)
    assert len(re.findall(r"^```\w+$", text, re.M)) == len(BLOCKS) + shown
    assert len(BLOCKS) > 10
    assert {language for language, _, _ in BLOCKS} == {"sh", "python"}
