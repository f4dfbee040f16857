"""A server under load as in S-LoRA: arrivals in bursts over tasks of a power law, at rising rates.

    python -m benchmarks load --alpha 1 --cv 4 --rates 1,2,4,8
    python -m benchmarks load --url http://127.0.0.1:9000 --models lora-%d

Starts the demo's server and gives it random tasks, unless `--url` names a server that speaks
OpenAI's API, and `--models` what its models are called. Goodput is whole
answers a second that kept both targets: the time to the first token, and the mean gap after it.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.load_client import Answered, plan, send
from benchmarks.serving import Served, serving
from benchmarks.simulated import Load
from polyhead.adapters.training import canvas

FIGURES = (
    "rate",
    "sent",
    "answered/s",
    "goodput/s",
    "tokens/s",
    "first token ms p50",
    "p99",
    "mean gap ms p50",
    "p99 of gaps",
    "refused",
    "refusal ms p99",
)


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    url: Annotated[str | None, typer.Option(help="A server that runs already")] = None,
    models: Annotated[str, typer.Option(help="Its models; %d is the task's number")] = "load-%d",
    tasks: Annotated[int, typer.Option(help="Tasks that requests are spread over")] = 200,
    alpha: Annotated[str, typer.Option(help="Exponents of the tasks' popularity")] = "1",
    cv: Annotated[str, typer.Option(help="Of the pauses between arrivals")] = "4",
    rates: Annotated[str, typer.Option(help="Requests per second, one run each")] = "1,2,4",
    seconds: Annotated[float, typer.Option(help="Of arrivals in each run")] = 30.0,
    first_token: Annotated[float, typer.Option(help="Target in seconds")] = 2.0,
    gap: Annotated[float, typer.Option(help="Target of the mean gap in seconds")] = 0.3,
    max_wait: Annotated[float, typer.Option(help="--max-wait-seconds of the server")] = 60.0,
    out: Annotated[Path, typer.Option(help="Folder of the figures and pictures")] = Path(
        "data/load"
    ),
) -> None:
    console = Console(width=140)
    targets = (first_token, gap)
    flags = ("--threads", "1", "--max-wait-seconds", f"{max_wait:g}")
    with _server(url, backbone, inventory, flags, models, tasks) as address:
        names = [models % number for number in range(tasks)]
        for exponent, variation in product(numbers(alpha), numbers(cv)):
            rows = []
            for rate in numbers(rates):
                planned = plan(Load(rate, tasks, exponent, variation), seconds)
                began = time.monotonic()
                answered = send(address, names, planned)
                length = max(seconds, time.monotonic() - began)
                rows.append({"rate": rate, **figures(answered, length, targets)})
                console.log(f"alpha {exponent:g}, cv {variation:g}, {rate:g}/s: {rows[-1]}")
            _tell(console, exponent, variation, targets, rows)
            _keep(out / f"alpha-{exponent:g}-cv-{variation:g}", rows)


def figures(
    answered: Sequence[Answered], seconds: float, targets: tuple[float, float]
) -> dict[str, float]:
    """Of one run that took `seconds` to its last answer. Refusals are answers of 429 and 503."""
    whole = [one for one in answered if one.complete]
    refused = [one for one in answered if one.status in (429, 503)]
    firsts = [one.moments[0] for one in whole if one.moments]
    gaps = [one.gap for one in whole if one.moments]
    values = (
        len(answered),
        len(whole) / seconds,
        sum(one.good(*targets) for one in answered) / seconds,
        sum(one.tokens for one in whole) / seconds,
        *_milliseconds(firsts),
        *_milliseconds(gaps),
        len(refused),
        _milliseconds([one.headers for one in refused])[1],
    )
    return dict(zip(FIGURES[1:], values, strict=True))


def _milliseconds(values: Sequence[float]) -> tuple[float, float]:
    """Median and 99th percentile; NaN of nothing."""
    if not values:
        return float("nan"), float("nan")
    return 1e3 * timing.quantile(values, 0.5), 1e3 * timing.quantile(values, 0.99)


@contextlib.contextmanager
def _server(
    url: str | None,
    backbone: Path,
    inventory: Path,
    flags: Sequence[str],
    models: str,
    tasks: int,
) -> Iterator[str]:
    if url is not None:
        yield url
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder), *flags) as served,
    ):
        register(served, models, tasks)
        yield f"http://127.0.0.1:{served.port}"


def register(served: Served, models: str, tasks: int) -> None:
    """Random routings, one for all modules, which is all that the engine's work depends on."""
    facts = served.get("/inventory")
    for number, logits in enumerate(random_logits(tasks, facts["heads"], facts["skills"])):
        routing = {"granularity": "model", "logits": logits}
        body = json.dumps({"id": models % number, "routing": routing}).encode()
        status, answer = served.call("POST", "/tasks", body, "application/json")
        assert status == 201, answer


def random_logits(tasks: int, heads: int, skills: int) -> list[Any]:
    """`[tasks, H, S]` as lists; the same ones for the same arguments."""
    draw = np.random.default_rng(0)
    found: list[Any] = (2 * draw.standard_normal((tasks, heads, skills))).tolist()
    return found


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _tell(
    console: Console,
    alpha: float,
    cv: float,
    targets: tuple[float, float],
    rows: Sequence[dict[str, float]],
) -> None:
    title = f"alpha {alpha:g}, cv {cv:g}; targets: {targets[0]:g} s to the first token, mean gap "
    title += f"{targets[1]:g} s\n{timing.machine()}"
    cells = [[f"{row[name]:.3g}" for name in FIGURES] for row in rows]
    timing.print_table(console, title, FIGURES, cells)


def _keep(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(f"{path.name}.json").write_text(json.dumps(list(rows), indent=2) + "\n")
    figure, (above, below) = canvas.figure(2, 7.0, 3.0)
    rates = [row["rate"] for row in rows]
    for name in ("answered/s", "goodput/s"):
        above.plot(rates, [row[name] for row in rows], marker="o", label=name)
    above.plot(rates, rates, color="grey", linestyle=":", label="sent")
    for name in ("first token ms p50", "p99"):
        below.plot(rates, [row[name] for row in rows], marker="o", label=name)
    below.set(yscale="log", xlabel="requests/s")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    canvas.save(figure, path.with_name(f"{path.name}.png"))


if __name__ == "__main__":
    typer.run(main)
