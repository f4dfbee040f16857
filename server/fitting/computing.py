"""What the worker computes: the backbone is loaded once, every batch is fitted on it."""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from polyhead.adapters.errors import AdapterError
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.data import Example
from polyhead.adapters.training.errors import CheckpointError
from polyhead.adapters.training.fewshot import (
    FitInterrupted,
    FitOptions,
    FitProgress,
    FitResult,
    FitTask,
    fit,
)
from polyhead.server.engine.backbone import load_backbone, pick_fit_dtype
from polyhead.server.fitting.gate import Gate
from polyhead.server.fitting.worker import Control
from polyhead.server.wire import Wire

logger = logging.getLogger(__name__)

MICRO_TOKENS = 256
"""Tokens between two pauses: some seconds of one slow core. A stop has to wait that long."""


class Computer:
    """Fits batches on one backbone; used by the worker's main thread."""

    def __init__(self, load: dict[str, Any], wire: Wire, control: Control, gate: Gate) -> None:
        folder = Path(load["backbone"])
        device = torch.device(load["device"])
        self._model = load_backbone(folder, pick_fit_dtype(load["dtype"], device), device)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._inventory = Inventory.load(load["inventory"])
        self._max_tokens = load["max_tokens"]
        self._wire = wire
        self._control = control
        self._gate = gate

    def fit(self, command: dict[str, Any]) -> None:
        """One batch, from the command to the event that ends it."""
        self._gate.begin()
        try:
            self._fit(command)
        except FitInterrupted:
            self._wire.send({"event": "stopped"})
        except (AdapterError, RuntimeError) as exc:
            logger.exception("a fit of %d jobs failed", len(command["jobs"]))
            self._wire.send({"event": "failed", "error": f"{type(exc).__name__}: {exc}"})
        else:
            self._wire.send({"event": "done"})

    def _fit(self, command: dict[str, Any]) -> None:
        tasks = [_task(job) for job in command["jobs"]]
        state = Path(command["state_file"])
        try:
            results = self._fit_from(state, tasks)
        except CheckpointError as exc:
            # Of other jobs, when one was cancelled since, or cut off by a crash of the machine.
            logger.warning("a fit of %d jobs starts anew: %s", len(tasks), exc)
            state.unlink()
            results = self._fit_from(state, tasks)
        for result in results:
            self._answer(result)

    def _fit_from(self, state: Path, tasks: list[FitTask]) -> list[FitResult]:
        return fit(
            self._model,
            self._inventory,
            self._tokenizer,
            tasks,
            report=self._report,
            pause=self._pause,
            cancelled=self._control.cancelled.__contains__,
            state_file=state,
            micro_tokens=MICRO_TOKENS,
            max_tokens=self._max_tokens,
        )

    def _pause(self) -> None:
        self._gate.pass_through()
        if self._control.stopping:
            raise FitInterrupted

    def _report(self, progress: FitProgress) -> None:
        told = {"step": progress.step, "steps": progress.steps, "method": progress.method}
        loss = progress.loss if math.isfinite(progress.loss) else None
        score = {} if progress.score is None else {"score": progress.score}
        self._wire.send({"event": "progress", "job": progress.task, **told, "loss": loss, **score})

    def _answer(self, result: FitResult) -> None:
        content = result.private if result.routing is None else result.routing
        assert content is not None
        told: dict[str, Any] = {
            "method": result.method,
            "score": result.score,
            "prompted_score": result.prompted_score,
            "methods": [vars(one) for one in result.methods],
            "seconds": round(result.seconds, 3),
        }
        if result.began_from:
            told["began_from"] = list(result.began_from)
        kind = "private" if result.routing is None else "routing"
        message = {"event": "result", "job": result.task, "kind": kind, "result": told}
        self._wire.send(message, content.to_safetensors())


def _task(job: dict[str, Any]) -> FitTask:
    examples = tuple(Example(job["job"], *pair) for pair in job["examples"])
    return FitTask(job["job"], examples, job["template"], FitOptions(**job["options"]))
