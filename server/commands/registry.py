"""`polyhead tasks export` and `import`: a registry as one file."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polyhead.server.commands.common import AsJson, one_line_errors

if TYPE_CHECKING:
    from polyhead.adapters.inventory import Inventory
    from polyhead.server.tasks.registry import Registry

InventoryFolder = Annotated[
    Path, typer.Option("--inventory", help="Inventory of the tasks", envvar="POLYHEAD_INVENTORY")
]
DataDir = Annotated[
    Path, typer.Option(help="Folder of the task registry", envvar="POLYHEAD_DATA_DIR")
]
DatabaseUrl = Annotated[
    str | None, typer.Option(help="PostgreSQL of the registry", envvar="POLYHEAD_DATABASE_URL")
]
BlobStore = Annotated[
    str | None, typer.Option(help="Its s3://bucket/prefix", envvar="POLYHEAD_BLOB_STORE")
]


def export_command(
    file: Annotated[Path, typer.Argument(help="Tar file to write")],
    inventory: InventoryFolder,
    data_dir: DataDir,
    database_url: DatabaseUrl = None,
    blob_store: BlobStore = None,
    as_json: AsJson = False,
) -> None:
    """Write all tasks of a registry, as they are now, into one file. A server may use it."""
    with _opened(inventory, data_dir, database_url, blob_store) as (registry, _):
        from polyhead.server.tasks.archive import export_tasks

        aside = file.with_name(f".{file.name}.part")
        try:
            with aside.open("wb") as out:
                count = export_tasks(registry, out)
            aside.replace(file)
        finally:
            aside.unlink(missing_ok=True)
    typer.echo(json.dumps({"tasks": count}) if as_json else f"{file}: {count} tasks")


def import_command(
    file: Annotated[Path, typer.Argument(help="Tar file of an export")],
    inventory: InventoryFolder,
    data_dir: DataDir,
    database_url: DatabaseUrl = None,
    blob_store: BlobStore = None,
    as_json: AsJson = False,
) -> None:
    """Make a registry's tasks those of an export; others stay. A server that uses it follows."""
    with _opened(inventory, data_dir, database_url, blob_store) as (registry, loaded):
        from polyhead.server.tasks.archive import import_tasks

        with file.open("rb") as source:
            done = asdict(import_tasks(registry, loaded, source))
    shown = ", ".join(f"{number} {what}" for what, number in done.items())
    typer.echo(json.dumps(done) if as_json else f"{file}: {shown}")


@contextlib.contextmanager
def _opened(
    inventory: Path, data_dir: Path, database_url: str | None, blob_store: str | None
) -> "Iterator[tuple[Registry, Inventory]]":
    with one_line_errors():
        from polyhead.adapters.inventory import Inventory
        from polyhead.server.tasks.options import Options
        from polyhead.server.tasks.registry import Registry

        loaded = Inventory.load(inventory)
        options = Options(database_url=database_url, blob_store=blob_store)
        with contextlib.closing(
            Registry(data_dir, loaded.fingerprint, loaded.layout, options)
        ) as registry:
            yield registry, loaded
