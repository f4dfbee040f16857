"""Reading and writing safetensors whose bytes may come from a stranger."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

MAX_HEADER_BYTES = 1 << 20
"""A routing's header is under 200 bytes; a private adapter's under 100 kB."""


def read_header(data: bytes) -> dict[str, object]:
    """The JSON header of safetensors `data`, checked against the bytes that are really there.

    Raises `ValueError` on truncation and on a header longer than `MAX_HEADER_BYTES`, before
    anything is allocated for it.
    """
    if len(data) < 8:
        raise ValueError(f"truncated safetensors: {len(data)} bytes, expected at least 8")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise ValueError(
            f"safetensors header claims {length} bytes, at most {MAX_HEADER_BYTES} are accepted"
        )
    if length > len(data) - 8:
        raise ValueError(
            f"truncated safetensors: the header claims {length} bytes, {len(data) - 8} are there"
        )
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError) as exc:
        raise ValueError("the safetensors header is not JSON") from exc
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is not a JSON object")
    return header


def parse_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of safetensors `data`. Raises `ValueError` with the reason."""
    header = read_header(data)
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError("the safetensors metadata is not a JSON object")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as exc:
        raise ValueError(f"not a valid safetensors file: {exc}") from exc
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def dump_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """`tensors` as safetensors bytes."""
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return save(whole, dict(metadata))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a local file, memory-mapped. Raises `ValueError` that names the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise ValueError(f"{path}: {exc}") from exc


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `path` as safetensors, whole or not at all.

    Never in place: tensors that `read_tensors` mapped from the same file may be among them.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    unfinished = path.with_name(path.name + ".part")
    save_file(whole, unfinished, dict(metadata))
    unfinished.replace(path)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The raw bytes of `tensor`, in row-major order, of any dtype."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
