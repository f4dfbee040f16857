"""Virtual environments of tools that measure the server from outside, made once and kept."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks.serving import Served, serving

ROOT = Path(__file__).parents[1]


def environment(name: str, *requirements: str, without: Sequence[str] = ()) -> Path:
    """The folder of programs of `.venv/tools-<name>`, which holds `requirements` and no more.

    A tool's own requirements would otherwise decide about the server's. without: packages that it
    asks for and does not need.
    """
    folder = ROOT / ".venv" / f"tools-{name}"
    mark = folder / "requirements.json"
    if not mark.exists() or json.loads(mark.read_text()) != list(requirements):
        print(f"Installing {name} into {folder.relative_to(ROOT)}.", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile"]
        wanted = [*requirements]
        if without:
            wanted = ["--no-deps", *_resolved(pip, wanted, without)]
        subprocess.run([*pip, *wanted], check=True)
        mark.write_text(json.dumps(requirements))
    return folder / "bin"


def _resolved(pip: list[str], requirements: list[str], without: Sequence[str]) -> list[str]:
    """Everything that the requirements come to, but those packages."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        command = [*pip, "--dry-run", "--report", report.name, *requirements]
        subprocess.run(command, check=True)
        found = [item["metadata"] for item in json.load(report)["install"]]
    return [f"{own['name']}=={own['version']}" for own in found if own["name"] not in without]


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """What is served: by default the demo, as `make setup` prepared it."""
    data = ROOT / "data"
    parser.add_argument("--backbone", type=Path, default=data / "SmolLM2-135M-Instruct")
    parser.add_argument("--inventory", type=Path, default=data / "inventory")
    parser.add_argument("--task", default="british_to_american", help="Asked beside `base`")
    parser.add_argument("--threads", type=int, default=1, help="Compute threads of the server")


@contextmanager
def server_of(options: argparse.Namespace) -> Iterator[Served]:
    """A server with the options of `add_server_options` and a registry of its own."""
    with tempfile.TemporaryDirectory() as registry:
        paths = (options.backbone.resolve(), options.inventory.resolve(), Path(registry))
        with serving(*paths, "--threads", str(options.threads)) as served:
            yield served


def run_offline(command: list[str], folder: Path) -> None:
    """Run a tool in `folder`, told to stay offline. Ends the program if the tool fails."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    caches = {"HF_HOME": str(folder / "cache"), "NO_PROXY": "127.0.0.1"}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **offline, **caches}, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} ended with {done.returncode}")
