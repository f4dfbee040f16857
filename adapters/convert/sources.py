"""What every converter needs: a foreign checkpoint's tensors, and the backbone's linear layers."""

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.adapters.errors import ConversionError
from polyhead.adapters.inject import linear_shape
from polyhead.adapters.inventory import DTYPES, RESERVED_TASK, TASK_NAME, DtypeName, ModuleShape
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


def read_pickled_object(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle of tensors and plain containers, read with `weights_only=True`.

    Raises `ConversionError` that names the file.
    """
    try:
        found: object = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as exc:
        raise ConversionError(f"{path}: not a checkpoint of tensors only", found=str(exc)) from exc
    if not isinstance(found, dict):
        raise ConversionError(f"{path}: not a state dict", found=type(found).__name__)
    return found


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, of safetensors or a pickle of tensors, by name.

    Raises `ConversionError` that names the file.
    """
    if path.suffix != ".safetensors":
        return _read_pickle(path)
    try:
        return read_tensors(path)
    except ValueError as exc:
        raise ConversionError(str(exc)) from exc


def _read_pickle(path: Path) -> dict[str, Tensor]:
    return state_dict(path, read_pickled_object(path))


def state_dict(path: Path, found: Any) -> dict[str, Tensor]:
    """`found`, if it holds tensors by name alone. Raises `ConversionError` that names `path`."""
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


def named_tasks(count: int, names: Sequence[str] | None) -> list[str]:
    """`names` of `count` tasks, or `task-0` … where none are given.

    Raises `ConversionError` that names the first of them that cannot be a task's.
    """
    if names is None:
        return [f"task-{index}" for index in range(count)]
    if len(names) != count:
        raise ConversionError(
            "as many names as tasks are needed",
            field="names",
            found=str(len(names)),
            expected=str(count),
        )
    for index, name in enumerate(names):
        wrong = "" if TASK_NAME.fullmatch(name) else f"a match of {TASK_NAME.pattern}"
        wrong = "a name that is not reserved" if name == RESERVED_TASK else wrong
        wrong = "a name of its own" if name in names[:index] else wrong
        if wrong:
            raise ConversionError(
                "unusable task name", field=f"names[{index}]", found=repr(name), expected=wrong
            )
    return list(names)


def common_dtype(tensors: Mapping[str, Tensor]) -> DtypeName:
    """The one dtype of a checkpoint's skills. Raises `ConversionError` for several, and for one
    that an inventory cannot have."""
    first, wanted = next((name, tensor.dtype) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        if tensor.dtype != wanted:
            raise ConversionError(
                "skills of different dtypes",
                field=name,
                found=str(tensor.dtype),
                expected=f"{wanted} as {first}",
            )
    for label, dtype in DTYPES.items():
        if dtype == wanted:
            return label
    raise ConversionError(
        "dtype not implemented", field=first, found=str(wanted), expected=str(list(DTYPES))
    )


def check_frozen(tensors: Mapping[str, Tensor], backbone: Mapping[str, Tensor]) -> None:
    """Raises `ConversionError` where a checkpoint holds the backbone and it is another one."""
    for name in tensors.keys() & backbone.keys():
        given, own = tensors[name], backbone[name]
        if given.shape != own.shape or not _equal(given, own):
            raise ConversionError(
                "the checkpoint's backbone is not the one that was given",
                field=name,
                expected="a backbone that stayed frozen",
            )


def _equal(given: Tensor, own: Tensor) -> bool:
    """To the rounding of the coarser of the two dtypes."""
    if not (given.is_floating_point() and own.is_floating_point()):
        return torch.equal(given, own)
    eps = max(torch.finfo(given.dtype).eps, torch.finfo(own.dtype).eps)
    return torch.allclose(given.float(), own.float(), rtol=eps, atol=1e-7)
