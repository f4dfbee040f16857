"""A PEFT LoRA's folder as one archive to send."""

import io
import tarfile
from pathlib import Path

FILES = ("adapter_config.json", "adapter_model.safetensors")
"""All that the server reads."""


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
