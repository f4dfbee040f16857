"""Sends completions at given moments to a server of OpenAI's API, and notes when tokens came."""

import asyncio
import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from benchmarks.simulated import Load, popularity
from benchmarks.workload import VOCABULARY


@dataclass(frozen=True)
class Planned:
    """A request and when it is to be sent, in seconds from the beginning."""

    at: float
    task: int
    prompt: list[int]
    new_tokens: int


@dataclass
class Answered:
    """What came back, in seconds from when the request was sent."""

    status: int = 0
    headers: float = 0.0  # until the status was known
    retry_after: bool = False
    moments: list[float] = field(default_factory=list)  # of each piece of text
    tokens: int = 0  # as the server counts them: a piece of text may be several, or none
    complete: bool = False

    @property
    def gap(self) -> float:
        """Mean seconds between two tokens."""
        return (self.moments[-1] - self.moments[0]) / max(1, self.tokens - 1)

    def good(self, first_token: float, gap: float) -> bool:
        """Whether the whole answer came, as fast as promised: its first token, and on average the
        others."""
        if not self.complete or not self.moments:
            return False
        return self.moments[0] <= first_token and self.gap <= gap


def plan(load: Load, seconds: float, seed: int = 0) -> list[Planned]:
    """Arrivals with gamma distributed pauses over tasks of a power law, as S-LoRA draws them."""
    draw = np.random.default_rng(seed)
    shares = popularity(load.tasks, load.alpha)
    shape, moment, planned = load.cv**-2, 0.0, list[Planned]()
    while True:
        moment += draw.gamma(shape, 1 / (load.rate * shape))
        if moment >= seconds:
            return planned
        length = int(draw.integers(*load.prompt, endpoint=True))
        planned.append(
            Planned(
                moment,
                int(draw.choice(load.tasks, p=shares)),
                draw.integers(10, VOCABULARY, length).tolist(),
                int(draw.integers(*load.new_tokens, endpoint=True)),
            )
        )


def send(
    url: str, models: Sequence[str], planned: Sequence[Planned], limit: float = 600.0
) -> list[Answered]:
    """Send every request at its moment, whatever became of the earlier ones; one model a task.

    limit: seconds after which a client leaves without its answer.
    """
    return asyncio.run(_send(url, models, planned, limit))


async def _send(
    url: str, models: Sequence[str], planned: Sequence[Planned], limit: float
) -> list[Answered]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=limits, trust_env=False
    ) as client:
        began = time.monotonic()

        async def one(request: Planned) -> Answered:
            await asyncio.sleep(max(0.0, began + request.at - time.monotonic()))
            found = Answered()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await _ask(client, models[request.task], request, found)
            return found

        return list(await asyncio.gather(*map(one, planned)))


async def _ask(client: httpx.AsyncClient, model: str, request: Planned, found: Answered) -> None:
    body = {
        "model": model,
        "prompt": request.prompt,
        "max_tokens": request.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    sent = time.monotonic()
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            found.status, found.headers = answer.status_code, time.monotonic() - sent
            found.retry_after = "retry-after" in answer.headers
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    found.complete = True
                elif line.startswith("data: "):
                    _take(found, json.loads(line.removeprefix("data: ")), time.monotonic() - sent)
    except httpx.TransportError:
        found.complete = False


def _take(found: Answered, event: dict[str, Any], moment: float) -> None:
    if event.get("choices"):
        found.moments.append(moment)
    if event.get("usage"):
        found.tokens = event["usage"]["completion_tokens"]
