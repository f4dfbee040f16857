"""What every converter needs: a foreign checkpoint's tensors, and the backbone's linear layers."""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inject import linear_shape
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.tensor_files import read_tensors


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises `ConversionError` that names the file."""
    try:
        found = json.loads(path.read_bytes())
    except OSError as exc:
        raise ConversionError(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise ConversionError(f"{path}: not JSON", found=str(exc)) from exc
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: not a JSON object", found=type(found).__name__)
    return found


def read_checkpoint(folder: Path, stem: str) -> dict[str, Tensor]:
    """Tensors of `<stem>.safetensors` in `folder`, else of `<stem>.bin`, by name, on the CPU.

    The pickle is read with `weights_only=True`, which builds tensors and plain containers and
    runs nothing. Raises `ConversionError` that names the file.
    """
    whole, pickled = folder / f"{stem}.safetensors", folder / f"{stem}.bin"
    if whole.exists():
        try:
            return read_tensors(whole)
        except ValueError as exc:
            raise ConversionError(str(exc)) from exc
    if not pickled.exists():
        raise ConversionError(f"{folder}: neither {whole.name} nor {pickled.name} is there")
    return _read_pickle(pickled)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as exc:
        raise ConversionError(f"{path}: not a checkpoint of tensors only", found=str(exc)) from exc
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: not a state dict", found=type(found).__name__)
    odd = [key for key, value in found.items() if not isinstance(value, Tensor)]
    if odd:
        raise ConversionError(f"{path}: entries that are not tensors", found=str(odd[:3]))
    return {str(key): value for key, value in found.items()}


def module_shape(name: str, module: nn.Module) -> ModuleShape:
    """Features of an adapted layer. Raises `ConversionError` when the layer is not linear."""
    shape = linear_shape(module)
    if shape is None:
        raise ConversionError(
            "the checkpoint adapts a layer that is not linear",
            field=name,
            found=type(module).__name__,
            expected="Linear or Conv1D",
        )
    return ModuleShape(name=name, in_features=shape[0], out_features=shape[1])
