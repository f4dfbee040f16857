"""What a registry of 100,000 tasks costs, and how fast two servers on PostgreSQL converge.

    python -m benchmarks.registry [--database-url postgresql://…]

Fills a registry with random routings for every module, starts a server on it, asks it for pages
of the list, looks tasks up that are not in memory, and watches the memory of doing so. With the
URL of an empty PostgreSQL it also starts two servers there: one replaces a task, and the time is
taken until the other answers with the new generation.
"""

import contextlib
import gc
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks import timing
from benchmarks.serving import Served, serving
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import PreparedAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.tasks import store
from polyhead.server.tasks.catalogue import Catalogue
from polyhead.server.tasks.change import Change
from polyhead.server.tasks.generations import first_generation
from polyhead.server.tasks.options import Options
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots

BATCH = 1000
CACHE = 64 << 20
TRANSIENT = 32 << 20
"""What a look-up needs beside the cache while it lasts, and what the allocator keeps back."""


def main(
    backbone: Annotated[Path, typer.Option(help="Folder of the backbone")] = Path(
        "data/SmolLM2-135M-Instruct"
    ),
    inventory: Annotated[Path, typer.Option(help="Folder of the inventory")] = Path(
        "data/inventory"
    ),
    tasks: int = 100_000,
    lookups: int = 5000,
    changes: Annotated[int, typer.Option(help="Replacements that the other server must see")] = 300,
    database_url: Annotated[str | None, typer.Option(help="An empty PostgreSQL")] = None,
) -> None:
    torch.set_num_threads(1)
    console = Console(width=110)
    loaded = Inventory.load(inventory)
    rows: list[tuple[str, ...]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.closing(_open(folder, loaded)) as registry:
            fill(registry, tasks)
        with _started(backbone, inventory, folder / "empty", rows, "without tasks", "control"):
            pass
        with _started(backbone, inventory, folder, rows, "with all", "< 10 s") as served:
            rows += _pages(served, tasks)
        rows += _lookups(folder, loaded, lookups, tasks)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if database_url is not None:
        rows.append(_convergence(backbone, inventory, database_url, changes))
    columns = ("what", "times", "median, p99, longest", "goal")
    title = f"{tasks} tasks as float16, {size / 1e9:.1f} GB; {timing.machine()}"
    timing.print_table(console, title, columns, rows)


def _open(folder: Path, inventory: Inventory) -> Registry:
    return Registry(folder, inventory.fingerprint, inventory.layout, Options(precision="float16"))


def fill(registry: Registry, count: int) -> None:
    """Random routings, many in a transaction: what a client's calls would have stored."""
    generator = torch.Generator().manual_seed(0)
    shape = registry.layout.shape("module")
    for start in track(range(0, count, BATCH), f"registering {count} tasks"):
        with registry.database.write() as connection:
            for number in range(start, min(count, start + BATCH)):
                packed = registry.pack(Routing(torch.randn(shape, generator=generator)))
                labels = {"team": f"team-{number % 100}", "number": number}
                record = first_generation(
                    registry.inventory, f"task-{number:06}", packed, metadata=labels
                )
                store.put_content(connection, packed)
                store.add(connection, record)
                Change(connection, record.task.id, None).note("created", None, record.task)


@contextlib.contextmanager
def _started(
    backbone: Path, inventory: Path, folder: Path, rows: list[tuple[str, ...]], name: str, goal: str
) -> Iterator[Served]:
    began = time.perf_counter()
    with serving(backbone, inventory, folder) as served:
        rows.append((f"start, {name}", "1", f"{time.perf_counter() - began:.1f} s", goal))
        yield served


def _pages(served: Served, tasks: int) -> list[tuple[str, ...]]:
    """Pages of 100: the first, after a cursor in the middle, and of one team in a hundred."""
    half = served.get(f"/tasks?limit=1&prefix=task-{tasks // 2 // 1000:03}")["next"]
    paths = {
        "first page": "/tasks?limit=100",
        "page in the middle": f"/tasks?limit=100&cursor={half}",
        "page by metadata": "/tasks?limit=100&metadata=team:team-7",
    }
    rows = []
    for name, path in paths.items():
        took = []
        for _ in range(50):
            began = time.perf_counter()
            assert served.get(path)["tasks"]
            took.append(1000 * (time.perf_counter() - began))
        rows.append((f"list, {name}", "50", _quantiles(took), "< 50 ms"))
    return rows


def _lookups(folder: Path, inventory: Inventory, count: int, tasks: int) -> list[tuple[str, ...]]:
    began = time.perf_counter()
    with contextlib.closing(_open(folder, inventory)) as registry:
        registry.seed(inventory)
        registry.purge()
        opened = time.perf_counter() - began
        slots = Slots(lambda adapter: PreparedAdapter(adapter.fingerprint, []))
        catalogue = Catalogue(registry, inventory.layout, slots, CACHE)
        picks = random.Random(0).sample(range(tasks), min(count, tasks))
        for number in picks[:100]:
            catalogue.resolve(f"task-{number:06}")
        gc.collect()
        before = _resident()
        took = []
        for number in picks[100:]:
            began = time.perf_counter()
            catalogue.resolve(f"task-{number:06}")
            took.append(1000 * (time.perf_counter() - began))
        grown, held = _resident() - before, catalogue.nbytes
    assert held <= CACHE
    loaded = f"{grown / 2**20:.0f} MiB for {held / 2**20:.0f} MiB held"
    return [
        ("opening the registry alone", "1", f"{opened:.2f} s", "< 10 s"),
        ("look-up of a task on disk", str(len(took)), _quantiles(took), "< 5 ms"),
        ("memory of these look-ups", "1", loaded, f"<= {(CACHE + TRANSIENT) >> 20} MiB"),
    ]


def _convergence(backbone: Path, inventory: Path, url: str, changes: int) -> tuple[str, ...]:
    """From the answer to `PUT` at one server to the first answer of the other for what it made."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        flags = ("--database-url", url, "--threads", "1")
        one, other = (
            stack.enter_context(serving(backbone, inventory, folder / name, *flags))
            for name in ("one", "other")
        )
        sources = [task["id"] for task in one.get("/tasks?limit=2")["tasks"]]
        _send(one, "POST", "/tasks", {"id": "moving", "copy_of": sources[0]})
        took = []
        for number in track(range(changes), "replacing a task"):
            body = {"copy_of": sources[number % 2], "template": f"{number} {{input}}"}
            new = _send(one, "PUT", "/tasks/moving", body)
            began = time.perf_counter()
            while _served(other) != new:
                pass
            took.append(1000 * (time.perf_counter() - began))
    return ("other server answers anew", str(changes), _quantiles(took), "p99 <= 1000 ms")


def _send(served: Served, method: str, path: str, body: dict[str, str]) -> str:
    status, data = served.call(method, path, json.dumps(body).encode(), "application/json")
    assert status in (200, 201), data
    return str(json.loads(data)["generation"])


def _served(served: Served) -> str:
    return str(served.generate(task="moving", prompt="x", max_tokens=1)["generation"])


def _quantiles(values: Sequence[float]) -> str:
    return ", ".join(f"{timing.quantile(values, share):.1f}" for share in (0.5, 0.99, 1)) + " ms"


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


if __name__ == "__main__":
    typer.run(main)
