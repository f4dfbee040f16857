"""Checkpoints of a run: whole folders or none, so that a run may be killed at any moment."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polyhead.adapters.tensor_files import read_tensors, write_tensors
from polyhead.adapters.training.errors import CheckpointError

NAME = re.compile(r"step-(\d{8})")
TENSOR_FILE = "state.safetensors"
FACTS_FILE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run's state between two steps: tensors, and plain facts that JSON can hold."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> None:
    """Write `folder/step-XXXXXXXX`, then remove all but the newest `keep`."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step-{checkpoint.step:08d}"
    unfinished = folder / f"{target.name}.part"
    for left_over in (unfinished, target):
        shutil.rmtree(left_over, ignore_errors=True)
    unfinished.mkdir()
    write_tensors(unfinished / TENSOR_FILE, checkpoint.tensors, {})
    facts = {"step": checkpoint.step, **checkpoint.facts}
    (unfinished / FACTS_FILE).write_text(json.dumps(facts))
    for path in (unfinished / TENSOR_FILE, unfinished / FACTS_FILE, unfinished):
        _flush(path)
    unfinished.rename(target)
    _flush(folder)
    for old in _finished(folder)[:-keep]:
        shutil.rmtree(old)


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole one, or None. Raises `CheckpointError` when it cannot be read."""
    found = _finished(folder)
    if not found:
        return None
    try:
        tensors = read_tensors(found[-1] / TENSOR_FILE)
        facts = json.loads((found[-1] / FACTS_FILE).read_text())
        return Checkpoint(int(facts.pop("step")), tensors, facts)
    except (OSError, ValueError, KeyError) as exc:
        raise CheckpointError(f"cannot be read: {exc}", field=str(found[-1])) from exc


def training_state(source: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and moments by the parameters' names, to be given back to `restore_state`."""
    found: dict[str, Tensor] = {}
    for name, parameter in source.named_parameters():
        found[f"parameter/{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            found[f"{key}/{name}"] = torch.as_tensor(value)
    return found


def restore_state(
    source: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Raises `CheckpointError` when a parameter is missing or has another shape."""
    own = dict(source.named_parameters())
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind != "parameter" and name in own:
            state.setdefault(name, {})[kind] = value
    for name, parameter in own.items():
        saved = tensors.get(f"parameter/{name}")
        if saved is None or saved.shape != parameter.shape:
            raise CheckpointError(
                "belongs to another run",
                field=name,
                found="nothing" if saved is None else str(list(saved.shape)),
                expected=str(list(parameter.shape)),
            )
        with torch.no_grad():
            parameter.copy_(saved)
        moments = state.get(name, {})
        on = parameter.device
        optimiser.state[parameter].update(
            {k: v.clone() if k == "step" else v.clone().to(on) for k, v in moments.items()}
        )


def _finished(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name))


def _flush(path: Path) -> None:
    """Onto the disk itself: a renamed folder must not outlive a power cut without its files."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
