"""`polyhead scale`: what is wrong is told at once; a cluster of one answers and drains."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from ports import free_port
from server_process import wait_until_ready

COMMAND = [sys.executable, "-c", "from polyhead.server.cli import app; app()", "scale"]


def flags(folder: Path, data_dir: Path) -> list[str]:
    paths = {"backbone": folder / "backbone", "inventory": folder / "inventory"}
    found = {**paths, "data-dir": data_dir, "dtype": "float32", "threads": 1}
    return [part for name, value in found.items() for part in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-replicas", "2"], "--database-url is needed with 2 replicas"),
        (["--min-replicas", "0"], "--min-replicas: "),
        (["--min-replicas", "3", "--max-replicas", "2"], "max_replicas is 2, expected at least"),
        (["--max-running", "0"], "--max-running: "),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, more: list[str], message: str) -> None:
    found = subprocess.run(
        [*COMMAND, *flags(tmp_path, tmp_path), *more], capture_output=True, text=True, timeout=60
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert message in found.stderr


def test_a_cluster_of_one_machine_answers_and_ends_in_good_order(
    model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install polyhead[scale]")
    port = free_port()
    command = [*COMMAND, *flags(model_folder, tmp_path), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        (tmp_path / "log").open("w") as log,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            wait_until_ready(client, process)
            body = {"task": "amber", "prompt": "hello", "max_tokens": 4}
            assert client.post("/generate", json=body).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
