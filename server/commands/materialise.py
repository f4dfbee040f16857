"""`polyhead tasks materialise`: a task of a running server as a PEFT LoRA's folder."""

from pathlib import Path
from typing import Annotated

import typer

from polyhead.server.commands.calling import Url, connected, print_json
from polyhead.server.commands.common import AsJson, fail, one_line_errors
from polyhead.server.commands.served_tasks import TaskId


def materialise_command(
    id: TaskId,
    out: Annotated[Path, typer.Option(help="Folder to write, which must be new or empty")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Write any task as an ordinary PEFT LoRA, which answers the same without Polyhead."""
    with one_line_errors():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            fail(f"--out {out}: expected a new or an empty folder", 2)
    with connected(url) as client:
        files = client.tasks.lora(id)
    with one_line_errors():
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
    size = sum(map(len, files.values()))
    if as_json:
        print_json({"id": id, "folder": str(out), "bytes": size})
    else:
        typer.echo(f"{out}: {id} as a PEFT LoRA, {size / 1e6:.1f} MB")
