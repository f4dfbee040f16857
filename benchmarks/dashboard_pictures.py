"""Draws every panel of the Grafana dashboards, from a live Prometheus over a server at work.

    python -m benchmarks.dashboard_pictures --out docs/pictures

The queries are those of docker/grafana/dashboards.py. The load rises, bursts and falls, tasks are
popular by a power law, a fit runs, and some requests are refused, so that panels have something to
show. Needs Prometheus on the PATH.
"""

import contextlib
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from PIL import Image

from benchmarks import options
from benchmarks.serving import Served, free_port, serving
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.canvas import grid, save

DOCKER = Path(__file__).parents[1] / "docker"
CONFIG = """
global: {{scrape_interval: 1s}}
scrape_configs: [{{job_name: polyhead, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""
WINDOW = "15s"
EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
ACROSS = 3
MOST = 6
"""Series that a panel shows, the greatest."""
UNITS = {
    "s": "seconds",
    "reqps": "per second",
    "percentunit": "share",
    "bytes": "bytes",
    "short": "",
}
Series = dict[str, list[tuple[float, float]]]


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    out: Annotated[Path, typer.Option(help="Folder of the PNG files")] = Path("docs/pictures"),
    seconds: Annotated[float, typer.Option(help="How long the server works")] = 180.0,
    tasks: Annotated[int, typer.Option(help="Tasks that are asked for")] = 40,
) -> None:
    dashboards = load_dashboards()
    flags = ("--threads", "1", "--max-waiting", "8", "--max-running", "12", "--fit-share", "0.9")
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(backbone, inventory, Path(folder) / "registry", *flags) as served,
        prometheus(Path(folder), served.port) as address,
    ):
        began = time.time()
        work(served, min(Inventory.load(inventory).tasks), tasks, seconds)
        for name, (title, panels) in dashboards.DASHBOARDS.items():
            drawn = {p.title: (p.unit, series(address, p.queries, began)) for p in panels}
            draw(title, drawn, began, out / f"dashboard-{name}.png")
            print(out / f"dashboard-{name}.png")


def load_dashboards() -> ModuleType:
    """`docker/grafana/dashboards.py`, which is no package."""
    spec = importlib.util.spec_from_file_location("dashboards", DOCKER / "grafana/dashboards.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["dashboards"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def prometheus(folder: Path, target: int) -> Iterator[str]:
    address = f"127.0.0.1:{free_port()}"
    config = folder / "prometheus.yml"
    config.write_text(CONFIG.format(port=target))
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    command.append(f"--web.listen-address={address}")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield address
        finally:
            process.terminate()


def work(served: Served, source: str, tasks: int, seconds: float) -> None:
    """Keep the server busy, more and more until two thirds of the time, then less."""
    names = [f"customer-{number}" for number in range(tasks)]
    for name in names:
        post(served, "/tasks", {"id": name, "copy_of": source})
    fit(served, "fitted", "lora")
    while served.call("GET", "/tasks/fitted")[0] == 404:
        time.sleep(0.5)
    began = time.monotonic()
    stop = threading.Event()

    def wanted() -> int:
        share = (time.monotonic() - began) / seconds
        return round(1 + 20 * min(share / 0.65, max(0.0, (0.9 - share) / 0.25)))

    clients = [
        threading.Thread(target=client, args=(served, names, number, wanted, stop))
        for number in range(21)
    ]
    for each in clients:
        each.start()
    time.sleep(seconds / 4)
    fit(served, "later", "z")
    fit(served, "never", "z")
    time.sleep(seconds * 0.75)
    stop.set()
    for each in clients:
        each.join()


def fit(served: Served, task: str, method: str) -> None:
    how = {"method": method, "steps": 3, "holdout": 0.25}
    post(served, "/tasks", {"id": task, "examples": EXAMPLES, "fit": how})


def client(served: Served, names: list[str], number: int, wanted: Any, stop: Any) -> None:
    """Ask again and again, while at least `number` clients are wanted."""
    drawn = random.Random(number)
    weights = [1 / (place + 1) for place in range(len(names))]
    start = "You are a helpful assistant of a shop. Answer in one sentence. "
    while not stop.is_set():
        if wanted() <= number:
            time.sleep(0.2)
            continue
        (task,) = drawn.choices([*names, "fitted"], [*weights, 0.3])
        prompt = start + " ".join(drawn.choices(("when", "where", "blue", "order"), k=12))
        body = {"task": task, "prompt": prompt, "max_tokens": drawn.randrange(8, 40)}
        body["ignore_eos"] = True
        if drawn.random() < 0.05:
            body["task"] = "nobody"
        post(served, "/generate", body)


def post(served: Served, path: str, body: dict[str, Any]) -> int:
    return served.call("POST", path, json.dumps(body).encode(), "application/json")[0]


def series(address: str, queries: dict[str, str], began: float) -> Series:
    """Every series of a panel over the whole time, by its legend."""
    found: Series = {}
    for legend, expression in queries.items():
        asked = {
            "query": expression.replace("$__rate_interval", WINDOW),
            "start": str(began),
            "end": str(time.time()),
            "step": "2",
        }
        url = f"http://{address}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url) as answer:
            data = json.load(answer)["data"]["result"]
        for one in data:
            points = [(float(moment), float(value)) for moment, value in one["values"]]
            found[filled(legend, one["metric"])] = points
    if not found:
        sys.exit(f"nothing to draw for {queries}")
    return found


def filled(legend: str, labels: dict[str, str]) -> str:
    """Grafana's `{{label}}` as the label's value."""
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend


def greatest(lines: Series) -> list[tuple[str, list[tuple[float, float]]]]:
    """Those that are ever above 0, if any; by name."""
    tops = {legend: max(value for _, value in points) for legend, points in lines.items()}
    chosen = sorted(tops, key=lambda legend: -tops[legend])[:MOST]
    shown = [legend for legend in chosen if tops[legend] > 0] or chosen
    return [(legend, lines[legend]) for legend in sorted(shown)]


def draw(title: str, panels: dict[str, tuple[str, Series]], began: float, path: Path) -> None:
    made, axes = grid(len(panels), ACROSS, 4.2, 2.3)
    made.suptitle(title)
    for axis, (name, (unit, lines)) in zip(axes, panels.items(), strict=True):
        for legend, points in greatest(lines):
            moments = [moment - began for moment, _ in points]
            axis.plot(moments, [value for _, value in points], label=legend, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_ylabel(UNITS[unit], fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=6, loc="upper left")
    save(made, path)
    # Lines and letters need few colours: a quarter of the bytes.
    Image.open(path).quantize(32).save(path, optimize=True)


if __name__ == "__main__":
    typer.run(main)
