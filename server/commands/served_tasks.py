"""`polyhead tasks list`, `show`, `create`, `rollback`: the tasks of a running server."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyhead.server.commands.calling import Url, connected, print_json, print_table, short
from polyhead.server.commands.common import AsJson, fail

if TYPE_CHECKING:
    from polyhead.clients import Task, Version

TaskId = Annotated[str, typer.Argument(metavar="ID", help="Id of the task")]
Template = Annotated[str | None, typer.Option(help="Holds {input}, escapes as in JSON")]


def list_command(
    prefix: Annotated[str | None, typer.Option(help="Beginning of the ids")] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY:VALUE that they have; may be repeated")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the tasks."""
    wanted = _pairs(metadata or [])
    with connected(url) as client:
        tasks = list(client.tasks.list(prefix=prefix, metadata=wanted))
    if as_json:
        print_json(tasks)
        return
    rows = [
        (one.id, one.kind, one.granularity, short(one.generation), one.metadata, _when(one))
        for one in tasks
    ]
    print_table(("id", "kind", "granularity", "generation", "metadata", "updated"), rows)


def show_command(id: TaskId, url: Url = None, as_json: AsJson = False) -> None:
    """Show a task and what it was before."""
    with connected(url) as client:
        task = client.tasks.get(id)
        versions = client.tasks.history(id) if task.kind != "base" else []
    facts = task.model_dump(mode="json", exclude_unset=True)
    if as_json:
        print_json({**facts, "versions": versions})
        return
    print_table((), list(facts.items()))
    if versions:
        typer.echo("")
        print_table(("version", "made", "ended"), [_version_row(one) for one in versions])


def create_command(
    id: TaskId,
    routing: Annotated[Path | None, typer.Option(help="Safetensors with its routing")] = None,
    private_adapter: Annotated[
        Path | None, typer.Option(help="Safetensors or PEFT folder with a LoRA of its own")
    ] = None,
    context: Annotated[
        Path | None, typer.Option(help="Text, or JSONL of examples, to generate it from")
    ] = None,
    copy_of: Annotated[str | None, typer.Option(help="A task to begin as")] = None,
    template: Template = None,
    metadata: Annotated[
        list[str] | None, typer.Option(help="KEY:VALUE to find it by; may be repeated")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Register a task from a file or as a copy; it is served when the command ends."""
    if sum(source is not None for source in (routing, private_adapter, context, copy_of)) != 1:
        fail("one of --routing, --private-adapter, --context and --copy-of is needed", 2)
    fields: dict[str, Any] = {
        "template": None if template is None else unescaped(template),
        "metadata": _pairs(metadata) if metadata else None,
    }
    with connected(url) as client:
        if copy_of is not None:
            task = client.tasks.copy(copy_of, id, **fields)
        elif routing is not None:
            task = client.tasks.create(id, routing=_routing(routing), **fields)
        elif context is not None:
            task = client.tasks.create(id, context=_context(context), **fields)
        else:
            task = client.tasks.create(id, private_adapter=private_adapter, **fields)
    print_task(task, as_json)


def rollback_command(
    id: TaskId,
    to: Annotated[
        str | None, typer.Option(help="Beginning of the generation; by default the one before")
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a task what it was before; nothing in its history is lost by that."""
    with connected(url) as client:
        versions = client.tasks.history(id)
        current = next((one.generation for one in versions if one.ended is None), None)
        others = [one.generation for one in versions if one.generation != current]
        found = [one for one in others if to is None or one.startswith(to)]
        if not found or (to is not None and len(set(found)) > 1):
            known = ", ".join(map(short, others)) or "none"
            wanted = "no earlier version" if to is None else f"not one version {to!r}"
            fail(f"{id}: {wanted} among those that are kept: {known}", 1)
        task = client.tasks.rollback(id, found[0], if_match=current)
    print_task(task, as_json)


def print_task(task: "Task", as_json: bool) -> None:
    """What became of a task, in a line or as JSON."""
    if as_json:
        print_json(task)
    else:
        typer.echo(f"{task.id}: {task.kind}, generation {short(task.generation)}")


def unescaped(template: str) -> str:
    """A shell cannot write a new line as handily as JSON can."""
    try:
        return str(json.loads(f'"{template}"', strict=False))
    except json.JSONDecodeError as exc:
        fail(f"--template: not text with JSON's escapes: {exc.msg}; found {template!r}", 2)


def _routing(path: Path) -> Any:
    from polyhead.clients import Routing

    try:
        return Routing.from_safetensors(path.read_bytes())
    except ValueError as exc:
        fail(f"{path}: {exc}", 1)


def _context(path: Path) -> Any:
    """A document, or the examples of a file that is named .jsonl."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [{"input": row["input"], "output": row["output"]} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        fail(f"{path}: no document and no examples with input and output: {exc}", 1)


def _pairs(texts: list[str]) -> dict[str, Any]:
    pairs = {}
    for text in texts:
        key, colon, value = text.partition(":")
        if not colon:
            fail(f"--metadata: found {text!r}, expected KEY:VALUE", 2)
        pairs[key] = value
    return pairs


def _when(task: "Task") -> str:
    return f"{task.updated_at:%Y-%m-%d %H:%M}"


def _version_row(version: "Version") -> tuple[object, ...]:
    ended = f"{version.ended} {version.ended_at:%Y-%m-%d %H:%M}" if version.ended_at else "current"
    return (short(version.generation), version.provenance.get("how"), ended)
