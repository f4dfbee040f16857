"""The command `polyhead`.

Heavy packages are imported inside the commands that need them, so that `--help` answers at once.
Exit status: 0 done, 1 the work failed, 2 the command or a setting is wrong.
"""

import gc
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from polyhead.server.commands.common import AsJson, one_line_errors
from polyhead.server.commands.conversions import convert_app, inventory_app
from polyhead.server.commands.evaluate import evaluate_command
from polyhead.server.commands.fit import fit_command
from polyhead.server.commands.flags import read, with_flags_of
from polyhead.server.commands.generate import generate_command
from polyhead.server.commands.keys import keys_app
from polyhead.server.commands.scale import scale_command
from polyhead.server.commands.tasks import tasks_app
from polyhead.server.commands.train import train_command
from polyhead.server.config import Settings

app = typer.Typer(
    help="Serve thousands of tasks from one backbone and one inventory of LoRA skills.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(convert_app, name="convert")
app.add_typer(inventory_app, name="inventory")
app.add_typer(keys_app, name="keys")
app.add_typer(tasks_app, name="tasks")
app.command("train")(train_command)
app.command("fit")(fit_command)
app.command("eval")(evaluate_command)
app.command("generate")(generate_command)
app.command("scale")(scale_command)


@app.command()
@with_flags_of(Settings)
def serve(
    *,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the settings in force and exit")
    ] = False,
    **flags: Any,
) -> None:
    """Start the server.

    Every flag may stand in the environment, where --max-running is POLYHEAD_MAX_RUNNING, or in the
    file of --config, where it is max_running.
    """
    settings = read(Settings, flags)
    if print_config:
        typer.echo(json.dumps(settings.shown(), indent=2))
        return
    # The imports make millions of objects that stay: looking through them for garbage again and
    # again takes a second of the start, and later pauses every collection while serving.
    gc.disable()
    from polyhead.server.http.serve import run

    gc.freeze()
    gc.enable()
    with one_line_errors():
        raise typer.Exit(run(settings))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Data folder, with the wheel of the demo in it")],
) -> None:
    """Prepare the demo's backbone and inventory; what is there already is kept."""
    from polyhead.server.demo.backbone import prepare_backbone
    from polyhead.server.demo.inventory import prepare_inventory

    with one_line_errors():
        backbone = prepare_backbone(folder)
        inventory = prepare_inventory(folder)
    typer.echo(f"backbone {backbone}\ninventory {inventory}")


@app.command("inspect")
def inspect_inventory(
    inventory: Annotated[Path, typer.Argument(help="Folder of an inventory")],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder to draw its tasks in, as PNG files")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what an inventory holds, after checking every tensor in it."""
    from polyhead.adapters.inventory import Inventory

    with one_line_errors():
        loaded = Inventory.load(inventory)
        facts = _facts(loaded)
        if pictures is not None:
            facts["pictures"] = _draw(loaded, pictures)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        _print_facts(facts)


def _facts(inventory: Any) -> dict[str, Any]:
    header = inventory.header
    return {
        "backbone": header.backbone.model_dump(),
        "modules": [module.model_dump() for module in header.modules],
        "heads": header.heads,
        "skills": header.skills,
        "rank": header.rank,
        "scaling": header.scaling,
        "dtype": header.dtype,
        "fingerprint": inventory.fingerprint,
        "provenance": header.provenance,
        "tasks": sorted(inventory.tasks),
    }


def _draw(inventory: Any, folder: Path) -> list[str]:
    from polyhead.adapters.training.pictures import draw_all

    return [str(path) for path in draw_all(inventory.tasks, inventory.layout, folder)]


def _print_facts(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    shapes = {(m["in_features"], m["out_features"]) for m in facts["modules"]}
    shown = {
        **facts,
        "backbone": f"{facts['backbone']['name']} ({facts['backbone']['fingerprint'][:12]})",
        "modules": f"{len(facts['modules'])} of {len(shapes)} shapes",
        "provenance": ", ".join(f"{key} {value}" for key, value in facts["provenance"].items()),
        "tasks": f"{len(facts['tasks'])}: {', '.join(facts['tasks'])}",
    }
    if "pictures" in facts:
        shown["pictures"] = "\n".join(facts["pictures"])
    table = Table(show_header=False, box=None)
    for name, value in shown.items():
        table.add_row(name, str(value))
    Console().print(table)
