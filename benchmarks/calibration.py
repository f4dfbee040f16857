"""The times of Polyhead's steps on this machine, as a line through measured ones."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import timing
from benchmarks.sides import EngineSide
from benchmarks.simulated import StepTimes
from benchmarks.workload import VOCABULARY, Work, make_work

ROWS = (1, 16, 32, 64)
DECODED = 16
PROMPT = 256


def measure_step_times(
    backbone: Path, *, routed: bool, rounds: int, console: Console
) -> dict[str, Any]:
    """Runs of one length each, on one thread: all requests begin together, so that a run is one
    step for each new token. CPU seconds, which neighbours on the machine do not stretch."""
    torch.set_num_threads(1)
    side = EngineSide(backbone, torch.float32, routed=routed, seats=max(ROWS))
    runs = {f"{rows}": _work(rows, 2, DECODED) for rows in ROWS} | {"prompt": _work(1, PROMPT, 1)}
    for work in runs.values():
        side(work)
    sides = {name: lambda work=work: side(work) for name, work in runs.items()}
    found = timing.run_in_turn(sides, rounds, console)
    side.engine.stop()
    least = {name: min(run.cpu_seconds for run in of) for name, of in found.items()}
    slope, fixed = np.polyfit(ROWS, [least[f"{rows}"] / DECODED for rows in ROWS], 1)
    token = (least["prompt"] - fixed - slope) / PROMPT
    return asdict(StepTimes(float(max(fixed, 0.0)), float(slope), float(token)))


def _work(rows: int, prompt: int, new_tokens: int) -> list[Work]:
    span = (prompt, prompt), (new_tokens, new_tokens)
    return make_work(rows, rows, vocabulary=VOCABULARY, prompt=span[0], new_tokens=span[1])
