"""`polyhead keys`: make, list and revoke the keys of a file that a server reads."""

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tomlkit
import typer
from pydantic import ValidationError

from polyhead.server.commands.common import AsJson, fail
from polyhead.server.http.keys import (
    ApiKey,
    KeysFile,
    KeysFileError,
    first_error,
    hash_of,
    is_toml,
    new_key,
    read_keys,
)

keys_app = typer.Typer(
    help="The keys that may call a server; it follows changes of the file by itself.",
    no_args_is_help=True,
)
File = Annotated[Path, typer.Option("--file", help="Keys file, TOML or JSON by its suffix")]
Id = Annotated[str, typer.Argument(help="Name of the key, shown in lists, never secret")]


@keys_app.command("new")
def new_command(
    name: Id,
    file: File,
    scope: Annotated[list[str], typer.Option(help="generate, tasks or admin; may be repeated")],
    requests_per_minute: Annotated[float | None, typer.Option(help="Calls")] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(help="Tokens, of prompts and of answers")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Calls at the same time")] = None,
    task_prefix: Annotated[
        str | None, typer.Option(help="See and use only tasks whose ids begin so")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Add a key and print it: the file keeps its hash only, so it cannot be shown again."""
    key = new_key()
    entry = {
        "id": name,
        "hash": hash_of(key),
        "scopes": scope,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "max_concurrent": max_concurrent,
        "task_prefix": task_prefix,
    }
    given = {member: value for member, value in entry.items() if value is not None}
    document = _read(file) if file.exists() else _empty(file)
    document["keys"].append(given)
    _check(file, document)
    _write(file, document)
    typer.echo(json.dumps({"id": name, "key": key}) if as_json else key)


@keys_app.command("list")
def list_command(file: File, as_json: AsJson = False) -> None:
    """Show every key's name, scopes and limits; there is nothing secret to show."""
    try:
        found = read_keys(file)
    except KeysFileError as exc:
        fail(str(exc), 1)
    if as_json:
        shown = [key.model_dump(exclude={"hash"}, exclude_none=True) for key in found]
        typer.echo(json.dumps(shown, indent=2))
    else:
        _print(found)


@keys_app.command("revoke")
def revoke_command(name: Id, file: File) -> None:
    """Remove a key; running servers refuse it within a second."""
    document = _read(file)
    places = [place for place, key in enumerate(document["keys"]) if key["id"] == name]
    if not places:
        fail(f"{file}: there is no key {name!r}", 1)
    del document["keys"][places[0]]
    _write(file, document)


def _read(file: Path) -> Any:
    """The file as it stands, with the comments of TOML."""
    try:
        read_keys(file)
    except KeysFileError as exc:
        fail(str(exc), 1)
    text = file.read_text()
    return tomlkit.parse(text) if is_toml(file) else json.loads(text)


def _empty(file: Path) -> Any:
    if not is_toml(file):
        return {"keys": []}
    document = tomlkit.document()
    document["keys"] = tomlkit.aot()
    return document


def _check(file: Path, document: Any) -> None:
    plain = document.unwrap() if is_toml(file) else document
    try:
        KeysFile.model_validate(plain)
    except ValidationError as exc:
        fail(f"{file}: {first_error(exc)}", 2)


def _write(file: Path, document: Any) -> None:
    """Whole or not at all, readable for its owner: servers may be reading it now."""
    text = tomlkit.dumps(document) if is_toml(file) else json.dumps(document, indent=2) + "\n"
    try:
        descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=file.name)
    except OSError as exc:
        _cannot_write(file, exc)
    try:
        with os.fdopen(descriptor, "w") as unfinished:
            unfinished.write(text)
            unfinished.flush()
            os.fsync(unfinished.fileno())
        if file.exists():
            Path(name).chmod(file.stat().st_mode & 0o777)
        Path(name).replace(file)
    except OSError as exc:
        Path(name).unlink(missing_ok=True)
        _cannot_write(file, exc)


def _cannot_write(file: Path, exc: OSError) -> NoReturn:
    fail(f"{file}: {exc.strerror}", 1)


def _print(keys: Sequence[ApiKey]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("id", "scopes", "tasks", "requests/min", "tokens/min", "at once", box=None)
    for key in keys:
        limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrent)
        prefix = f"{key.task_prefix}…" if key.task_prefix else "all"
        numbers = ("-" if limit is None else f"{limit:g}" for limit in limits)
        table.add_row(key.id, ", ".join(key.scopes), prefix, *numbers)
    Console().print(table)
