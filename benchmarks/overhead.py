"""What metrics and logs cost the engine while tracing is off.

    python -m benchmarks.overhead

The same engine answers the same requests with nobody watching and with every step and output
counted and every request logged, in turn. The difference drowns in the noise of a shared machine,
so the watching is also timed by itself, in CPU time, as a share of the whole.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.sides import EngineSide
from benchmarks.workload import VOCABULARY, Work, make_work
from polyhead.server.engine.backbone import DTYPES
from polyhead.server.engine.request import Event, Output, Request
from polyhead.server.engine.step_record import StepRecord
from polyhead.server.engine.tokenizer import Tokenizer
from polyhead.server.http.observing import RequestLog
from polyhead.server.http.problems import KINDS
from polyhead.server.logs import JsonLines
from polyhead.server.metrics import Metrics, Stopwatch

GOAL = 0.01


class WatchedSide(EngineSide):
    """An engine whose requests are watched as the server's are, while `watching`."""

    def __init__(self, folder: Path, dtype: torch.dtype, *, seats: int) -> None:
        self.watching = False
        self.spent = 0.0  # CPU seconds of watching
        self._metrics = Metrics(32, {kind.code for kind in KINDS.values()})
        self._stopwatches: dict[str, Stopwatch] = {}
        super().__init__(folder, dtype, routed=True, seats=seats, watch=self._stepped)
        self._log = RequestLog(Tokenizer.load(folder), with_prompts=False)

    def submit(self, request: Request) -> None:
        if self.watching:
            began = time.thread_time()
            self._stopwatches[request.id] = Stopwatch(self._metrics, request, [self._log])
            self.spent += time.thread_time() - began
        super().submit(request)

    def _stepped(self, record: StepRecord) -> None:
        if self.watching:
            began = time.thread_time()
            self._metrics.step(record)
            self.spent += time.thread_time() - began

    def receive(self, events: list[Event]) -> None:
        if self.watching:
            began = time.thread_time()
            for event in events:
                assert isinstance(event, Output), event
                stopwatch = self._stopwatches[event.request_id]
                stopwatch.saw(event)
                if event.finish_reason is not None:
                    stopwatch.ended()
            self.spent += time.thread_time() - began
        super().receive(events)


def main(
    backbone: options.Backbone = options.BACKBONE,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    requests: int = 64,
    rounds: int = 5,
    seats: Annotated[int, typer.Option(help="Sequences in the engine's batch")] = 32,
    tasks: Annotated[int, typer.Option(help="Tasks, in turn")] = 16,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    logger = logging.getLogger("polyhead")
    handler = logging.StreamHandler(Path(os.devnull).open("w"))  # noqa: SIM115
    handler.setFormatter(JsonLines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    side = WatchedSide(backbone, DTYPES[dtype], seats=seats)
    work = make_work(requests, tasks, vocabulary=VOCABULARY)

    def run(watching: bool, work: Sequence[Work] = work) -> None:
        side.watching = watching
        side(work)

    run(True)  # builds what is built once
    side.spent = 0.0
    sides = {"watched": lambda: run(True), "not watched": lambda: run(False)}
    runs = timing.run_in_turn(sides, rounds, console)
    tokens = sum(item.new_tokens for item in work)
    rates = {name: timing.rates(found, tokens) for name, found in runs.items()}
    rows = [(n, timing.spread(r), timing.ratio(r, rates["not watched"])) for n, r in rates.items()]
    timing.print_table(
        console, timing.machine(), ("side", "tokens / CPU s", "over not watched"), rows
    )
    share = side.spent / sum(run.cpu_seconds for run in runs["watched"])
    told = "met" if share <= GOAL else "missed"
    console.print(f"watching takes {100 * share:.2f} % of the CPU time; goal {GOAL:.0%}: {told}")
    side.engine.stop()


if __name__ == "__main__":
    typer.run(main)
