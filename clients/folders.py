"""A PEFT LoRA's folder as one archive, to send and to receive."""

import io
import tarfile
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""All that the server reads and writes."""


def packed(folder: Path) -> bytes:
    """A tar file of the two files. Raises `OSError` where one is missing."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in FILES:
            data = (folder / name).read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def unpacked(archive: bytes) -> dict[str, bytes]:
    """The two files of a tar file, by name. Raises `ValueError` where one is missing."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if member.name in FILES and content is not None:
                found[member.name] = content.read()
    if len(found) < len(FILES):
        raise ValueError(f"expected {' and '.join(FILES)}, found {sorted(found)}")
    return found
