"""What the commands share that call a running server."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polyhead.server.commands.common import fail, one_line_errors

if TYPE_CHECKING:
    from polyhead.clients import Client

SHOWN_HASH = 12

Url = Annotated[
    str | None,
    typer.Option(
        help="Address of the server; its key is read from POLYHEAD_API_KEY only, because other "
        "users of a machine see each command's arguments",
        envvar="POLYHEAD_URL",
        show_default="http://127.0.0.1:8000",
    ),
]


@contextmanager
def connected(url: str | None) -> Iterator["Client"]:
    """A client of the server; what that refuses, or cannot be read here, becomes one line."""
    import httpx

    from polyhead.clients import Client, PolyheadError

    with one_line_errors():
        try:
            with Client(url) as client:
                yield client
        except (PolyheadError, httpx.InvalidURL) as exc:
            fail(str(exc), 1)


def print_json(value: Any) -> None:
    """One JSON value; models of the client as the server sent them."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=_plain))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows under their names, or without names. Nothing in a value is read as rich's markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, show_header=bool(columns), box=None)
    for row in rows:
        table.add_row(*(Text(_cell(value), overflow="fold") for value in row))
    Console(file=sys.stdout).print(table)


def short(generation: str) -> str:
    """As much of a hash as tables show and `rollback` needs."""
    return generation[:SHOWN_HASH]


def _cell(value: object) -> str:
    if value is None or value in ({}, []):
        return "–"
    if isinstance(value, float):
        return f"{value:.2f}"
    # JSON's escapes keep what others wrote from moving the terminal's cursor.
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() else json.dumps(text, ensure_ascii=True)


def _plain(model: Any) -> Any:
    return model.model_dump(mode="json", exclude_unset=True)
