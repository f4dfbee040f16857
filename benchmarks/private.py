"""What private adapters cost beside routed tasks, and what too few slots for them cost.

    python -m benchmarks.private

First, one server answers the same requests once all routed and once half routed, half private.
Then `--adapters` private tasks, asked for by Zipf's law, on a server that holds `--slots` of them
at a time against one that holds all. Sides take turns.
"""

import concurrent.futures
import contextlib
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import httpx
import torch
import typer
from rich.console import Console

from benchmarks import options, timing
from benchmarks.workload import VOCABULARY, Work, make_work
from polyhead.adapters.inventory import Inventory, ModuleShape
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Routing
from polyhead.server.config import Settings
from polyhead.server.engine.backbone import DTYPES
from polyhead.server.engine.loading import load
from polyhead.server.http.app import create_app
from polyhead.server.http.serve import Server
from polyhead.server.http.service import Service
from polyhead.server.tasks.registry import Registry

MIXED = 16
"""Tasks of the first part."""
STD = 0.01


@dataclass(frozen=True)
class Inside:
    """A server in this process, whose parts can be looked at."""

    url: str
    service: Service

    def answer(self, work: Sequence[Work], names: Sequence[str], at_once: int) -> None:
        """Every request, `at_once` of them at any time."""
        with (
            httpx.Client(base_url=self.url, timeout=600, trust_env=False) as client,
            concurrent.futures.ThreadPoolExecutor(at_once) as pool,
        ):

            def ask(item: Work, name: str) -> None:
                body = {"task": name, "prompt": list(item.prompt), "max_tokens": item.new_tokens}
                client.post("/generate", json={**body, "ignore_eos": True}).raise_for_status()

            list(pool.map(ask, work, names))


def main(
    backbone: options.Backbone = options.BACKBONE,
    inventory: options.Inventory = options.INVENTORY,
    rounds: int = 3,
    requests: Annotated[int, typer.Option(help="Requests of each run")] = 64,
    at_once: Annotated[int, typer.Option(help="Of the first part's requests")] = 32,
    adapters: Annotated[int, typer.Option(help="Private tasks of the second part")] = 200,
    slots: Annotated[int, typer.Option(help="Of them that are resident")] = 16,
    rank: Annotated[int, typer.Option(help="Of private adapters")] = 8,
    new_tokens: int = 24,
    only_mixed: Annotated[bool, typer.Option(help="Leave the second part out")] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16"], typer.Option(help="Of backbone and adapters")
    ] = "float32",
) -> None:
    console = Console(width=110)
    work = make_work(
        requests,
        MIXED,
        vocabulary=VOCABULARY,
        prompt=(8, 24),
        new_tokens=(new_tokens, new_tokens),
    )
    loaded = Inventory.load(inventory)
    modules = loaded.header.modules
    narrow = [m for m in modules if m.name.endswith(("q_proj", "v_proj"))]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        _fill(folder, loaded, adapters, narrow, rank)
        size = _adapter(0, narrow, rank).nbytes * DTYPES[dtype].itemsize // 4  # made in float32

        def start(budget: int) -> Inside:
            settings = Settings(
                backbone=str(backbone),
                inventory=inventory,
                data_dir=folder,
                port=0,
                dtype=dtype,
                threads=1,
                private_cache_bytes=budget,
                private_wait_seconds=600,
            )
            return stack.enter_context(_serving(settings))

        everything = start((adapters + MIXED) * 8 * size)
        _beside_routed(console, everything, work, at_once, rounds, (loaded.header.rank, rank))
        if only_mixed:
            return
        few = start(slots * size + size // 2)
        _too_few(
            console, {"all resident": everything, f"{slots} slots": few}, work, adapters, rounds
        )


def _beside_routed(
    console: Console,
    server: Inside,
    work: Sequence[Work],
    at_once: int,
    rounds: int,
    ranks: Sequence[int],
) -> None:
    """ranks: of the private adapters, that of the inventory's skills among them."""
    sides = {"all routed": [f"routed-{n % MIXED}" for n in range(len(work))]}
    for rank in dict.fromkeys(ranks):
        kinds = (f"wide{rank}", "routed")
        sides[f"half private, rank {rank}"] = [
            f"{kinds[n % 2]}-{n % MIXED}" for n in range(len(work))
        ]
    runs = timing.run_in_turn(
        {name: _side(server, work, names, at_once) for name, names in sides.items()},
        rounds + 1,
        console,
    )
    _print(console, "Private beside routed; goal: 0.9 of all routed", runs, work)


def _too_few(
    console: Console, servers: dict[str, Inside], work: Sequence[Work], adapters: int, rounds: int
) -> None:
    for at_once in (16, 32):
        names = _zipf(len(work), adapters)
        runs = timing.run_in_turn(
            {name: _side(server, work, names, at_once) for name, server in servers.items()},
            rounds + 1,
            console,
        )
        title = f"{adapters} private tasks, {len(set(names))} asked for, {at_once} requests at once"
        _print(console, f"{title}; goal: 0.8", runs, work)
    seconds = {name: 1e3 * server.service.room.longest_handover for name, server in servers.items()}
    for name, server in servers.items():
        _count_handovers_in_steps(server)
        server.answer(work, _zipf(len(work), adapters), 32)
        held, room, stats = server.service.slots, server.service.room, server.service.engine.stats()
        console.print(
            f"{name}: {held.loads} loads, {held.evictions} evictions, {held.nbytes / 1e6:.0f} MB; "
            f"longest from a slot's release to its next request {seconds[name]:.1f} ms, in one "
            f"more round {room.longest_handover:.0f} whole steps; last step "
            f"{1000 * stats.step_seconds:.0f} ms"
        )


def _count_handovers_in_steps(server: Inside) -> None:
    room, engine = server.service.room, server.service.engine
    room.longest_handover, room.clock = 0.0, lambda: engine.stats().steps


def _zipf(count: int, tasks: int) -> list[str]:
    """Which task each request asks for: the k-th of them 1/k times as often as the first."""
    weights = [1 / (rank + 1) for rank in range(tasks)]
    picks = random.Random(0).choices(range(tasks), weights, k=count)
    return [f"narrow-{pick}" for pick in picks]


def _side(
    server: Inside, work: Sequence[Work], names: Sequence[str], at_once: int
) -> Callable[[], None]:
    return lambda: server.answer(work, names, at_once)


def _print(
    console: Console, title: str, runs: dict[str, list[timing.Run]], work: Sequence[Work]
) -> None:
    tokens = sum(item.new_tokens for item in work)
    counted = {name: found[1:] for name, found in runs.items()}  # the first round warms up
    by_cpu = {name: timing.rates(found, tokens) for name, found in counted.items()}
    by_wall = {
        name: [tokens / run.wall_seconds for run in found] for name, found in counted.items()
    }
    first = next(iter(runs))
    rows = [
        (
            name,
            timing.spread(by_cpu[name]),
            timing.ratio(by_cpu[name], by_cpu[first]),
            timing.ratio(by_wall[name], by_wall[first]),
        )
        for name in runs
    ]
    columns = ("side", "tokens / CPU s", f"over {first}", "by the clock")
    timing.print_table(console, f"{title}\n{timing.machine()}", columns, rows)


def _adapter(seed: int, modules: Sequence[ModuleShape], rank: int) -> PrivateAdapter:
    generator = torch.Generator().manual_seed(seed)
    a = {m.name: STD * torch.randn(m.in_features, rank, generator=generator) for m in modules}
    b = {m.name: STD * torch.randn(rank, m.out_features, generator=generator) for m in modules}
    return PrivateAdapter(a, b)


def _fill(
    folder: Path, inventory: Inventory, adapters: int, narrow: Sequence[ModuleShape], rank: int
) -> None:
    layout = inventory.layout
    with contextlib.closing(Registry(folder, inventory.fingerprint, layout)) as registry:
        for seed in range(MIXED):
            generator = torch.Generator().manual_seed(seed)
            logits = torch.randn(layout.shape("module"), generator=generator)
            registry.create(f"routed-{seed}", Routing(logits))
            for wide in {rank, inventory.header.rank}:
                adapter = _adapter(seed, inventory.header.modules, wide)
                registry.create(f"wide{wide}-{seed}", adapter)
        for seed in range(adapters):
            registry.create(f"narrow-{seed}", _adapter(seed, narrow, rank))


@contextlib.contextmanager
def _serving(settings: Settings) -> Iterator[Inside]:
    loaded = load(settings)
    inventory = loaded.inventory
    with contextlib.closing(
        Registry(settings.data_dir, inventory.fingerprint, inventory.layout)
    ) as registry:
        app = create_app(settings, loaded, registry)
        server = Server(app, settings)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            host, port = server.servers[0].sockets[0].getsockname()[:2]
            yield Inside(f"http://{host}:{port}", app.state.service)
        finally:
            server.should_exit = True
            thread.join(60)


if __name__ == "__main__":
    typer.run(main)
