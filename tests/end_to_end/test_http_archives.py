"""PEFT folders as archives over a real server: served as PEFT answers, and what is refused."""

import copy
import gzip
import io
import json
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from factories import tiny_model
from live_server import CONTEXT, TASKS, LiveServer
from peft import LoraConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Files = dict[str, bytes]


@pytest.fixture
def fresh(live: LiveServer) -> Iterator[LiveServer]:
    yield live
    for task in live.client.get("/tasks").json()["tasks"]:
        if task["id"] not in TASKS:
            live.client.delete(f"/tasks/{task['id']}")


def lora(seed: int) -> PeftModel:
    model = tiny_model(max_position_embeddings=CONTEXT)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj", "down_proj"],
        r=3,
        rank_pattern={"v_proj": 5},
        alpha_pattern={"down_proj": 2},
        use_rslora=True,
    )
    wrapped = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return wrapped.eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[PeftModel, Files]]:
    made = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("lora")
        model = lora(seed)
        model.save_pretrained(folder)
        made.append((model, {p.name: p.read_bytes() for p in folder.iterdir()}))
    return made


@pytest.fixture(scope="module")
def files(folders: list[tuple[PeftModel, Files]]) -> Files:
    return folders[0][1]


def tarred(files: Files, mode: str = "w", prefix: str = "", *extra: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()


def zipped(files: Files, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(prefix + name, data)
    return out.getvalue()


FORMS: dict[str, Callable[[Files], bytes]] = {
    "tar": tarred,
    "tar.gz": lambda files: tarred(files, "w:gz", "./adapter/"),
    "zip": lambda files: zipped(files, "my lora/v1/"),
    "zip, stored": lambda files: zipped(files, compression=zipfile.ZIP_STORED),
}


def send(live: LiveServer, archive: bytes, id: str = "own", method: str = "POST") -> httpx.Response:
    parts = {"task": (None, json.dumps({"id": id})), "private_adapter": ("a", archive)}
    path = "/tasks" if method == "POST" else f"/tasks/{id}"
    return live.client.request(method, path, files=parts)


def greedy(model: PeftModel, prompt: str, count: int) -> list[int]:
    ids = torch.tensor([list(prompt.encode())])
    with torch.no_grad():
        for _ in range(count):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    found: list[int] = ids[0, len(prompt) :].tolist()
    return found


@pytest.mark.parametrize("form", FORMS)
def test_an_archived_folder_answers_as_in_peft(
    fresh: LiveServer, folders: list[tuple[PeftModel, Files]], form: str
) -> None:
    for number, (_, held) in enumerate(folders):
        answer = send(fresh, FORMS[form](held), f"own-{number}")
        assert (answer.status_code, answer.json()["kind"]) == (201, "private"), answer.text
    asked: dict[str, Any] = {"max_tokens": 12, "return_token_ids": True}
    found = [fresh.generate(task=f"own-{i}", **asked)["choices"][0]["token_ids"] for i in range(2)]
    wanted = [greedy(model, "hello", 12) for model, _ in folders]
    assert found == wanted
    assert wanted[0] != wanted[1]


def test_put_takes_an_archive_too(
    fresh: LiveServer, folders: list[tuple[PeftModel, Files]]
) -> None:
    first = send(fresh, tarred(folders[0][1])).json()
    second = send(fresh, zipped(folders[1][1]), method="PUT")
    assert second.status_code == 200
    assert second.json()["generation"] != first["generation"]


def special(kind: bytes, name: str = "x", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def named(name: str, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = size
    return info


def zip_with(files: Files, name: str, mode: int = 0, data: bytes = b"x") -> bytes:
    out = io.BytesIO(zipped(files))
    with zipfile.ZipFile(out, "a") as archive:
        entry = zipfile.ZipInfo(name)
        entry.external_attr = mode << 16
        archive.writestr(entry, data)
    return out.getvalue()


def lying_zip(files: Files) -> bytes:
    """Its directory states 1 byte for the weights; they unpack to 100 MB."""
    whole = bytearray(zipped({**files, WEIGHTS: bytes(100_000_000)}))
    size = (100_000_000).to_bytes(4, "little")
    assert whole.count(size) == 2
    return bytes(whole.replace(size, (1).to_bytes(4, "little")))


def long_header() -> bytes:
    """A header that claims 8 GB of attributes, before anything else."""
    info = tarfile.TarInfo("h")
    info.type, info.size = tarfile.XHDTYPE, (1 << 33) - 1
    return gzip.compress(info.tobuf() + bytes(90_000_000), 9)


REFUSED: dict[str, tuple[Callable[[Files], bytes], int, str]] = {
    "nothing": (lambda _: b"", 422, "invalid_archive"),
    "no archive": (lambda files: files[WEIGHTS], 422, "invalid_archive"),
    "a pickle": (lambda _: b"\x80\x04\x95" + bytes(900), 422, "invalid_archive"),
    "half a zip": (lambda files: zipped(files)[:-200], 422, "invalid_archive"),
    "half a tar": (lambda files: tarred(files)[:3000], 422, "invalid_archive"),
    "half a gzip": (lambda files: tarred(files, "w:gz")[:3000], 422, "invalid_archive"),
    "another compression": (lambda files: tarred(files, "w:xz"), 422, "invalid_archive"),
    "lzma in a zip": (
        lambda files: zipped(files, compression=zipfile.ZIP_LZMA), 422, "invalid_archive"
    ),
    "no weights": (lambda files: tarred({CONFIG: files[CONFIG]}), 422, "invalid_archive"),
    "a pickle for weights": (
        lambda files: zipped({CONFIG: files[CONFIG], "adapter_model.bin": b"x"}),
        422, "invalid_archive",
    ),
    "two folders": (
        lambda files: zipped({f"{d}/{n}": f for d in "ab" for n, f in files.items()}),
        422, "invalid_archive",
    ),
    "split over folders": (
        lambda files: zipped({f"{n[-4:]}/{n}": f for n, f in files.items()}),
        422, "invalid_archive",
    ),
    "an absolute path": (lambda files: tarred(files, "w", "/tmp/"), 422, "invalid_archive"),
    "an absolute path, zip": (lambda files: zipped(files, "/"), 422, "invalid_archive"),
    "a path outside": (lambda files: tarred(files, "w", "a/../../"), 422, "invalid_archive"),
    "a path outside, zip": (lambda files: zipped(files, "../"), 422, "invalid_archive"),
    "a path of Windows": (lambda files: zip_with(files, "C:\\x"), 422, "invalid_archive"),
    "a NUL in a name": (
        lambda files: zip_with(files, "a%b").replace(b"a%b", b"a\0b"), 422, "invalid_archive"
    ),
    "a symbolic link": (
        lambda files: tarred(files, "w", "", special(tarfile.SYMTYPE)), 422, "invalid_archive"
    ),
    "a hard link": (
        lambda files: tarred(files, "w", "", special(tarfile.LNKTYPE)), 422, "invalid_archive"
    ),
    "the weights as a link": (
        lambda files: tarred({CONFIG: files[CONFIG]}, "w", "", special(tarfile.SYMTYPE, WEIGHTS)),
        422, "invalid_archive",
    ),
    "a device": (
        lambda files: tarred(files, "w", "", special(tarfile.CHRTYPE)), 422, "invalid_archive"
    ),
    "a block device": (
        lambda files: tarred(files, "w", "", special(tarfile.BLKTYPE)), 422, "invalid_archive"
    ),
    "a pipe": (
        lambda files: tarred(files, "w", "", special(tarfile.FIFOTYPE)), 422, "invalid_archive"
    ),
    "a sparse file": (
        lambda files: tarred(files, "w", "", special(tarfile.GNUTYPE_SPARSE)),
        422, "invalid_archive",
    ),
    "a symbolic link, zip": (
        lambda files: zip_with(files, "x", stat.S_IFLNK | 0o777), 422, "invalid_archive"
    ),
    "a device, zip": (
        lambda files: zip_with(files, "x", stat.S_IFCHR | 0o600), 422, "invalid_archive"
    ),
    "a name twice": (
        lambda files: tarred(files, "w", "", named(CONFIG)), 422, "invalid_archive"
    ),
    "many members": (
        lambda files: tarred(files | {f"n{i}": b"" for i in range(64)}), 413, "archive_too_large"
    ),
    "many members, zip": (
        lambda files: zipped(files | {f"n{i}": b"" for i in range(64)}), 413, "archive_too_large"
    ),
    "a directory of thousands": (
        lambda _: zipped({f"n{i}": b"" for i in range(1100)}), 413, "archive_too_large"
    ),
    "a zip bomb": (
        lambda files: zipped({**files, "bomb": bytes(70_000_000)}), 413, "archive_too_large"
    ),
    "a gzip bomb": (
        lambda files: tarred({**files, "bomb": bytes(70_000_000)}, "w:gz"),
        413, "archive_too_large",
    ),
    "a zip that lies": (lying_zip, 422, "invalid_archive"),
    "a header of gigabytes": (lambda _: long_header(), 413, "archive_too_large"),
    "a configuration that is not read": (
        lambda files: tarred({**files, CONFIG: b'{"peft_type": "LORA", "use_dora": true}'}),
        422, "invalid_private_adapter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(live: LiveServer, files: Files, case: str) -> None:
    make, status, code = REFUSED[case]
    archive = make({CONFIG: files[CONFIG], WEIGHTS: files[WEIGHTS]})
    answer = send(live, archive, "refused")
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert live.client.get("/tasks/refused").status_code == 404
