"""What clients do to a server that is soaked: work, change their minds, leave, say nonsense."""

import asyncio
import contextlib
import json
import random
import socket
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import httpx

Action = Callable[[], Awaitable[None]]
KEPT_TASKS = 30
EXAMPLES = [{"input": f"n{number}", "output": "ab"[number % 2]} for number in range(8)]
FIT_SECONDS = 300.0


class Churn:
    """Actions drawn at random; `done` counts them, `wrong` what was answered otherwise than due."""

    def __init__(self, port: int, task: str, seed: int) -> None:
        self._port = port
        self._task = task
        self._random = random.Random(seed)
        limits = httpx.Limits(max_keepalive_connections=8, keepalive_expiry=5)
        url = f"http://127.0.0.1:{port}"
        self._client = httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False)
        self._tasks: list[str] = []
        self._made = 0
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._shares: dict[str, tuple[int, Action]] = {
            "answer": (30, self._answer),
            "stream": (15, self._stream),
            "score": (5, self._score),
            "register or delete": (15, self._register),
            "leave mid-stream": (15, self._leave_stream),
            "leave before the answer": (8, self._leave_early),
            "leave within the body": (5, self._leave_in_body),
            "nonsense": (7, self._nonsense),
        }

    async def act(self) -> None:
        """One action."""
        names = list(self._shares)
        name = self._random.choices(names, [self._shares[n][0] for n in names])[0]
        await self._counted(name, self._shares[name][1])

    async def fit(self) -> None:
        """Fit a task, follow it or leave, cancel it or wait, delete it."""
        await self._counted("fit", self._fit)

    async def deaf(self, seconds: float) -> None:
        """Order more than the buffers hold and read nothing for `seconds`."""

        async def stay() -> None:
            body = self._body(n=8, max_tokens=200, stream=True, logprobs=20)
            async with self._raw(_request(body), window=4096):
                await asyncio.sleep(seconds)

        await self._counted("deaf", stay)

    async def close(self) -> None:
        await self._client.aclose()

    async def _counted(self, name: str, action: Action) -> None:
        self.done[name] += 1
        try:
            await action()
        except (httpx.HTTPError, OSError, AssertionError) as exc:
            self.wrong.append(f"{name}: {type(exc).__name__} {exc}"[:200])

    def _body(self, **changes: Any) -> dict[str, Any]:
        task = self._random.choice([self._task, *self._tasks])
        words = " ".join(self._random.choices(("red", "blue", "stone", "river"), k=8))
        plain = {"task": task, "prompt": words, "max_tokens": 8, "ignore_eos": True}
        return {**plain, **changes}

    async def _post(self, path: str, body: Any, *statuses: int) -> Any:
        answer = await self._client.post(path, json=body)
        assert answer.status_code in statuses, f"{answer.status_code} {answer.text}"
        return answer.json()

    async def _answer(self) -> None:
        # A task may be deleted between its choice and its call.
        await self._post("/generate", self._body(), 200, 404)

    async def _score(self) -> None:
        body = {"task": self._task, "prompt": "red or blue?", "choices": [" red", " blue"]}
        await self._post("/score", body, 200)

    async def _stream(self) -> None:
        body = self._body(stream=True, task=self._task)
        async with self._client.stream("POST", "/generate", json=body) as answer:
            assert (await answer.aread()).endswith(b"data: [DONE]\n\n")

    async def _register(self) -> None:
        if len(self._tasks) >= KEPT_TASKS or (self._tasks and self._random.random() < 0.4):
            name = self._tasks.pop(self._random.randrange(len(self._tasks)))
            answer = await self._client.delete(f"/tasks/{name}")
            assert answer.status_code == 204, answer.text
            return
        self._made += 1
        name = f"churn-{self._made}"
        await self._post("/tasks", {"id": name, "copy_of": self._task}, 201)
        self._tasks.append(name)

    async def _nonsense(self) -> None:
        await self._post("/generate", self._body(temperature="hot"), 422)
        await self._post("/generate", self._body(task="nobody"), 404)

    async def _leave_stream(self) -> None:
        async with self._raw(_request(self._body(max_tokens=200, n=2, stream=True))) as reader:
            await reader.read(1024)

    async def _leave_early(self) -> None:
        async with self._raw(_request(self._body(max_tokens=200))):
            await asyncio.sleep(self._random.random() / 5)

    async def _leave_in_body(self) -> None:
        whole = _request(self._body())
        async with self._raw(whole[: -self._random.randrange(1, 80)]):
            pass

    @contextlib.asynccontextmanager
    async def _raw(self, data: bytes, window: int | None = None) -> Any:
        connection = socket.socket()
        if window is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        limit = 1 << 16 if window is None else 1024
        reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
        try:
            writer.write(data)
            await writer.drain()
            yield reader
        finally:
            writer.transport.abort()

    async def _fit(self) -> None:
        self._made += 1
        name = f"fit-{self._made}"
        method = self._random.choice(("z", "lora"))
        fit = {"method": method, "steps": 4, "holdout": 0.25}
        job = (await self._post("/tasks", {"id": name, "examples": EXAMPLES, "fit": fit}, 202))[
            "id"
        ]
        async with self._client.stream("GET", f"/jobs/{job}/events") as events:
            async for _ in events.aiter_lines():
                if self._random.random() < 0.3:
                    break  # leaves while it goes on
        if self._random.random() < 0.3:
            await self._client.post(f"/jobs/{job}/cancel")
        async with asyncio.timeout(FIT_SECONDS):
            while (await self._client.get(f"/jobs/{job}")).json()["state"] in ("queued", "running"):
                await asyncio.sleep(0.5)
        await self._client.delete(f"/tasks/{name}")


def _request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = "POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
