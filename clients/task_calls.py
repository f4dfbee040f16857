"""What can be asked of the registry of tasks, one function for each call; nothing is sent here."""

import base64
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack
from urllib.parse import quote

from polyhead.clients.asking import Example, FitOptions, Sampling
from polyhead.clients.call import Call, Page, Reply, answer, nothing, parse
from polyhead.clients.calls import given, routing_body
from polyhead.clients.errors import UnreadableAnswerError
from polyhead.clients.folders import packed, unpacked
from polyhead.clients.models import (
    History,
    Job,
    Neighbour,
    Scalar,
    Similar,
    Task,
    TaskPage,
    Version,
)
from polyhead.clients.routing import Routing

PrivateAdapter = bytes | str | Path
"""A LoRA that a task owns alone: the bytes or the path of its safetensors, or a PEFT folder."""
Context = str | Sequence[Example]
"""What the inventory's generator makes a task of: a document, or examples."""
Metadata = Mapping[str, Scalar]


def create(
    id: str,
    *,
    routing: Routing | None = None,
    private_adapter: PrivateAdapter | None = None,
    context: Context | None = None,
    template: str | None = None,
    defaults: Sampling | None = None,
    metadata: Metadata | None = None,
) -> Call[Task]:
    """Register a task from a routing, a private adapter or a context; it is served when this
    returns.

    template: holds `{input}`. defaults: sampling where a request names none. Raises
    `ConflictError` where the id is taken.
    """
    fields = given(context=_context(context), template=template, defaults=defaults)
    body = {"id": id, **fields, **given(metadata=metadata)}
    return Call("POST", "/tasks", answer(Task), **_sent(body, routing, private_adapter))


def copy(
    source: str,
    id: str,
    *,
    template: str | None = None,
    defaults: Sampling | None = None,
    metadata: Metadata | None = None,
) -> Call[Task]:
    """Register `id` with the numbers of `source`; fields that are not given are its too."""
    fields = given(template=template, defaults=defaults, metadata=metadata)
    return Call("POST", "/tasks", answer(Task), {"id": id, "copy_of": source, **fields})


def fit_new(
    id: str,
    examples: Sequence[Example],
    *,
    template: str | None = None,
    defaults: Sampling | None = None,
    metadata: Metadata | None = None,
    **fit: Unpack[FitOptions],
) -> Call[Job]:
    """Order a new task to be fitted from examples; it exists once the job has succeeded."""
    fields = given(template=template, defaults=defaults, metadata=metadata, fit=fit or None)
    return Call("POST", "/tasks", answer(Job), {"id": id, "examples": list(examples), **fields})


def fit(
    id: str,
    examples: Sequence[Example],
    *,
    template: str | None = None,
    if_match: str | None = None,
    **options: Unpack[FitOptions],
) -> Call[Job]:
    """Order a task that exists to be fitted anew; until the job succeeded it stays as it is."""
    body = {"examples": list(examples), **given(template=template, fit=options or None)}
    return Call("POST", f"{_path(id)}/fit", answer(Job), body, headers=_tag(if_match))


def get(id: str) -> Call[Task]:
    """The task as it is now."""
    return Call("GET", _path(id), answer(Task), repeatable=True)


def list_all(
    *, prefix: str | None = None, metadata: Metadata | None = None, page_size: int = 100
) -> Call[Page[Task]]:
    """All tasks in the order of their ids; pages are fetched as they are needed.

    metadata: only tasks that have all of these values.
    """
    pairs = [f"{key}:{value}" for key, value in (metadata or {}).items()]
    return _tasks({"limit": page_size, **given(prefix=prefix, metadata=pairs or None)})


def replace(
    id: str,
    *,
    routing: Routing | None = None,
    private_adapter: PrivateAdapter | None = None,
    context: Context | None = None,
    template: str | None = None,
    defaults: Sampling | None = None,
    metadata: Metadata | None = None,
    if_match: str | None = None,
) -> Call[Task]:
    """Replace everything but the id; what is not given is empty then.

    if_match: the generation that the task must be at; `StaleError` where it is at another.
    """
    fields = given(context=_context(context), template=template, defaults=defaults)
    body = {**fields, **given(metadata=metadata)}
    return _changing("PUT", _path(id), if_match, **_sent(body, routing, private_adapter))


def update(
    id: str,
    *,
    template: str | None = None,
    defaults: Sampling | None = None,
    metadata: Metadata | None = None,
    if_match: str | None = None,
) -> Call[Task]:
    """Replace what is given, each as a whole: `""` and `{}` remove template, defaults, metadata."""
    fields = given(template=template, defaults=defaults, metadata=metadata)
    body = {name: value or None for name, value in fields.items()}
    return _changing("PATCH", _path(id), if_match, body=body)


def delete(id: str, *, if_match: str | None = None) -> Call[None]:
    """Remove a task; requests that run on it finish."""
    return Call("DELETE", _path(id), nothing, headers=_tag(if_match))


def history(id: str) -> Call[list[Version]]:
    """What the task is and was, newest first, as far back as the server keeps it."""

    def read(reply: Reply) -> list[Version]:
        return parse(History, reply.content).versions

    return Call("GET", f"{_path(id)}/history", read, repeatable=True)


def rollback(id: str, generation: str, *, if_match: str | None = None) -> Call[Task]:
    """Make the task what it was at `generation`, one of its history's."""
    body = {"generation": generation}
    return _changing("POST", f"{_path(id)}/rollback", if_match, body=body)


def restore(id: str) -> Call[Task]:
    """Bring a deleted task back, as long as the server keeps it."""
    return Call("POST", f"{_path(id)}/restore", answer(Task))


def routing(id: str) -> Call[Routing]:
    """The task's routing as it was given. Raises `UnprocessableError` for a private adapter."""
    return Call("GET", f"{_path(id)}/routing", _routing, repeatable=True)


def lora(id: str) -> Call[dict[str, bytes]]:
    """Any task, whether it has a routing or an adapter of its own, as an ordinary PEFT LoRA: the
    two files of its folder, by name."""

    def read(reply: Reply) -> dict[str, bytes]:
        try:
            return unpacked(reply.content)
        except (ValueError, tarfile.TarError) as exc:
            raise UnreadableAnswerError(f"the server's answer is no LoRA: {exc}") from exc

    return Call("GET", f"{_path(id)}/lora", read, repeatable=True)


def similar(id: str, *, limit: int = 10) -> Call[list[Neighbour]]:
    """The tasks whose routings point the same way, nearest first."""

    def read(reply: Reply) -> list[Neighbour]:
        return parse(Similar, reply.content).similar

    return Call("GET", f"{_path(id)}/similar", read, query={"limit": limit}, repeatable=True)


def _tasks(query: Mapping[str, Any]) -> Call[Page[Task]]:
    def read(reply: Reply) -> Page[Task]:
        page = parse(TaskPage, reply.content)
        following = _tasks({**query, "cursor": page.next}) if page.next else None
        return Page(page.tasks, following)

    return Call("GET", "/tasks", read, query=query, repeatable=True)


def _changing(method: str, path: str, if_match: str | None, **sent: Any) -> Call[Task]:
    # With a tag, the second of two equal changes is refused because the first one was made.
    tag = _tag(if_match)
    return Call(method, path, answer(Task), headers=tag, repeatable=if_match is None, **sent)


def _context(context: Context | None) -> str | list[Example] | None:
    return context if context is None or isinstance(context, str) else list(context)


def _path(id: str) -> str:
    return f"/tasks/{quote(id, safe='')}"


def _tag(if_match: str | None) -> dict[str, str]:
    return {} if if_match is None else {"If-Match": f'"{if_match}"'}


def _routing(reply: Reply) -> Routing:
    return Routing.from_safetensors(reply.content)


def _sent(
    fields: dict[str, Any], routing: Routing | None, private_adapter: PrivateAdapter | None
) -> dict[str, Any]:
    """`body` of a `Call`, or `form` where a folder is sent."""
    body = dict(fields)
    if routing is not None:
        body["routing"] = routing_body(routing)
    if private_adapter is None:
        return {"body": body}
    if not isinstance(private_adapter, bytes):
        path = Path(private_adapter)
        if path.is_dir():
            archive = ("adapter.tar", packed(path))
            return {"form": {"task": (None, json.dumps(body).encode()), "private_adapter": archive}}
        private_adapter = path.read_bytes()
    body["private_adapter"] = {"safetensors": base64.b64encode(private_adapter).decode()}
    return {"body": body}
