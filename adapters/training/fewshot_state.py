"""A running fit in a file: what is done, and where the method at hand stands."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from polyhead.adapters.errors import AdapterError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.adapters.tensor_files import write_tensors
from polyhead.adapters.training.errors import CheckpointError
from polyhead.adapters.training.fewshot_types import FitTask, TrainedMethod

FORMAT = "3"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one method came to for one task."""

    adapter: Routing | PrivateAdapter
    score: float | None
    seconds: float
    began_from: tuple[str, ...] = ()


@dataclass
class FitState:
    """Everything that a fit would have to compute again if it were lost."""

    prompted: dict[int, tuple[float, float]] = field(default_factory=dict)  # score, seconds
    outcomes: dict[tuple[int, TrainedMethod], Outcome] = field(default_factory=dict)
    overflowed: set[tuple[int, TrainedMethod]] = field(default_factory=set)  # no outcome
    running: tuple[dict[str, Tensor], dict[str, Any]] | None = None
    """State of the joint fit at hand, with its method and its tasks under "round"."""


def fit_fingerprint(inventory: Inventory, tasks: Sequence[FitTask]) -> str:
    """Equal for fits that would compute the same."""
    return hashlib.sha256(f"{inventory.fingerprint}{tuple(tasks)!r}".encode()).hexdigest()


def save_state(path: Path, fingerprint: str, state: FitState) -> None:
    """Write the file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    outcomes = []
    for number, ((task, method), outcome) in enumerate(state.outcomes.items()):
        tensors |= {f"{number}/{name}": t for name, t in _named(outcome.adapter).items()}
        outcomes.append([task, method, outcome.score, outcome.seconds, outcome.began_from])
    running = None
    if state.running is not None:
        found, running = state.running
        tensors |= {f"running/{name}": tensor for name, tensor in found.items()}
    facts = {
        "prompted": state.prompted,
        "outcomes": outcomes,
        "overflowed": sorted(state.overflowed),
        "running": running,
    }
    head = {"format": FORMAT, "fingerprint": fingerprint, "facts": json.dumps(facts)}
    write_tensors(path, tensors, head)


def load_state(path: Path, fingerprint: str, inventory: Inventory) -> FitState:
    """What `save_state` wrote; nothing done yet where there is no file.

    Raises `CheckpointError` when the file cannot be read or belongs to another fit.
    """
    if not path.exists():
        return FitState()
    try:
        with safe_open(path, framework="pt") as file:
            head = file.metadata() or {}
            # Copies, for the tensors are mapped from a file that is soon to be replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"cannot be read: {exc}", field=str(path)) from exc
    if head.get("fingerprint") != fingerprint or head.get("format") != FORMAT:
        raise CheckpointError("belongs to another fit", field=str(path))
    try:
        return _read(json.loads(head["facts"]), tensors, inventory)
    except (KeyError, TypeError, ValueError, AdapterError) as exc:
        raise CheckpointError(f"damaged: {exc}", field=str(path)) from exc


def _read(facts: Any, tensors: Mapping[str, Tensor], inventory: Inventory) -> FitState:
    state = FitState({int(task): (s[0], s[1]) for task, s in facts["prompted"].items()})
    for number, (task, method, score, seconds, near) in enumerate(facts["outcomes"]):
        adapter = _adapter(_below(tensors, f"{number}/"), inventory)
        state.outcomes[task, method] = Outcome(adapter, score, seconds, tuple(near))
    state.overflowed = {(task, method) for task, method in facts["overflowed"]}
    if facts["running"] is not None:
        state.running = (_below(tensors, "running/"), facts["running"])
    return state


def _named(adapter: Routing | PrivateAdapter) -> dict[str, Tensor]:
    if isinstance(adapter, Routing):
        return {"logits": adapter.values}
    a = {f"{name}.A": tensor for name, tensor in adapter.a.items()}
    return a | {f"{name}.B": tensor for name, tensor in adapter.b.items()}


def _adapter(tensors: Mapping[str, Tensor], inventory: Inventory) -> Routing | PrivateAdapter:
    if "logits" in tensors:
        return Routing.checked(tensors["logits"], inventory.layout)
    a = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")}
    b = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")}
    return PrivateAdapter.checked(a, b, inventory.header.modules)


def _below(tensors: Mapping[str, Tensor], head: str) -> dict[str, Tensor]:
    return {n.removeprefix(head): tensor for n, tensor in tensors.items() if n.startswith(head)}
