"""No tensor, body or template of a client crashes, hangs or fills the memory: see `inputs`."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
from base64 import b64encode
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    find_spec("atheris") is None, reason="atheris has no build for this platform"
)

RUNS = os.environ.get("TEST_FUZZ_RUNS", "4000")
HANG_SECONDS = 10
MOST_MEBIBYTES = 1536
"""Torch and its libraries take a third of it before the first run."""
HERE = Path(__file__).parent
SHAPES = {"logits": [2, 2, 3], "weights": [2, 2, 3]}


def file(tensors: dict[str, list[int]], metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file of float32 zeros."""
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name, shape in tensors.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def archive(form: str) -> bytes:
    """The files a and b in a folder."""
    out = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name in ("x/a", "x/b"):
                zipped.writestr(name, bytes(100))
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w:gz" if form == "tar.gz" else "w") as tar:
        for name in ("x/a", "x/b"):
            info = tarfile.TarInfo(name)
            info.size = 100
            tar.addfile(info, io.BytesIO(bytes(100)))
    return out.getvalue()[:4096]


SEEDS = [
    b"\0" + file({"logits": [2, 2, 3]}),
    b"\0" + file({"logits": [2, 3]}, {"granularity": "model"}),
    b"\0" + file({"weights": [2, 2, 3]}, {"granularity": "block"}),
    b"\1" + file({"a.A": [4, 2], "a.B": [2, 6]}),
    b"\2" + b64encode(file({"logits": [2, 2, 3]})),
    b"\3[[[0, 1e9, -1], [1, 2, 3]], [[1, 2, 3], [1, 2, 3]]]",
    b'\4{"task": "a", "prompt": "x", "stop": ["y"], "mixture": {"a": 1}}',
    b'\4{"id": "a", "examples": [{"input": "x", "output": "y"}], "metadata": {"k": 1}} ',
    b"\5a {input} b {{input}} {0.x} {% if %}\0value {input}",
    b"\6" + archive("tar"),
    b"\6" + archive("tar.gz"),
    b"\6" + archive("zip"),
    b'\7{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"a": 1}}\0\0\0\0'
    + file({f"base_model.model.a.lora_{x}.weight": [2, 4] if x == "A" else [6, 2] for x in "AB"}),
]


def fuzz(folder: Path, script: Path, runs: str = RUNS) -> subprocess.CompletedProcess[str]:
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed)
    flags = [f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MOST_MEBIBYTES}", "-max_len=8192"]
    flags += [f"-runs={runs}", "-seed=1", f"-artifact_prefix={folder}/"]
    command = [sys.executable, str(script), str(corpus), *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_input_breaks_what_reads_it(tmp_path: Path) -> None:
    done = fuzz(tmp_path, HERE / "inputs.py")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    found = re.findall(r"#(\d+)\s+DONE\s+cov: (\d+)", done.stderr)
    assert found, done.stderr[-2000:]
    runs, edges = map(int, found[-1])
    assert runs >= int(RUNS)
    assert edges > 100, "the code under test is not instrumented"
    print(f"{runs} runs, {edges} edges")


BROKEN = """
import sys, atheris
@atheris.instrument_func
def one(data):
    if data[:1] == b"\\5":
        {fault}
atheris.Setup(sys.argv, one)
atheris.Fuzz()
"""


@pytest.mark.parametrize(
    "fault", ["raise KeyError(1)", "x = b'x' * (2 << 30); __import__('time').sleep(3)"]
)
def test_a_fault_would_be_noticed(tmp_path: Path, fault: str) -> None:
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(fault=fault))
    assert fuzz(tmp_path, script, "100").returncode != 0
