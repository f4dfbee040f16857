import contextlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyhead.adapters.tensor_files import (
    MAX_HEADER_BYTES,
    dump_tensors,
    parse_tensors,
    read_tensors,
    tensor_bytes,
    write_tensors,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
TERABYTES = 1 << 42


def encoded(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor_header(dtype: str, shape: list[int], size: int) -> dict[str, object]:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 4), (2, 1, 5)])
def test_bytes_come_back_as_they_were(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) * 100).to(dtype)
    tensors, metadata = parse_tensors(dump_tensors({"x": tensor}, {"key": "value"}))
    assert tensors.keys() == {"x"}
    assert tensors["x"].dtype == dtype
    assert torch.equal(tensors["x"], tensor)
    assert metadata == {"key": "value"}


def test_views_are_written_as_they_look() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors, _ = parse_tensors(dump_tensors({"t": whole.T, "row": whole[1]}, {}))
    assert torch.equal(tensors["t"], whole.T)
    assert torch.equal(tensors["row"], whole[1])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"1234567", "truncated"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "at most"),
        (struct.pack("<Q", TERABYTES) + b"{}", "at most"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "at most"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "not JSON"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not JSON"),
        (encoded([]), "not a JSON object"),
        (encoded({"__metadata__": 3}), "metadata"),
        (encoded({"__metadata__": {"key": 1}}), "not a valid"),
        (encoded(tensor_header("F32", [3], 12), b"\0" * 8), "not a valid"),
        (encoded(tensor_header("F32", [3], 12), b"\0" * 16), "not a valid"),
        (encoded(tensor_header("F32", [TERABYTES], 4 * TERABYTES)), "not a valid"),
        (encoded(tensor_header("F32", [2**40, 2**40], 4), b"\0" * 4), "not a valid"),
        (encoded(tensor_header("F32", [-1], 4), b"\0" * 4), "not a valid"),
        (encoded(tensor_header("P8", [4], 4), b"\0" * 4), "not a valid"),
        (encoded(tensor_header("F4", [8], 4), b"\0" * 4), "not a valid"),
    ],
)
def test_what_is_no_safetensors_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_tensors(data)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_value_errors(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        parse_tensors(data)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_truncated_file_is_never_read(data: st.DataObject) -> None:
    whole = dump_tensors({"x": torch.ones(4, 4), "y": torch.ones(2)}, {"k": "v"})
    length = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError, match="safetensors"):
        parse_tensors(whole[:length])


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.randn(3, 2), "b": torch.randn(2).bfloat16()}
    write_tensors(path, tensors, {})
    found = read_tensors(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_can_be_rewritten_from_its_own_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.zeros(50_000), "b": torch.arange(50_000)}, {})
    found = read_tensors(path)
    write_tensors(path, {"b": found["b"]}, {})
    assert torch.equal(found["b"], torch.arange(50_000))
    assert torch.equal(read_tensors(path)["b"], torch.arange(50_000))


@pytest.mark.parametrize("data", [None, b"", b"1234567", struct.pack("<Q", TERABYTES) + b"{}"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, data: bytes | None) -> None:
    path = tmp_path / "broken.safetensors"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=r"broken\.safetensors"):
        read_tensors(path)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor(1.0), struct.pack("<f", 1.0)),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int16), struct.pack("<4h", 1, 2, 3, 4)),
        (torch.tensor([[1, 2], [3, 4]], dtype=torch.int16).T, struct.pack("<4h", 1, 3, 2, 4)),
        (torch.tensor([1.0], dtype=torch.bfloat16), b"\x80\x3f"),
        (torch.zeros(0), b""),
    ],
)
def test_raw_bytes_are_in_row_major_order(tensor: Tensor, expected: bytes) -> None:
    assert tensor_bytes(tensor) == expected
