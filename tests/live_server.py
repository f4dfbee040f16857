"""A real server on a free loopback port, over a tiny random backbone, inside the test process."""

import concurrent.futures
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from factories import save_backbone, tiny_inventory, tiny_model
from torch import nn
from transformers import PreTrainedModel

from polyhead.adapters.routing import Routing
from polyhead.server.config import Settings
from polyhead.server.engine.loading import load
from polyhead.server.http.app import create_app
from polyhead.server.http.serve import Server
from polyhead.server.http.service import Service
from polyhead.server.tasks.registry import Registry

CONTEXT = 512
TASKS = ("amber", "birch", "coral")


def write_model(folder: Path, model: PreTrainedModel | None = None) -> None:
    """`folder/backbone` and `folder/inventory`, with a routing for each of `TASKS`."""
    model = model or tiny_model(max_position_embeddings=CONTEXT)
    save_backbone(model, folder / "backbone")
    inventory = tiny_inventory(model)
    inventory.header = inventory.header.model_copy(
        update={"backbone": inventory.header.backbone.model_copy(update={"name": "backbone"})}
    )
    for seed, name in enumerate(TASKS):
        inventory.tasks[name] = sharp_routing(inventory.layout.shape("module"), seed)
    inventory.save(folder / "inventory")


def sharp_routing(shape: tuple[int, ...], seed: int) -> Routing:
    """Logits far enough from each other that two seeds answer differently."""
    generator = torch.Generator().manual_seed(seed)
    return Routing(4 * torch.randn(shape, generator=generator))


def settings_for(folder: Path, data_dir: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "backbone": str(folder / "backbone"),
        "inventory": folder / "inventory",
        "data_dir": data_dir,
        "port": 0,
        "dtype": "float32",
        "threads": 1,
        "kv_cache_tokens": 65536,
        "drain_seconds": 30.0,
    }
    return Settings(**{**values, **changes})


class LiveServer:
    """A running server: its address, and its parts for looking inside."""

    def __init__(self, server: Server, service: Service, model: nn.Module) -> None:
        self.server = server
        self.service = service
        self.model = model
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def generate(self, **body: Any) -> dict[str, Any]:
        """`POST /generate`, which must succeed; by default 8 tokens of `amber` after `hello`."""
        whole = {"task": "amber", "prompt": "hello", "max_tokens": 8, "ignore_eos": True} | body
        answer = self.client.post("/generate", json=whole)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def start(self, **body: Any) -> "concurrent.futures.Future[httpx.Response]":
        """`POST /generate` in a thread, once the engine has taken it in."""
        whole = {"task": "amber", "prompt": "hello", "ignore_eos": True} | body
        before = self.service.bridge.waiting
        pool = concurrent.futures.ThreadPoolExecutor(1)
        answer = pool.submit(httpx.post, f"{self.url}/generate", json=whole, timeout=60)
        pool.shutdown(wait=False)
        self.eventually(lambda: self.service.bridge.waiting > before or answer.done())
        self.eventually(lambda: self.running() > before or answer.done())
        return answer

    def running(self) -> int:
        """Requests that the engine holds, running or in line."""
        stats = self.service.engine.stats()
        return stats.running + stats.waiting

    def eventually(self, holds: Callable[[], bool], seconds: float = 5) -> None:
        """Wait until `holds`, at most `seconds`."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"it did not come to hold in {seconds} s"
            time.sleep(0.005)


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[LiveServer]:
    """Load and serve `settings`; stops the server, whatever happened to it, at the end."""
    loaded = load(settings)
    inventory = loaded.inventory
    with contextlib.closing(
        Registry(settings.data_dir, inventory.fingerprint, inventory.layout)
    ) as registry:
        registry.seed(inventory)
        app = create_app(settings, loaded, registry)
        server = Server(app, settings)
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.01)
            live = LiveServer(server, app.state.service, loaded.model)
            with live.client:
                yield live
        finally:
            server.should_exit = True
            thread.join(60)
