"""What the prefix cache saves: shared system prompts and conversations, with it and without it.

Two servers take turns. Each answers the same chats: every one begins with its task's system
prompt, and every turn with all that was said before.
"""

import contextlib
import http.client
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.serving import Served, serving
from benchmarks.workload import VOCABULARY

SIDES = {"with": (), "without": ("--prefix-cache-tokens", "0")}


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    tasks: Annotated[int, typer.Option(help="Each with a system prompt of its own")] = 4,
    chats: Annotated[int, typer.Option(help="Of each task and round")] = 4,
    turns: Annotated[int, typer.Option(help="Of each chat")] = 3,
    system: Annotated[int, typer.Option(help="Tokens of a system prompt")] = 300,
    said: Annotated[int, typer.Option(help="Tokens of each turn and of each answer")] = 24,
    rounds: int = 3,
) -> None:
    console = Console(width=110)
    with contextlib.ExitStack() as stack:
        served = {}
        for name, flags in SIDES.items():
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            threads = ("--threads", "1")
            served[name] = stack.enter_context(
                serving(backbone, inventory, Path(folder), *threads, *flags)
            )
        ids = [task["id"] for task in served["with"].get(f"/tasks?limit={tasks}")["tasks"]]
        first: dict[str, list[float]] = {name: [] for name in SIDES}
        hits: dict[str, list[float]] = {name: [] for name in SIDES}
        for number in range(rounds):
            for name, server in served.items():
                times, rate = _round(server, ids, number, chats, turns, system, said)
                first[name].append(timing.quantile(times, 0.5))
                hits[name].append(rate)
                console.log(f"round {number + 1}/{rounds} {name}: {first[name][-1]:.3f} s")
    _tell(console, first, hits)


def _round(
    server: Served, ids: list[str], number: int, chats: int, turns: int, system: int, said: int
) -> tuple[list[float], float]:
    """Seconds to each answer's first token, and the share of prompt tokens that was found."""
    times, cached, prompts = list[float](), 0, 0
    for place, task in enumerate(ids):
        shared = random.Random(place).choices(range(10, VOCABULARY), k=system)
        for chat in range(chats):
            draw = random.Random(f"{number} {place} {chat}")
            prompt = list(shared)
            for _ in range(turns):
                prompt += draw.choices(range(10, VOCABULARY), k=said)
                seconds, usage, tokens = ask(server.port, task, prompt, said)
                times.append(seconds)
                cached += usage["cached_tokens"]
                prompts += usage["prompt_tokens"]
                prompt += tokens
    return times, cached / prompts


def ask(
    port: int, task: str, prompt: list[int], most: int
) -> tuple[float, dict[str, int], list[int]]:
    """Stream one answer: seconds to its first token, its usage, its tokens."""
    body: dict[str, Any] = {"task": task, "prompt": prompt, "max_tokens": most, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        began = time.perf_counter()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate", json.dumps(body), headers)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        seconds, tokens = 0.0, list[int]()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            seconds = seconds or time.perf_counter() - began
            tokens += event.get("token_ids", [])
            if "usage" in event:
                return seconds, event["usage"], tokens
    raise RuntimeError("the stream broke off")


def _tell(console: Console, first: dict[str, list[float]], hits: dict[str, list[float]]) -> None:
    rows = [(name, timing.spread(first[name]), timing.spread(hits[name])) for name in SIDES]
    columns = ("prefix cache", "seconds to the first token, median", "prompt tokens found")
    timing.print_table(console, timing.machine(), columns, rows)
    ratio = timing.ratio(first["with"], first["without"])
    console.print(f"first token with over without: {ratio}")


if __name__ == "__main__":
    typer.run(main)
